"""A trace in plain data, as it is sent: which prompts together, what to read and write in each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import StatisticsRequest
from workbench.models import Batch, Head
from workbench.tracing.edits import Ablation, Patch
from workbench.tracing.plan import Plan
from workbench.tracing.sites import Site
from workbench.tracing.statistics import Statistic, value_mass

# Statistics of z and v that the server takes itself.
NORMS = ("output_norm", "result_norm", "value_norm")
PATCHED: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "z")


class Group:
    """Prompts of one length, without their padding."""

    def __init__(self, batch: Batch, rows: list[int]) -> None:
        self.rows = rows
        self.tokens = int(batch.lengths[rows[0]])
        self.starts = batch.starts[torch.tensor(rows)].cpu()
        self.ids = self.cut(batch.ids.cpu())

    def cut(self, given: Tensor) -> Tensor:
        """`[prompt, token, ...]` of the batch at these prompts' own tokens."""
        columns = self.starts[:, None] + torch.arange(self.tokens)
        return given.cpu()[torch.tensor(self.rows)[:, None], columns]

    def value(self, given: Tensor) -> Tensor:
        """The same of a value that may have been expanded over prompts and tokens: sent once."""
        if given.stride(0) == 0 and given.stride(1) == 0:
            return given[:1, :1].cpu().clone()
        return self.cut(given)

    def positions(self, wanted: Tensor) -> Tensor:
        """Columns of the batch, counted from each prompt's first token; those in the padding at its edge."""
        return (wanted[torch.tensor(self.rows)] - self.starts[:, None]).clamp(0, self.tokens - 1)


def plain_plan(
    plan: Plan,
    paths: Sequence[Mapping[str, Any]],
    group: Group,
    wanted: Tensor | None,
    loss: bool,
    means: Mapping[int, list[int]] | None = None,
) -> dict[str, Any]:
    """The trace of one group of prompts; `means` are heads whose mean z is wanted, by layer."""
    request = _request(plan, group)
    norms = [s.name for s in plan.statistics if s.name in NORMS]
    layers = []
    for path in paths:
        index = path["index"]
        sites, patches = plan.captured(index), _patches(plan, index, group)
        own_means = (means or {}).get(index, [])
        reads_z = bool(norms or own_means) or "z" in sites or "z" in patches
        layer = dict(path) | {
            "sites": sites,
            "patches": patches,
            "means": own_means,
            "reads_z": reads_z,
            "attends": reads_z or request is not None or bool({"q", "k", "v", "pattern"} & set(sites)),
            "touched": plan.touches_residual(index),
        }
        if layer["attends"] or layer["touched"]:
            layers.append(layer)
    return {
        "layers": layers,
        "request": request,
        "norms": norms,
        "start": torch.zeros(len(group.rows), dtype=torch.long),
        "end": torch.full((len(group.rows),), group.tokens),
        "ids": group.ids,
        "logits": None if wanted is None else group.positions(wanted),
        "loss": loss,
    }


def refuse(plan: Plan) -> None:
    """What the server's side of a trace does not do, by name."""
    for statistic in plan.statistics:
        if statistic.name in NORMS:
            continue
        if statistic.of_values is not None and statistic.of_values is not value_mass("").of_values:
            raise RequestError(
                f"{statistic.name!r} applies a function of yours to values, which does not run remotely."
            )
        if statistic.request.output or statistic.needs_result_factor:
            raise RequestError(
                f"{statistic.name!r} is read off z, which does not leave the server; of z there are {', '.join(NORMS)}."
            )
    if any(site == "result" for site, _ in plan.sites):
        raise RequestError("Site 'result' needs the model's weights on this machine; take 'z', or load the model here.")
    for patch in plan.patches:
        if patch.site not in PATCHED:
            raise RequestError(f"patch({patch.site!r}) does not run remotely; there are {', '.join(PATCHED)}.")


def merged(statistics: Sequence[Statistic]) -> StatisticsRequest:
    """What the kernels' fields must serve, norms left out."""
    wanted = [statistic.request for statistic in statistics if statistic.name not in NORMS]
    return reduce(lambda a, b: a | b, wanted, StatisticsRequest())


def _request(plan: Plan, group: Group) -> dict[str, Any] | None:
    """The request in plain data; None where no statistic needs one."""
    asked = [statistic for statistic in plan.statistics if statistic.name not in NORMS]
    if not asked:
        return None
    given: dict[str, list[Tensor]] = {"key_features": [], "query_keys": [], "query_weights": []}
    for statistic in asked:
        for name, parts in given.items():
            columns = getattr(statistic, name)
            if columns is not None:
                parts.append(group.cut(columns))
    if given["query_keys"]:
        keys = torch.cat(given["query_keys"], dim=-1)
        given["query_keys"] = [torch.where(keys >= 0, keys - group.starts[:, None, None], -1)]
    joined = {name: torch.cat(parts, dim=-1) if parts else None for name, parts in given.items()}
    weights = joined["query_weights"]
    joined["query_weights"] = None if weights is None else weights.transpose(1, 2)
    norms = sum(statistic.of_values is not None for statistic in asked)
    return asdict(merged(asked)) | joined | {"value_norms": norms}


def _patches(plan: Plan, layer: int, group: Group) -> dict[str, list[dict[str, Any]]]:
    """Edits of one layer, in the order in which they act: ablations, then patches."""
    found: dict[str, list[dict[str, Any]]] = {}
    for ablation in plan.ablations:
        for head in ablation.in_layer(layer):
            zero = ablation.how == "zero"
            value = torch.zeros(1, 1, 1, 1) if zero else group.value(_values(ablation)[head])[:, :, None]
            found.setdefault("z", []).append(_one(ablation, [head.head], value, group, ablation.strength))
    for patch in plan.patches_at(layer, *PATCHED):
        heads = None if patch.heads is None else list(patch.heads)
        found.setdefault(patch.site, []).append(_one(patch, heads, group.value(patch.value), group, 1.0))
    return found


def _values(ablation: Ablation) -> Mapping[Head, Tensor]:
    assert ablation.values is not None
    return ablation.values


def _one(
    edit: Ablation | Patch, heads: list[int] | None, value: Tensor, group: Group, strength: float
) -> dict[str, Any]:
    positions = None if edit.positions is None else group.cut(edit.positions)
    return {"heads": heads, "value": value, "positions": positions, "strength": strength}


def lengths(batch: Batch) -> Iterator[list[int]]:
    """Numbers of the prompts of each length."""
    lengths = batch.lengths.cpu()
    for count in torch.unique(lengths).tolist():
        yield (lengths == count).nonzero().flatten().tolist()
