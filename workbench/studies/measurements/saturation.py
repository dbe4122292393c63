"""Where first-order estimates fail: `saturation`, estimates of queries or keys against what patching finds.

At the clean prompts of a task that a model does well two things are flat: a softmax that attends to one key, and the
final norm, whose scale the answer dominates. Attribution patching (`atp`) takes the gradient there; AtP*'s correction
for queries and keys (Kramár et al. 2024, arXiv 2403.00745) computes the pattern anew and is linear from there; with
the scale of the norm taken as given as well, both are gone. Three subjects: planted heads whose every effect is known
(`copying`), a trained induction toy (`induction`), and the model at hand on a task (`model`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from workbench.circuits import Effects, attribute, patch_activations
from workbench.circuits.inference import RESAMPLES
from workbench.dynamics import copying, repeat_pairs, train_induction
from workbench.dynamics.wiring import attached
from workbench.heads.detector import Array, Progress
from workbench.studies.measurements.base import Bench, Measurement, Tables, spearman
from workbench.studies.measurements.pairs import Pairs, prepare
from workbench.tasks import PairTask
from workbench.tracing import Model

Places = np.ndarray[Any, np.dtype[np.int64]]
# Method of attribution, and which norms' scale is taken as given.
METHODS: dict[str, tuple[str, Literal["none", "final", "all"]]] = {
    "gradient": ("atp", "none"),
    "gradient, final norm frozen": ("atp", "final"),
    "pattern anew": ("atp-qk", "none"),
    "pattern anew, final norm frozen": ("atp-qk", "final"),
    "pattern anew, all norms frozen": ("atp-qk", "all"),
    "integrated gradients": ("eap-ig", "none"),
}


class Saturation(Pairs):
    """`site` of the subject: queries or keys; `top` heads by exact effect are compared one by one."""

    subject: Literal["copying", "induction", "model"] = "copying"
    site: Literal["q", "k"] = "q"
    direction: Literal["noising", "denoising"] = "noising"
    top: Annotated[int, Field(ge=2)] = 8


def _saturation(bench: Bench, asked: Saturation, progress: Progress | None) -> Tables:
    """Exact effects and estimates of the nodes as shares of the gap; `slope` is their ratio by least squares.

    A slope of 1 is right, 0 blind; `rank` is the rank correlation over nodes, `error` the mean absolute difference at
    the top nodes. Intervals are over prompts.
    """
    model, task, caption = _subject(bench, asked)
    effects = patch_activations(model, task, asked.site, "head", direction=asked.direction)
    exact = effects.effect(asked.direction)
    nodes = [change[0].node for change in effects.changes]
    best = np.argsort(-np.abs(exact.mean(1)), kind="stable")[: asked.top]
    rows, agreed = [], []
    for done, (label, (method, freeze)) in enumerate(METHODS.items(), start=1):
        found = attribute(model, task, method, direction=asked.direction, freeze_ln_scale=freeze, seed=asked.seed)
        assert found.input_per_prompt is not None
        columns = [found.graph.reader(node, asked.site) for node in nodes]
        estimates = found.input_per_prompt[:, columns].T
        rows += _rows(effects, nodes, best, exact, estimates, label)
        agreed += _agreed(effects, best, exact, estimates, label, asked.seed)
        if progress is not None:
            progress(done, len(METHODS))
    about = {"subject": asked.subject, "site": asked.site, "direction": asked.direction, "caption": caption}
    return {
        "saturation": pd.DataFrame(rows).assign(**about),
        "first_order": pd.DataFrame(agreed).assign(**about),
    }


def _subject(bench: Bench, asked: Saturation) -> tuple[Model, PairTask, str]:
    if asked.subject == "model":
        found = prepare(bench, asked)
        return bench.model, found.task, found.caption
    if asked.subject == "copying":
        corrupt = "query" if asked.site == "q" else "key"
        truth = copying((1.0, 0.5, -0.25, 0.0), 2, corrupt, final_norm=True, seed=asked.seed)
        bench.note_pairs(truth.task)
        return truth.model, truth.task, f"{len(truth.task)} pairs of planted heads that copy, before a final norm."
    task = repeat_pairs(max(asked.prompts, 30), seed=asked.seed)
    trained = train_induction(asked.seed)
    bench.note_pairs(task)
    return attached(trained.model), task, f"{len(task)} pairs of a toy trained to accuracy {trained.accuracy:.3f}."


def _gap(effects: Effects) -> float:
    return float(effects.clean.mean() - effects.corrupt.mean())


def _rows(
    effects: Effects, nodes: list[str], best: Places, exact: Array, estimates: Array, label: str
) -> list[dict[str, Any]]:
    gap = _gap(effects)
    return [
        {
            "method": label, "node": nodes[at], "exact": float(exact[at].mean() / gap),
            "value": float(estimates[at].mean() / gap), "n": exact.shape[1],
        }
        for at in best
    ]  # fmt: skip


def _agreed(
    effects: Effects, best: Places, exact: Array, estimates: Array, label: str, seed: int
) -> list[dict[str, Any]]:
    rng, prompts = np.random.default_rng(seed), exact.shape[1]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
    whole = np.full(prompts, 1 / prompts)
    gap = effects.clean - effects.corrupt

    def slope(weight: Array) -> float:
        a, b = exact @ weight, estimates @ weight
        return float((a @ b) / (a @ a)) if (a @ a) > 0 else float("nan")

    def error(weight: Array) -> float:
        return float(np.abs(exact[best] @ weight - estimates[best] @ weight).mean() / (gap @ weight))

    def rank(weight: Array) -> float:
        return spearman(exact @ weight, estimates @ weight)

    rows = []
    for measure, of, draws in (("slope", slope, len(weights)), ("error", error, len(weights)), ("rank", rank, 199)):
        drawn = [of(weight) for weight in weights[:draws]]
        low, high = np.nanpercentile(drawn, [2.5, 97.5]) if not np.isnan(drawn).all() else (np.nan, np.nan)
        rows.append(
            {
                "method": label, "measure": measure, "value": of(whole), "low": float(low), "high": float(high),
                "n": prompts,
            }
        )  # fmt: skip
    return rows


SATURATION = (
    Measurement(
        "saturation",
        1,
        "first-order estimates against patching",
        Saturation,
        _saturation,
        ("saturation", "first_order"),
    ),
)
