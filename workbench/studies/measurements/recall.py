"""Factual recall: `topic_heads`, MLPs as a function of heads (`mlp_fits`), and what the last layer takes back.

Lv et al. 2024 (arXiv 2403.19521) describe recall as a pipeline: heads bring the topic to the last token; MLPs there act
on what heads wrote as an activation does (erase it or amplify it) and add a part of their own that points to the
answer, the intercept of a regression; the last layer writes against the leading answer, and mending that raises its
probability. Each step is measured here on whatever heads a model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from workbench.circuits import LogitAttribution, direct_logit_attribution, logit_lens, patch_activations
from workbench.circuits.inference import sign_flip_p
from workbench.errors import RequestError
from workbench.heads.detector import Array, Progress
from workbench.models import Head
from workbench.studies.measurements.base import PROBE_SEED, Bench, Measurement, Tables
from workbench.studies.measurements.pairs import Pairs, interval_row, prepare
from workbench.tasks import PairTask, text_domains
from workbench.tracing import Edit, Model, ablate, patch


class Recall(Pairs):
    """Pairs for patching; `fitted` others for regressions, half of which mend the last layer and half try that.

    `regressors` is how many topic heads an MLP is fitted by; `texts` prompts of `length` tokens are held-out prose.
    """

    task: str = "facts"
    subject: str = "COUNTRY"
    fitted: Annotated[int, Field(ge=12)] = 40
    regressors: Annotated[int, Field(ge=1, le=6)] = 4
    texts: Annotated[int, Field(ge=2)] = 8
    length: Annotated[int, Field(ge=16)] = 48


def _recall(bench: Bench, asked: Recall, progress: Progress | None) -> Tables:
    found = prepare(bench, asked)
    if asked.subject not in found.task.roles:
        raise RequestError(f"{asked.task} has no role {asked.subject!r}; there are {', '.join(found.task.roles)}.")
    heads = _topic_heads(bench.model, found.task, asked).assign(caption=found.caption)
    _tell(progress, 1)
    others = prepare(bench, asked.model_copy(update={"prompts": asked.fitted}), seed=PROBE_SEED + asked.seed)
    writers = heads.sort_values("rank")["node"].head(asked.regressors).tolist()
    fits = _mlp_fits(bench.model, others.task, writers, asked.seed).assign(caption=others.caption)
    _tell(progress, 2)
    tables = {"topic_heads": heads, "mlp_fits": fits, **_last_layer(bench, asked, others.task)}
    _tell(progress, 3)
    return {
        name: table.assign(caption=others.caption) if "caption" not in table else table
        for name, table in tables.items()
    }


def _tell(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress(done, 3)


def _topic_heads(model: Model, task: PairTask, asked: Recall) -> pd.DataFrame:
    """What each head brings to the last token: noising its z there, its attention to the subject, its direct logit."""
    effects = patch_activations(model, task, "z", "head_position", positions=["END"], direction="noising")
    table = effects.table()[["node", "layer", "head", "effect", "recovery", "low", "high", "p", "q", "n"]]
    rows, end, place = torch.arange(len(task)), task.position.cpu(), task.roles[asked.subject].cpu()
    patterns = model.trace(task.clean, sites=["pattern"])
    looks = [
        float(patterns.site("pattern", int(layer))[rows, int(head), end, place].float().mean())
        for layer, head in zip(table["layer"], table["head"], strict=True)
    ]
    direct = direct_logit_attribution(model, task, by="head", seed=asked.seed)
    written = dict(zip(direct.nodes, direct.values.mean(0), strict=True))
    return table.assign(
        to_subject=looks,
        direct=[written[node] for node in table["node"]],
        rank=table["effect"].rank(ascending=False, method="first").astype(int),
    )


def _mlp_fits(model: Model, task: PairTask, heads: Sequence[str], seed: int) -> pd.DataFrame:
    """Each MLP's write along the answer's direction, regressed on what the heads before it write there.

    `r2` is out of sample (one prompt left out at a time), `intercept` the part that is there whatever heads write
    (in logits, with its bootstrap interval), `gain` the coefficient of the heads' sum. `control_*` take another
    prompt's answer and foil as the direction.
    """
    found = direct_logit_attribution(model, task, by="head", seed=seed)
    turned = np.roll(np.arange(len(task)), 1).tolist()
    clash = [row for row in range(len(task)) if bool((task.answers[row] == task.foils[turned[row]]).any())]
    other = replace(task, answers=task.answers[turned], foils=task.foils[turned])
    control = direct_logit_attribution(model, other, by="head", seed=seed)
    rows = []
    for layer in range(model.spec.n_layers):
        before = [head for head in heads if Head.parse(head).layer <= layer]
        name = f"L{layer}.mlp"
        if not before or name not in found.nodes:
            continue
        row: dict[str, Any] = {
            "node": name,
            "layer": layer,
            "heads": " ".join(before),
            "n": len(task),
            "same": len(clash),
        }
        for prefix, one in (("", found), ("control_", control)):
            row |= {f"{prefix}{key}": value for key, value in _fit(one, name, before, seed).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _fit(found: LogitAttribution, name: str, heads: Sequence[str], seed: int) -> dict[str, float]:
    place = {node: at for at, node in enumerate(found.nodes)}
    y, x = found.values[:, place[name]], found.values[:, [place[head] for head in heads]]
    own, total = _with_one(x), _with_one(x.sum(1, keepdims=True))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(499):
        pick = rng.integers(len(y), size=len(y))
        drawn.append(_solve(total[pick], y[pick]))
    intercept, gain = _solve(total, y)
    low, high = np.percentile(np.array(drawn), [2.5, 97.5], axis=0)
    # Left-out residuals in closed form: residual / (1 - leverage).
    leverage = np.einsum("ij,ji->i", own, np.linalg.pinv(own))
    left_out = (y - own @ _solve(own, y)) / np.clip(1 - leverage, 1e-6, None)
    r2 = 1 - float((left_out**2).sum() / ((y - y.mean()) ** 2).sum()) if y.std() > 0 else float("nan")
    return {
        "written": float(y.mean()), "r2": r2, "intercept": float(intercept), "intercept_low": float(low[0]),
        "intercept_high": float(high[0]), "gain": float(gain), "gain_low": float(low[1]), "gain_high": float(high[1]),
    }  # fmt: skip


def _with_one(x: Array) -> Array:
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


def _solve(x: Array, y: Array) -> Array:
    found: Array = np.asarray(np.linalg.lstsq(x, y, rcond=None)[0], dtype=np.float64)
    return found


def _last_layer(bench: Bench, asked: Recall, task: PairTask) -> dict[str, pd.DataFrame]:
    """Log p of the answer before and after the last layers, and what taking parts of the last one away does.

    Heads whose removal raises it on the first half of the prompts are removed together on the other half, against the
    other heads of the layer, and prose is read under the same edits.
    """
    model = bench.model
    assert model.tokenizer is not None
    lens = logit_lens(model, task, middle=True, seed=asked.seed)
    path = pd.DataFrame(
        [
            {"stage": stage, "at": at, **interval_row(np.log(lens.probability["answer"][:, at, 0] + 1e-30), asked.seed)}
            for at, stage in enumerate(lens.stages)
        ]
    )
    half, last = len(task) // 2, model.spec.n_layers - 1
    search, trial = task.select(range(half)), task.select(range(half, len(task)))
    heads = [head for head in model.spec.heads() if head.layer == last]
    before = _log_p(model, search, [])[0]
    single = {head: float((_log_p(model, search, [ablate([head])])[0] - before).mean()) for head in heads}
    against = [head for head in heads if single[head] > 0]
    rest = [head for head in heads if single[head] <= 0]
    mlp = patch("mlp_out", torch.zeros(model.spec.d_model), layer=last)
    sets: dict[str, list[Edit]] = {"MLP": [mlp], "all heads": [ablate(heads)]}
    if against:
        sets = {"heads against": [ablate(against)], "heads against, MLP": [ablate(against), mlp], **sets}
    if rest:
        sets["other heads"] = [ablate(rest)]
    text = next(
        iter(text_domains(model.tokenizer, ["prose"], asked.texts, asked.length, PROBE_SEED + asked.seed).values())
    )
    bench.note([text])
    plain = _log_p(model, trial, []), _losses(model, text.batch, [])
    rows = []
    for name, edits in sets.items():
        log_p, first = _log_p(model, trial, edits)
        changes = {
            "log p of the answer": log_p - plain[0][0],
            "answer first": first - plain[0][1],
            "loss on prose": _losses(model, text.batch, edits) - plain[1],
        }
        for measure, change in changes.items():
            rows.append(
                {
                    "removed": name, "nodes": " ".join(map(str, against if "against" in name else [])),
                    "measure": measure, **interval_row(change, asked.seed),
                    "p": float(sign_flip_p(change[None].astype(float), asked.seed)[0]),
                }
            )  # fmt: skip
    return {"answer_path": path, "last_layer": pd.DataFrame(rows)}


def _log_p(model: Model, task: PairTask, edits: Sequence[Edit]) -> tuple[Array, Array]:
    """Log p of the answer and whether it is the most likely token, prompt by prompt."""
    logits = model.trace(task.clean, edits=list(edits), logits=task.position[:, None].cpu()).logits
    assert logits is not None
    rows = logits[:, 0].float().cpu()
    first = (rows.argmax(-1)[:, None] == task.answers.cpu()).any(1)
    return task.score(rows, "log_probability").double().numpy(), first.double().numpy()


def _losses(model: Model, batch: Any, edits: Sequence[Edit]) -> Array:
    """Mean loss of each prompt of prose."""
    loss = model.trace(batch, edits=list(edits), loss=True).loss
    assert loss is not None
    found: Array = torch.nanmean(loss.double().cpu(), 1).numpy()
    return found


RECALL = (
    Measurement(
        "factual_recall", 1, "recall of a fact, step by step", Recall, _recall,
        ("topic_heads", "mlp_fits", "answer_path", "last_layer"), ("topic_heads", "last_layer"),
    ),
)  # fmt: skip
