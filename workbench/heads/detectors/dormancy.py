"""Is a head that rests on the first token really idle? Scatter and dose curve.

`dormancy_scatter`: per head and text, the share of attention on the first token against the rise of the loss when the
head's output is set to zero (Guo et al. 2024, arXiv 2410.13835: on Wikipedia L16H25 of Llama-2-7B has a share of .75
to .99 and no rise, on GitHub .1 to .5 and a rise of up to .5 nats).

`inactive_dose`: loss against the share of (input, head) pairs removed, most inactive first. The active-dormant paper
names no threshold and has no dose curve of its own; this is the test of Sandoval-Segura et al. (arXiv 2504.03889): the
flagged heads of *that input* are zeroed, at quantiles of the score, against as many drawn at random. There the
measure is the accuracy on benchmarks, here the loss per token; there the control flags each head with the same
probability, here it has exactly as many heads an input, in the same layers unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from workbench.errors import RequestError
from workbench.heads.detector import Array
from workbench.heads.detectors.inactive import QUANTILES, Flags, Inactivity, inactive_heads
from workbench.heads.detectors.text import where_first_is_seen
from workbench.heads.inference import bootstrap_mean
from workbench.models import Batch, Head
from workbench.tasks import Task
from workbench.tracing import Edit, Model, ablate
from workbench.tracing import statistics as S

Progress = Callable[[int, int], None]


def mean_loss(model: Model, batch: Batch, edits: Sequence[Edit] = ()) -> Array:
    """Nats per token of each prompt, over all tokens but its first."""
    if int(batch.lengths.min()) < 2:
        raise RequestError("A prompt of 1 token has no loss; give prompts of 2 or more.")
    loss = model.trace(batch, edits=edits, loss=True).loss
    assert loss is not None
    return np.asarray(loss.double().nanmean(dim=1).numpy())


def dormancy_scatter(
    model: Model, tasks: Mapping[str, Task], heads: Sequence[Head], *, progress: Progress | None = None
) -> pd.DataFrame:
    """One row a head and text: layer, head, domain, prompt, first_share, loss (intact), loss_increase (nats a token).

    `tasks` are the domains by name. The head's output is set to zero before W_O; one forward a head and domain.
    """
    chosen = list(dict.fromkeys(model.spec.check(head) for head in heads))
    if not chosen:
        raise RequestError("No heads were given; name some, e.g. [Head(18, 6)].")
    frames, done = [], 0
    for domain, task in tasks.items():
        trace = model.trace(task.batch, statistics=[S.first(1)], loss=True)
        share = where_first_is_seen(trace, "first_1")
        assert trace.loss is not None
        intact = np.asarray(trace.loss.double().nanmean(dim=1).numpy())
        for head in chosen:
            without = mean_loss(model, task.batch, [ablate([head], "zero")])
            frames.append(
                pd.DataFrame({
                    "layer": head.layer, "head": head.head, "domain": domain, "prompt": np.arange(len(intact)),
                    "first_share": share[:, head.layer, head.head], "loss": intact, "loss_increase": without - intact,
                })
            )  # fmt: skip
            done += 1
            if progress is not None:
                progress(done, len(chosen) * len(tasks))
    return pd.concat(frames, ignore_index=True)


def zero_flagged(flags: Flags, batch: Batch) -> list[Edit]:
    """Edits that set heads to zero on those inputs on which they are flagged."""
    if len(flags) != len(batch):
        raise RequestError(f"Flags of {len(flags)} inputs for a batch of {len(batch)} prompts; give one row a prompt.")
    edits: list[Edit] = []
    for layer, head in np.argwhere(flags.any(axis=0)).tolist():
        rows = torch.from_numpy(flags[:, layer, head].copy())[:, None].expand(batch.ids.shape)
        edits.append(ablate([Head(layer, head)], "zero", positions=rows.contiguous()))
    return edits


def shuffled(flags: Flags, there: Flags, rng: np.random.Generator, *, same_layers: bool = True) -> Flags:
    """As many heads of each input drawn at random, layer by layer or from the whole model; `there` are those it has."""
    drawn = np.zeros_like(flags)
    groups = [[layer] for layer in range(flags.shape[1])] if same_layers else [list(range(flags.shape[1]))]
    for layers in groups:
        where = np.argwhere(there[0, layers])
        for prompt in range(len(flags)):
            count = int(flags[prompt, layers].sum())
            chosen = where[rng.permutation(len(where))[:count]]
            drawn[prompt, np.asarray(layers)[chosen[:, 0]], chosen[:, 1]] = True
    return drawn


def inactive_dose(
    model: Model,
    batch: Batch,
    score: Inactivity,
    quantiles: Sequence[float] = QUANTILES,
    *,
    draws: int = 3,
    same_layers: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Loss without the most inactive heads of each input, at each quantile, against random controls.

    `score` must be of this very batch. Columns: score, quantile, threshold, share (of all pairs flagged), loss,
    increase (nats a token) with low and high (95 % bootstrap over inputs), control_increase (mean over `draws`),
    control_low, control_high (least and greatest draw), n. One forward a quantile and draw.
    """
    if draws < 1:
        raise RequestError(f"draws = {draws}: a dose curve needs at least 1 random control.")
    intact, there = mean_loss(model, batch), ~np.isnan(score.values)
    rng, rows = np.random.default_rng(seed), []
    for done, quantile in enumerate(quantiles, start=1):
        flags = inactive_heads(score, quantile)
        # Copes with nothing flagged: no edits, no increase.
        rise = mean_loss(model, batch, zero_flagged(flags, batch)) - intact
        random = [
            mean_loss(model, batch, zero_flagged(shuffled(flags, there, rng, same_layers=same_layers), batch)) - intact
            for _ in range(draws)
        ]
        control = np.stack(random).mean(axis=1)
        interval = bootstrap_mean(rise[:, None], seed)
        rows.append(
            {
                "score": score.name, "quantile": quantile, "threshold": score.threshold(quantile),
                "share": flags[there].mean(), "loss": float((intact + rise).mean()),
                "increase": float(interval.value[0]), "low": float(interval.low[0]), "high": float(interval.high[0]),
                "control_increase": float(control.mean()), "control_low": float(control.min()),
                "control_high": float(control.max()), "n": len(intact),
            }
        )  # fmt: skip
        if progress is not None:
            progress(done, len(quantiles))
    return pd.DataFrame(rows)
