"""Activation patching: an activation of one run put into the other, at every site, in both directions.

* *Denoising* runs the corrupt prompt with a clean activation: what is sufficient to restore the behaviour.
* *Noising* runs the clean prompt with a corrupt activation: what is necessary for it.

An OR of two parts shows each as sufficient and neither as necessary, an AND the reverse, so both are measured
(Heimersheim & Nanda 2024, arXiv 2404.15255; Zhang & Nanda 2023, arXiv 2309.16042). Results are exact: each is what
one edited pass gives. How the work is cut is said in `workbench.circuits.engine`; what was done is in
`Effects.route` and `Effects.work`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.circuits.blocks import Blocks, CannotRun
from workbench.circuits.budget import recorded_bytes, rows_at_once
from workbench.circuits.effects import DIRECTIONS, Direction, Effects, Work
from workbench.circuits.engine import Engine, chunks
from workbench.circuits.lanes import Lane, sort_out
from workbench.circuits.naive import naive_values
from workbench.circuits.recorded import (
    Group,
    Metric,
    OfRun,
    Recorded,
    Source,
    Values,
    first_difference,
    groups,
    metric_of,
    read_sites,
    record,
    starting_sites,
)
from workbench.circuits.spots import By, Change, PatchSite, scan
from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model
from workbench.tracing.sites import Site

Progress = Callable[[int, int], None]
Method = Literal["auto", "naive"]
_FAST = "from the changed layer and token on, many changes in one pass"
_log = logging.getLogger("workbench")


@dataclass(frozen=True)
class Options:
    """How patches are run; none of it changes a result.

    `rows_at_once` is the most tokens in one block call (by default what gains and fits), `memory_limit` the bytes
    allowed beyond the weights (what is free), `skip_unchanged` leaves out places where both runs are known to be the
    same. `method="naive"` runs one whole pass a change.
    """

    rows_at_once: int | None = None
    memory_limit: int | None = None
    method: Method = "auto"
    skip_unchanged: bool = True
    seed: int = 0


def patch_activations(
    model: Model,
    task: PairTask,
    site: PatchSite | str,
    by: By = "position",
    *,
    direction: Direction | Literal["both"] = "both",
    metric: str | Metric | None = None,
    layers: Iterable[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[int | str] | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Patch a site everywhere: by layer, by position, by head, by head and position, or by pattern entry.

    Args:
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v or pattern (or a hook of TransformerLens:
            `attn.hook_z`); k and v by KV head.
        by: "layer", "position", "head", "head_position", or "key" (entries of patterns).
        direction: "denoising", "noising" or both.
        metric: a name from `workbench.tasks.pairs.METRICS` (the task's own by default), or a function of logits
            `[row, vocab]` and the rows' prompts.
        layers, heads, positions: narrow the scan; positions may be the task's roles.

    Returns:
        `Effects` with the metric of every change on every prompt.

    Raises:
        MemoryRefused: before anything is allocated, where not even one prompt's patch fits.
    """
    changes = scan(model.spec, site, by, longest(task), layers=layers, heads=heads, positions=positions)
    return patch_changes(model, task, changes, direction=direction, metric=metric, options=options, progress=progress)


