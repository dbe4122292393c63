"""Causal mediation: how much of an intervention's effect goes through a mediator, and how much around it.

With y of the base prompt, and of the prompt after the intervention (Vig et al. 2020, arXiv 2004.12265):

* total effect: y(intervened) - y(base);
* natural indirect effect of a mediator: the base prompt with the mediator as it is after the intervention;
* natural direct effect: the intervened prompt with the mediator as it was before.

They are the two directions of one patch, so that a scan in both directions is a mediation analysis already. Total =
direct + indirect in linear models alone; what is left over is the interaction.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from workbench.circuits.effects import Direction, Effects
from workbench.circuits.inference import mean_effect
from workbench.errors import RequestError


def mediation(effects: Effects, *, base: Literal["clean", "corrupt"] = "clean", relative: bool = False) -> pd.DataFrame:
    """One row a mediator: total, indirect, direct effect and their interaction, with bootstrap intervals.

    Args:
        effects: patches in both directions; each change is a mediator.
        base: the prompt that is intervened on; the other one is that after the intervention.
        relative: as shares of the base prompt's y, prompt by prompt, as Vig et al. have it (for a y that is a ratio
            of probabilities); differences by default.
    """
    if set(effects.values) != {"denoising", "noising"}:
        raise RequestError("Mediation needs both directions; patch with direction='both'.")
    before, after = (effects.clean, effects.corrupt) if base == "clean" else (effects.corrupt, effects.clean)
    into_base: Direction = "noising" if base == "clean" else "denoising"
    into_other: Direction = "denoising" if base == "clean" else "noising"
    scale = before if relative else np.ones_like(before)
    if relative and bool((np.abs(before) < 1e-12).any()):
        raise RequestError("A base prompt's y is zero, so that no share of it can be taken; use relative=False.")
    parts = {
        "total": np.broadcast_to((after - before) / scale, effects.values[into_base].shape),
        "indirect": (effects.values[into_base] - before) / scale,
        "direct": (effects.values[into_other] - before) / scale,
    }
    parts["interaction"] = parts["total"] - parts["indirect"] - parts["direct"]
    there = ~np.isnan(parts["indirect"])
    names = effects.labels or tuple(" ".join(spot.node for spot in change) for change in effects.changes)
    rows = []
    for number, name in enumerate(names):
        row: dict[str, object] = {"mediator": name, "n": int(there[number].sum())}
        for part, values in parts.items():
            own = values[number][there[number]][None]
            found = mean_effect(own, effects.seed) if own.size else None
            for end in ("value", "low", "high"):
                label = part if end == "value" else f"{part}_{end}"
                row[label] = np.nan if found is None else float(getattr(found, end)[0])
        rows.append(row)
    return pd.DataFrame(rows)
