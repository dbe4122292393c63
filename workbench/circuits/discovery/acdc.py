"""ACDC: cut edges one by one, from the logits back, wherever the loss hardly rises (Conmy et al. 2023, 2304.14997).

Readers are visited in reverse topological order.  Each of their edges is cut in turn (what the writer says along it
is replaced), and stays cut if the loss rises by no more than the threshold.  A part whose outgoing edges have all
been cut is never visited.  Results depend on the order of a reader's edges, on the loss and on the replacement, so
all three are settings; the loss is lower-is-better, so that edges that hurt are cut, and negative heads lost.

Thresholds are swept side by side: at each edge all of them are decided in one forward of as many masks, which skips
the layers before the first cut.  A run costs at most as many forwards as the graph has edges, and one more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.circuits.discovery.edgewise import Edgewise
from workbench.circuits.discovery.found import Found, Progress, chosen
from workbench.circuits.forks import Ablation
from workbench.circuits.graph import Graph
from workbench.circuits.recorded import Metric
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

Order = Literal["normal", "reverse"]
# The published grid of most tasks: 10^-4 to 1.
THRESHOLDS = tuple(float(one) for one in 10 ** np.linspace(-4, 0, 21))
# A rise of the loss by less than this share of its own size (and of 1) is rounding.
ROUNDING = 2e-6
_COLUMNS = ("writer", "reader", "threshold", "change", "loss", "cut")


@dataclass(eq=False)
class Decisions:
    """What was decided so far; hand it to `acdc` again to go on where it ended."""

    rows: list[tuple[int, int, float, float, float, bool]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def table(self, graph: Graph) -> pd.DataFrame:
        """One row a decision, in the order in which they were made."""
        table = pd.DataFrame(self.rows, columns=list(_COLUMNS))
        table.insert(0, "source", [graph.writers[place] for place in table.writer])
        table.insert(1, "target", [graph.readers[place][0] for place in table.reader])
        table.insert(2, "through", [graph.readers[place][1] for place in table.reader])
        return table.drop(columns=["writer", "reader"])


def acdc(
    model: Model,
    task: PairTask,
    *,
    threshold: float | Sequence[float] = THRESHOLDS,
    order: Order | str = "reverse",
    loss: Literal["kl", "metric"] | str = "kl",
    metric: str | Metric | None = None,
    ablation: Ablation | str = "patching",
    seed: int = 0,
    decisions: Decisions | None = None,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> Found:
    """Circuits at one threshold or many; an edge's score is the largest threshold at which it is kept, else 0.

    `order` is that of a reader's writers: "normal" from the embedding on, "reverse" from the last. `circuits` has one
    for each threshold, `circuit` that of a single one, `log` every decision. An interruption from the keyboard leaves
    the circuits as they are then, edges not yet visited being kept; `decisions`, filled on the way, takes the run up
    again. `seed` changes nothing.
    """
    thresholds = _checked(threshold, order)
    began = time.perf_counter()
    sight = Edgewise(model, task, ablation, loss, metric, memory_limit)
    log = Decisions() if decisions is None else decisions
    about = {"task": task.hash, "order": order, "loss": sight.label, "ablation": ablation, "thresholds": thresholds}
    if log.about and log.about != about:
        changed = ", ".join(name for name in about if about[name] != log.about.get(name))
        raise RequestError(f"These decisions were made with other settings ({changed}); begin with new ones.")
    log.about |= about
    search = _Search(sight, thresholds, order, log)
    note = search.run(progress)
    graph, kept = sight.graph, search.kept.numpy()
    survives = np.where(kept, np.array(thresholds)[:, None, None], 0.0).max(0)
    circuits = {one: chosen(graph, kept[place], f"acdc {one:.3g}", task) for place, one in enumerate(thresholds)}
    return Found(
        graph, "acdc", task.name, sight.label, len(task), seed,
        edges=np.where(graph.exists, survives, np.nan), ablation=ablation,
        notes=tuple(filter(None, [f"{order} order; scores are thresholds", note])),
        work=sight.work, seconds=time.perf_counter() - began, clean=sight.clean, corrupt=sight.corrupt,
        circuit=circuits[thresholds[0]] if len(thresholds) == 1 else None, circuits=circuits, log=log.table(graph),
        tensors={"loss": search.loss.double().cpu().numpy()},
    )  # fmt: skip


def _checked(threshold: float | Sequence[float], order: str) -> tuple[float, ...]:
    given = (threshold,) if isinstance(threshold, int | float) else tuple(threshold)
    if not given or any(not np.isfinite(one) or one < 0 for one in given) or len(set(given)) < len(given):
        raise RequestError(f"threshold={threshold}: give one or more different ones, each 0 or more.")
    if order not in ("normal", "reverse"):
        raise RequestError(f"order={order!r} is unknown; choose 'normal' or 'reverse'.")
    return tuple(float(one) for one in given)


class _Search:
    """One lane a threshold; `kept` is `[lane, writer, reader]`, `loss` what each lane's circuit costs now."""

    def __init__(self, sight: Edgewise, thresholds: tuple[float, ...], order: str, log: Decisions) -> None:
        self.sight, self.thresholds, self.order, self.log = sight, thresholds, order, log
        self.graph = sight.graph
        exists = torch.as_tensor(self.graph.exists)
        self.kept: Bool[Tensor, "lane writer reader"] = exists.repeat(len(thresholds), 1, 1)
        self.loss: Float[Tensor, " lane"] = torch.zeros(len(thresholds), dtype=torch.float64)
        self._begun = False

    def run(self, progress: Progress | None) -> str:
        """Visit everything; a note if it was cut short."""
        replayed = self._replay()
        try:
            if not replayed:
                self.loss = self.sight.losses(self.kept[:1].float()).mean(1).repeat(len(self.thresholds))
            done = 0
            for reader in reversed(range(len(self.graph.readers))):
                done = self._reader(reader, replayed, done, progress)
        except KeyboardInterrupt:
            return f"interrupted after {len(self.log.rows)} decisions; edges not visited are kept"
        return ""

    def _replay(self) -> set[tuple[int, int]]:
        """Do again what was decided before; the edges that need no visit."""
        lane = {one: place for place, one in enumerate(self.thresholds)}
        for writer, reader, threshold, _, loss, cut in self.log.rows:
            self.loss[lane[threshold]] = loss
            if cut:
                self.kept[lane[threshold], writer, reader] = False
        return {(writer, reader) for writer, reader, *_ in self.log.rows}

    def _reader(self, reader: int, replayed: set[tuple[int, int]], done: int, progress: Progress | None) -> int:
        writers = np.flatnonzero(self.graph.exists[:, reader]).tolist()
        after = self.graph.feeds(reader)
        alive = self.kept[:, list(after)].flatten(1).any(1) if after else torch.ones(len(self.kept), dtype=torch.bool)
        # Nobody reads what this reader's node writes: its edges go unvisited.
        self.kept[~alive, :, reader] = False
        for writer in writers if self.order == "normal" else reversed(writers):
            if (writer, reader) not in replayed and bool(alive.any()):
                self._decide(writer, reader, alive.nonzero().flatten())
            done += 1
            if progress is not None:
                progress(done, self.graph.count)
        return done

    def _decide(self, writer: int, reader: int, lanes: Tensor) -> None:
        trial = self.kept[lanes].clone()
        trial[:, writer, reader] = False
        # Lanes with equal circuits are run once.
        masks, which = torch.unique(trial.flatten(1), dim=0, return_inverse=True)
        found = self.sight.losses(masks.view(-1, *trial.shape[1:]).float()).mean(1)[which]
        rows = []
        for lane, new in zip(lanes.tolist(), found.tolist(), strict=True):
            old, threshold = float(self.loss[lane]), self.thresholds[lane]
            cut = new - old <= threshold + ROUNDING * max(1.0, abs(old))
            rows.append((writer, reader, threshold, new - old, new if cut else old, cut))
        # All lanes of an edge or none, so that an interruption leaves whole decisions.
        for lane, row in zip(lanes.tolist(), rows, strict=True):
            self.loss[lane] = row[4]
            self.kept[lane, writer, reader] = not row[5]
        self.log.rows += rows