def patch_changes(
    model: Model,
    task: PairTask,
    changes: Sequence[Change],
    *,
    labels: Sequence[str] = (),
    direction: Direction | Literal["both"] = "both",
    metric: str | Metric | None = None,
    source: Source | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Effects:
    """Patch given changes, each of one spot or of several together (a set of heads, q and k of one head ...).

    `source` makes the values that are put in place; by default they are those of the other run.
    """
    options = options or Options()
    if not changes:
        raise RequestError("There is nothing to patch; name at least one change.")
    if any(not change for change in changes):
        raise RequestError("A change without spots patches nothing; leave it out.")
    for spot in dict.fromkeys(spot for change in changes for spot in change):
        spot.check(model.spec)
    chosen = DIRECTIONS if direction == "both" else (direction,)
    name, measure = metric_of(task, metric)
    runner = Runner(model, task, measure, options, progress, len(changes) * len(task) * len(chosen))
    values = {one: runner.values(changes, one, source) for one in chosen}
    return Effects(
        task.name, name, tuple(changes), values, runner.clean, runner.corrupt, tuple(labels), runner.route, runner.work,
        options.seed,
    )  # fmt: skip


def longest(task: PairTask) -> int:
    """Tokens of the longest prompt up to the one that is read: beyond it nothing can matter."""
    return int((task.position.cpu() - task.clean.starts.cpu()).max()) + 1


class Runner:
    """Runs changes of a task group by group and counts the work; falls back on whole passes where it must."""

    def __init__(
        self, model: Model, task: PairTask, metric: Metric, options: Options, progress: Progress | None, total: int
    ) -> None:
        self.model, self.task, self.metric, self.options = model, task, metric, options
        self.progress, self.total, self.done = progress, total, 0
        self.clean, self.corrupt = self._own(task.clean), self._own(task.corrupt)
        self.work, self.route = Work(), _FAST

    def _own(self, batch: Batch) -> Float[np.ndarray, " prompt"]:
        logits = self.model.trace(batch, logits=self.task.position[:, None].cpu()).logits
        assert logits is not None
        return self.metric(logits[:, 0], torch.arange(len(batch))).double().cpu().numpy()

    def values(
        self, changes: Sequence[Change], direction: Direction, source: Source | None
    ) -> Float[np.ndarray, "change prompt"]:
        """The metric under each change."""
        receiving, other = (
            (self.task.corrupt, self.task.clean) if direction == "denoising" else (self.task.clean, self.task.corrupt)
        )
        own = self.corrupt if direction == "denoising" else self.clean
        if self.options.method != "naive":
            try:
                return self._fast(changes, receiving, other, own, source)
            except CannotRun as reason:
                if source is not None:
                    raise RequestError(f"{self.model.spec.architecture}: {reason}, which this needs.") from None
                self.route = f"one whole edited pass a change: {reason}"
                _log.warning("Patching runs %s.", self.route)
        else:
            self.route = "one whole edited pass a change, as asked"
        if source is not None:
            raise RequestError("Values of one's own have no naive form; leave method='auto'.")
        found = naive_values(self.model, self.task, changes, receiving, other, self.metric)
        rows = len(changes) * int(receiving.mask.sum()) * self.model.spec.n_layers
        self.work += Work(rows, rows, len(changes) * len(self.task))
        return found

    def _fast(
        self, changes: Sequence[Change], receiving: Batch, other: Batch, own: np.ndarray, source: Source | None
    ) -> Float[np.ndarray, "change prompt"]:
        values = np.full((len(changes), len(self.task)), np.nan)
        for group in groups(self.task):
            self._group(group, changes, receiving, other, own, source, values)
        return values

    def _group(
        self,
        group: Group,
        changes: Sequence[Change],
        receiving: Batch,
        other: Batch,
        own: np.ndarray,
        source: Source | None,
        values: np.ndarray,
    ) -> None:
        """Prompts of one length: record both runs, sort out lanes, run them."""
        rows, base, found = self._recorded(group, changes, receiving, other, source)
        engine = self._engine(group, base)
        same = first_difference(base.batch, found.batch) if self.options.skip_unchanged else _none_same(base)
        put: Values = OfRun(found, same) if source is None else source.values(group, engine.blocks, base, found)
        engine.values = put
        job = sort_out(changes, self.task, group, engine.values.same_before, engine.last)
        where = group.prompts.numpy()
        values[:, where] = np.where(job.exists.numpy(), own[where], np.nan)

        def finish(lanes: list[Lane], logits: Tensor) -> None:
            prompts = torch.cat([group.prompts[lane.prompts] for lane in lanes])
            scores = self.metric(logits, prompts).double().cpu().numpy()
            at = 0
            for lane in lanes:
                count = len(lane.prompts)
                values[lane.change, group.prompts[lane.prompts].numpy()] = scores[at : at + count]
                at += count
            self._tell(at)

        for chunk in chunks(job.lanes, rows):
            with torch.no_grad():
                engine.run(chunk, finish)
        self._tell(job.unchanged)
        runs = int(job.exists.sum())
        naive = runs * group.tokens * self.model.spec.n_layers
        self.work += Work(engine.blocks.rows, naive, runs, job.unchanged)

    def _recorded(
        self, group: Group, changes: Sequence[Change], receiving: Batch, other: Batch, source: Source | None
    ) -> tuple[int, Recorded, Recorded]:
        """How many rows run together, and both runs."""
        model, limit = self.model, self.options.memory_limit
        read = read_sites(changes) | (source.sites if source is not None else frozenset())
        base_sites: set[tuple[Site, int]] = set(starting_sites(model)) | read
        prompts = len(group.prompts)
        held = sum(recorded_bytes(model, sites, prompts, group.tokens) for sites in (base_sites, read))
        explicit = any(site == "pattern" for site, _ in read) or any(
            spot.site == "mask" for change in changes for spot in change
        )
        rows = rows_at_once(model, held, prompts, group.tokens, self.options.rows_at_once, limit, explicit)
        base = record(model, group.cut(receiving), base_sites, limit)
        return rows, base, record(model, group.cut(other), read, limit)

    def _engine(self, group: Group, base: Recorded) -> Engine:
        blocks = Blocks(self.model.attachment, group.tokens)
        engine = Engine(self.model.attachment, blocks, base, OfRun(base, _none_same(base)))
        with torch.no_grad():
            engine.check()
        return engine

    def _tell(self, runs: int) -> None:
        self.done += runs
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


def _none_same(base: Recorded) -> Tensor:
    return torch.zeros(len(base.batch), dtype=torch.long)
