"""What came back from the server, put into a `Trace` as if the model had run here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import AttentionStatistics, StatisticsRequest
from workbench.models import AttentionCall, LayerSpec
from workbench.tracing.plan import Plan
from workbench.tracing.remote.request import NORMS, Group, merged
from workbench.tracing.statistics import Measured, Statistic
from workbench.tracing.trace import Trace


class Reader:
    """Puts one group's results into the trace."""

    def __init__(self, plan: Plan, group: Group, trace: Trace, found: dict[Any, Any]) -> None:
        self.plan, self.group, self.trace, self.found = plan, group, trace, found

    def read(self) -> None:
        """Statistics, sites, logits and losses, at these prompts' places."""
        request, widest = merged(self.plan.statistics), max(one.heads for one in self.trace.spec.layers)
        for layer in self.trace.spec.layers:
            fields = {name: x for (kind, name, at), x in self.found.items() if (kind, at) == ("field", layer.index)}
            call = _shape_of_call(layer, len(self.group.rows), self.group.tokens)
            taken = {"features": 0, "at_keys": 0, "column_weighted": 0, "value_features": 0}
            for statistic in self.plan.statistics:
                value = _value(statistic, fields, request, call, taken)
                self._statistic(statistic, layer.index, value, widest)
        for (kind, name, layer), value in self.found.items():
            if kind == "site":
                self._place(self._site(name, layer, value), value, (0, 1) if name != "pattern" else (2, 3))
        for name in ("logits", "loss"):
            if ("end", name, 0) in self.found:
                self._end(name, self.found["end", name, 0])

    def _statistic(self, statistic: Statistic, layer: int, value: Tensor, heads: int) -> None:
        trace, group = self.trace, self.group
        on_tokens = statistic.axis in ("query", "key")
        axes = 2 if statistic.axis == "block" else 1
        if statistic.name not in trace.values:
            wide = trace.batch.ids.shape[1]
            places = (wide,) if axes == 1 else (-(-wide // statistic.request.block),) * 2
            shape = (len(trace.batch), trace.spec.n_layers, heads, *places, *value.shape[2 + axes :])
            nothing = -1 if statistic.integer else float("nan")
            kind = torch.int64 if statistic.integer else torch.float32
            trace.values[statistic.name] = torch.full(shape, nothing, dtype=kind)
        for number, row in enumerate(group.rows):
            start = int(group.starts[number]) if on_tokens else 0
            own = value[number]
            if statistic.integer:
                own = torch.where(own >= 0, own + int(group.starts[number]), -1)
            place = trace.values[statistic.name][row, layer, : own.shape[0]]
            inside = (slice(None), *(slice(start, start + size) for size in own.shape[1 : 1 + axes]))
            place[inside] = own

    def _site(self, name: Any, layer: int, value: Tensor) -> Tensor:
        trace = self.trace
        wide = trace.batch.ids.shape[1]
        if (name, layer) not in trace.sites:
            shape = [len(trace.batch), *value.shape[1:]]
            for axis in (2, 3) if name == "pattern" else (1,):
                shape[axis] = wide
            trace.sites[name, layer] = torch.zeros(shape)
        return trace.sites[name, layer]

    def _place(self, whole: Tensor, value: Tensor, axes: tuple[int, ...]) -> None:
        for number, row in enumerate(self.group.rows):
            start = int(self.group.starts[number])
            own = slice(start, start + self.group.tokens)
            if axes == (2, 3):
                whole[row, :, own, own] = value[number]
            else:
                whole[row, own] = value[number]

    def _end(self, name: str, value: Tensor) -> None:
        trace, group = self.trace, self.group
        if name == "logits":
            if trace.logits is None:
                trace.logits = torch.zeros(len(trace.batch), *value.shape[1:])
            trace.logits[torch.tensor(group.rows)] = value
            return
        if trace.loss is None:
            trace.loss = torch.full((len(trace.batch), trace.batch.ids.shape[1] - 1), float("nan"))
        for number, row in enumerate(group.rows):
            start = int(group.starts[number])
            trace.loss[row, start : start + group.tokens - 1] = value[number]


def _value(
    statistic: Statistic, fields: dict[str, Tensor], request: StatisticsRequest, call: AttentionCall, taken: Any
) -> Tensor:
    """One statistic of one layer, read off what the server found as off a kernel's results."""
    if statistic.name in NORMS:
        return fields[statistic.name]
    own: dict[str, Tensor | None] = {}
    given = {"features": statistic.key_features, "at_keys": statistic.query_keys,
             "column_weighted": statistic.query_weights}  # fmt: skip
    for name, columns in given.items():
        count = 0 if columns is None else columns.shape[-1]
        axis = 2 if name == "column_weighted" else -1
        own[name] = fields[name].narrow(axis, taken[name], count) if count else None
        taken[name] += count
    weighted, of_values = own["column_weighted"], None
    if statistic.of_values is not None:
        of_values = fields["value_features"][..., :1]
    known = {name: x for name, x in fields.items() if name in AttentionStatistics.__dataclass_fields__}
    measured = Measured(
        found=AttentionStatistics(**known),
        request=request,
        call=call,
        features=own["features"],
        at_keys=own["at_keys"],
        result_factor=None,
        weighted=None if weighted is None else weighted.transpose(2, 3),
        of_values=of_values,
    )
    return statistic.read(measured)


class _Elsewhere(Tensor):
    """A tensor that is on the server: its shape is known here, and nothing can be computed of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _KNOWN:
            raise RequestError("A statistic looks at q, k or v itself, which stay on the server; load the model here.")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


_KNOWN = frozenset(getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim", "layout"))
_KNOWN |= {Tensor.__len__, Tensor.size, Tensor.dim}


def _shape_of_call(layer: LayerSpec, prompts: int, tokens: int) -> AttentionCall:
    """An attention call without its numbers."""
    q, k = (torch.empty(prompts, heads, tokens, 0).as_subclass(_Elsewhere) for heads in (layer.heads, layer.kv_heads))
    return AttentionCall(layer.index, q, k, k, layer.scale, layer.window, layer.softcap)
