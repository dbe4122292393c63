"""What one trace found: statistics, sites, logits and losses of a batch, padding marked."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Batch, Spec
from workbench.models.memory import Prediction
from workbench.models.snippet import snippet
from workbench.tracing.sites import Site, parse_site
from workbench.tracing.statistics import Statistic

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# Results of layers on their way from the device at once.
IN_FLIGHT = 24
# Rows of logits whose losses are taken together.
LOSS_ROWS = 512


@dataclass(repr=False)
class Trace:
    """The results of `Model.trace`, on the CPU.

    `trace["entropy"]` is `[prompt, layer, head, query]` (`[..., key]` for column statistics, `[..., distance]` for
    diagonals, `[..., query_block, key_block]` for block maps), float32, NaN at padding and where a layer has fewer
    heads than others (keys and queries: int64, -1). `logits` are `[prompt, kept, vocab]` at `logit_positions`,
    without meaning at padding; `loss` is nats per token, `[prompt, token - 1]`, entry t for the token at t + 1. Sites
    hold what the model has there, in its own dtype, also at padding.
    """

    batch: Batch
    spec: Spec
    prediction: Prediction
    statistics: dict[str, Statistic] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    logits: Float[Tensor, "prompt kept vocab"] | None = None
    logit_positions: Int[Tensor, "prompt kept"] | None = None
    loss: Float[Tensor, "prompt token"] | None = None

    def __repr__(self) -> str:
        shape = f"{len(self.batch)} prompts of up to {self.batch.ids.shape[1]} tokens"
        held = [f"statistics {', '.join(self.values)}"] if self.values else []
        if self.sites:
            held.append(f"sites {', '.join(dict.fromkeys(site for site, _ in self.sites))}")
        held += [name for name in ("logits", "loss") if getattr(self, name) is not None]
        return f"<Trace of {shape}: {'; '.join(held) or 'nothing'}>"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise RequestError(self._no_statistic(name))
        return self.values[name]

    def _no_statistic(self, name: str) -> str:
        try:
            site, layer = parse_site(name)
        except (RequestError, TypeError):
            known = ", ".join(self.values) or "none"
            return f"No statistic {name!r} in this trace; it has {known}."
        held = [at for kind, at in sorted(self.sites) if kind == site and layer in (None, at)]
        if held:
            return f"{name!r} is a captured site, not a statistic; read it with .site({site!r}, {held[0]})."
        return (
            f"{name!r} is a site, not a statistic, and was not captured; trace with sites=[{name!r}], then read it "
            f"with .site({site!r}, {0 if layer is None else layer})."
        )

    def site(self, site: str, layer: int | None = None) -> Shaped[Tensor, ...]:
        """The captured value of a site, e.g. `site("z", 5)` or `site("blocks.5.attn.hook_z")`."""
        name, named = parse_site(site, self.spec)
        where = named if layer is None else layer
        if where is None or (name, where) not in self.sites:
            held = ", ".join(f"{s} of layer {n}" for s, n in sorted(self.sites)[:4]) or "no sites"
            raise RequestError(f"{site!r} of layer {where} was not captured; this trace holds {held}.")
        return self.sites[name, where]

    def mean(self, name: str, rows: Tensor | None = None) -> Float[Tensor, "prompt layer head *column"]:
        """Mean over positions, padding left out; `rows` `[prompt, token]` narrows them further."""
        values = self[name]
        if self.statistics[name].integer:
            raise RequestError(f"{name!r} holds keys, which have no mean.")
        if self.statistics[name].axis not in ("query", "key"):
            axes = " and ".join(self.statistics[name].axes)
            raise RequestError(f"{name!r} has no positions to take a mean over; its axes are {axes}. Read trace[name].")
        chosen = ~values.isnan()
        if rows is not None:
            narrowed = rows[:, None, None, :].to(torch.bool)
            chosen = chosen & narrowed.reshape(*narrowed.shape, *[1] * (values.ndim - 4))
        return torch.where(chosen, values, 0.0).sum(3) / chosen.sum(3)

    def means(self) -> dict[str, pd.DataFrame]:
        """By statistic of positions: layer, head and `value`, the mean over prompts and positions (no padding)."""
        import pandas as pd

        found = {}
        for name, statistic in self.statistics.items():
            if name not in self.values or statistic.integer or statistic.axis not in ("query", "key"):
                continue
            values = self.mean(name).nanmean(0)
            if values.ndim == 2:
                layer, head = torch.nonzero(~values.isnan(), as_tuple=True)
                numbers = values[layer, head].double().numpy()
                found[name] = pd.DataFrame({"layer": layer.numpy(), "head": head.numpy(), "value": numbers})
        return found

    def _repr_html_(self) -> str:
        """Means by head in short, for notebooks; `workbench.show` draws them."""
        import pandas as pd

        rows = []
        for name, table in self.means().items():
            ordered = table.sort_values("value", kind="stable")
            ends = [f"L{row.layer:.0f}H{row['head']:.0f}" for _, row in ordered.iloc[[0, -1]].iterrows()]
            low, high = ordered["value"].iloc[[0, -1]]
            rows.append((name, table["value"].mean(), low, ends[0], high, ends[1]))
        columns = ["statistic", "mean of heads", "lowest", "lowest head", "highest", "highest head"]
        return snippet(repr(self).strip("<>"), pd.DataFrame(rows, columns=columns))

    def dataset(self) -> xr.Dataset:
        """The statistics as labelled arrays, for saving and plotting."""
        import xarray as xr

        variables = {}
        for name, value in self.values.items():
            dims = ["prompt", "layer", "head", *self.statistics[name].axes]
            variables[name] = (dims + [f"{name}_column"] * (value.ndim - len(dims)), value.numpy())
        return xr.Dataset(variables)


class Collector:
    """Puts the pieces of a batch together: statistics into full arrays, sites into one tensor a layer."""

    def __init__(self, batch: Batch, spec: Spec, statistics: Sequence[Statistic], prediction: Prediction) -> None:
        self.trace = Trace(batch, spec, prediction, {s.name: s for s in statistics})
        self.rows = slice(0, len(batch))
        self._heads = max(layer.heads for layer in spec.layers)
        # Statistic -> first prompts and layers that something was written of.
        self._begun: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
        self._moving: deque[tuple[torch.cuda.Event, str, int, slice, Tensor, int]] = deque()

    def statistic(self, name: str, layer: int, value: Tensor, at: int = 0) -> None:
        """One layer of the prompts `rows`; `at` is the place on the first axis of positions."""
        if value.device.type != "cuda":
            self._write(name, layer, self.rows, value, at)
            return
        # Through page-locked memory, so that the device computes on while results move.
        staged = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        staged.copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._moving.append((arrived, name, layer, self.rows, staged, at))
        self._settle(IN_FLIGHT)

    def _settle(self, left: int) -> None:
        """Write results that have arrived, and wait until at most `left` are on their way."""
        while self._moving and (len(self._moving) > left or self._moving[0][0].query()):  # type: ignore[no-untyped-call]
            arrived, name, layer, rows, staged, at = self._moving.popleft()
            arrived.synchronize()
            self._write(name, layer, rows, staged, at)

    def _write(self, name: str, layer: int, rows: slice, value: Tensor, at: int) -> None:
        """One layer of a piece, and the mark of nothing where it has no heads or tokens."""
        statistic, batch = self.trace.statistics[name], self.trace.batch
        if name not in self.trace.values:
            axes = statistic.shape(batch.ids.shape[1])
            shape = (len(batch), self.trace.spec.n_layers, self._heads, *axes, *value.shape[2 + len(axes) :])
            self.trace.values[name] = torch.empty(shape, dtype=torch.int64 if statistic.integer else torch.float32)
        where = self.trace.values[name][rows, layer]
        heads, length, *rest = value.shape[1:]
        inside = (slice(None), slice(0, heads), slice(at, at + length), *(slice(0, size) for size in rest))
        if where[inside].shape != where.shape and (rows.start, layer) not in self._begun[name]:
            where.fill_(-1 if statistic.integer else float("nan"))
        self._begun[name].add((rows.start, layer))
        where[inside] = value

    def site(self, site: Site, layer: int, value: Tensor, at: int = 0) -> None:
        batch, key = self.trace.batch, (site, layer)
        if key not in self.trace.sites:
            shape = list(value.shape)
            shape[0] = len(batch)
            for axis in (2, 3) if site == "pattern" else (1,):
                shape[axis] = batch.ids.shape[1]
            self.trace.sites[key] = torch.zeros(shape, dtype=value.dtype)
        length, *rest = value.shape[1:]
        inside = (self.rows, slice(at, at + length), *(slice(0, size) for size in rest))
        self.trace.sites[key][inside] = value.cpu()

    def logits(self, logits: Tensor, kept: Tensor, wanted: Tensor) -> None:
        """Each prompt's own rows out of the kept ones."""
        place = torch.searchsorted(kept, wanted).to(logits.device)
        own = torch.gather(logits, 1, place[..., None].expand(-1, -1, logits.shape[-1])).float().cpu()
        self._all_logits(*own.shape[1:])[self.rows] = own

    def some_logits(self, logits: Tensor, places: Int[Tensor, " some"], slots: Int[Tensor, " some"], kept: int) -> None:
        """Of one prompt, the rows `places` of `logits`, as number `slots` of the `kept` that are wanted."""
        own = logits[0, places.to(logits.device)].float().cpu()
        self._all_logits(kept, logits.shape[-1])[self.rows.start, slots] = own

    def _all_logits(self, kept: int, vocabulary: int) -> Tensor:
        if self.trace.logits is None:
            self.trace.logits = torch.empty(len(self.trace.batch), kept, vocabulary)
        return self.trace.logits

    def loss(self, logits: Tensor, targets: Int[Tensor, "prompt target"], at: int = 0) -> None:
        """Negative log-probability of each next token from column `at` on, in float32, a few rows at a time."""
        trace = self.trace
        if trace.loss is None:
            trace.loss = torch.full((len(trace.batch), trace.batch.ids.shape[1] - 1), float("nan"))
        for row, scores, tokens in zip(trace.loss[self.rows], logits, targets, strict=True):
            for first in range(0, len(tokens), LOSS_ROWS):
                last = min(first + LOSS_ROWS, len(tokens))
                losses = torch.nn.functional.cross_entropy(
                    scores[first:last].float(), tokens[first:last], reduction="none"
                )
                row[at + first : at + last] = losses

    def finish(self) -> Trace:
        """Padding marked: NaN in statistics and losses, -1 in keys."""
        self._settle(0)
        trace, mask = self.trace, self.trace.batch.mask.cpu()
        # In the order asked for: those over queries of a prompt in chunks came last.
        trace.values = {name: trace.values[name] for name in trace.statistics if name in trace.values}
        for name, value in trace.values.items() if not mask.all() else ():
            statistic = trace.statistics[name]
            real = statistic.real(trace.batch)
            padding = ~real[:, None, None].expand(*value.shape[:3], *real.shape[1:])
            value[padding] = -1 if statistic.integer else float("nan")
        if trace.loss is not None:
            trace.loss[~(mask[:, 1:] & mask[:, :-1])] = float("nan")
        return trace
