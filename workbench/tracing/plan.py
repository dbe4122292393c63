"""Captures and edits compiled into one plan for a forward pass: which hooks, which statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import StatisticsRequest, workspace_bytes
from workbench.models import Attachment, Batch, Spec
from workbench.models.memory import BodyCost, Prediction
from workbench.tracing.edits import Ablation, Edit, Patch
from workbench.tracing.sites import ATTENTION_SITES, SITES, Site, parse_site
from workbench.tracing.statistics import Statistic

# Explicit patterns are O(N^2): a display, not a measurement.
PATTERN_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What one trace does, independent of the prompts."""

    statistics: tuple[Statistic, ...]
    request: StatisticsRequest
    sites: frozenset[tuple[Site, int]]
    ablations: tuple[Ablation, ...]
    patches: tuple[Patch, ...]

    @staticmethod
    def compile(
        spec: Spec, statistics: Sequence[Statistic], sites: Sequence[str], edits: Sequence[Edit]
    ) -> Plan:
        names = [statistic.name for statistic in statistics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RequestError(f"Two statistics are called {twice[0]!r}; give each its own name.")
        for edit in edits:
            edit.check(spec)
        request = reduce(lambda a, b: a | b, (s.request for s in statistics), StatisticsRequest())
        return Plan(
            tuple(statistics),
            request,
            _expand_sites(spec, sites),
            tuple(edit for edit in edits if isinstance(edit, Ablation)),
            tuple(edit for edit in edits if isinstance(edit, Patch)),
        )

    def captured(self, layer: int, kinds: frozenset[Site] | None = None) -> list[Site]:
        """Sites to store in a layer, in order of the forward pass."""
        return [s for s in SITES if (s, layer) in self.sites and (kinds is None or s in kinds)]

    def patches_at(self, layer: int, *sites: Site) -> list[Patch]:
        return [patch for patch in self.patches if patch.layer == layer and patch.site in sites]

    def touches_residual(self, layer: int) -> bool:
        outside = frozenset(SITES) - ATTENTION_SITES
        return bool(self.captured(layer, outside)) or any(
            patch.layer == layer and patch.site in outside for patch in self.patches
        )


def _expand_sites(spec: Spec, sites: Sequence[str]) -> frozenset[tuple[Site, int]]:
    chosen: set[tuple[Site, int]] = set()
    for text in sites:
        site, layer = parse_site(text, spec)
        check_exists(site, spec)
        chosen |= {(site, i) for i in (range(spec.n_layers) if layer is None else [layer])}
    return frozenset(chosen)


def predict(
    attachment: Attachment,
    cost: BodyCost,
    plan: Plan,
    batch: Batch,
    piece: Batch,
    kept: Int[Tensor, " kept"] | None,
    wanted: Int[Tensor, "prompt kept"] | None,
    loss: bool,
) -> Prediction:
    """Bytes beyond the weights that this trace will hold at its peak; `piece` is the largest of the batch's parts."""
    spec, element = attachment.spec, torch.finfo(attachment.dtype).bits // 8
    prompts, tokens = piece.ids.shape
    attention = max(
        (
            _attention_bytes(plan, spec, layer, prompts, tokens, element, attachment.device.type)
            for layer in range(spec.n_layers)
        ),
        default=0,
    )
    rows = prompts * (tokens if kept is None else len(kept))
    # Losses are taken 512 rows at a time, in float32: the rows, their log-probabilities, a gradient-free copy.
    chunk = 2 * 4 * spec.vocab_size * min(rows, 512) if loss else 0
    gathered = 0 if wanted is None else prompts * wanted.shape[1] * spec.vocab_size * (element + 4)
    held = 0 if wanted is None else len(batch) * wanted.shape[1] * spec.vocab_size * 4
    return Prediction(
        body=int(cost.peak(prompts * tokens)),
        attention=int(cost.at_attention(prompts * tokens)) + attention,
        logits=rows * spec.vocab_size * element
        + 2 * prompts * tokens * spec.d_model * element
        + chunk
        + gathered,
        stored=_stored_bytes(plan, spec, batch, element) + held,
    )


def _attention_bytes(
    plan: Plan, spec: Spec, layer: int, prompts: int, tokens: int, element: int, device: str
) -> int:
    """What one layer's attention takes beyond its q, k and v: outputs, float32 copies, and the block buffers."""
    shape = spec.layers[layer]
    rows = prompts * shape.heads * tokens
    output = rows * shape.head_dim
    window = shape.window if shape.window is not None and shape.window < tokens else None
    blocks = bool(plan.statistics) or window is not None or shape.softcap is not None or shape.sinks
    if not blocks:
        # z, its contiguous copy, and for grouped heads the backend's repeated k and v.
        repeated = 2 * output if shape.group > 1 and device == "cpu" else 0
        return (2 * output + repeated) * element
    features = sum(s.key_features.shape[-1] for s in plan.statistics if s.key_features is not None)
    slots = sum(s.query_keys.shape[-1] for s in plan.statistics if s.query_keys is not None)
    request = plan.request
    per_row = (
        sum([request.lse, request.max_prob, request.entropy, request.distance, request.sink_mass])
        + 2 * request.argmax + 3 * request.top_k + len(request.first) + len(request.recent)
        + len(request.offsets) + features + slots
        + request.column_sum + request.column_max + len(request.column_last)
    )  # fmt: skip
    keys = prompts * shape.kv_heads * tokens
    copies = keys * (2 * shape.head_dim + features) * 4
    # Results in float32, z in the model's dtype, and its contiguous copy.
    results = rows * per_row * 4 + output * (4 + 2 * element)
    q_shape = torch.Size([prompts, shape.heads, tokens, shape.head_dim])
    k_shape = torch.Size([prompts, shape.kv_heads, tokens, shape.head_dim])
    return copies + results + workspace_bytes(q_shape, k_shape, window, device)


def _stored_bytes(plan: Plan, spec: Spec, batch: Batch, element: int) -> int:
    """What the trace keeps: statistics of all layers in float32, and captured sites."""
    prompts, tokens = batch.ids.shape
    heads = max(layer.heads for layer in spec.layers)
    total = 0
    for statistic in plan.statistics:
        size = 8 if statistic.integer else 4
        total += prompts * spec.n_layers * heads * tokens * (statistic.columns or 1) * size
    for site, layer in plan.sites:
        shape = spec.layers[layer]
        width = {
            "q": shape.heads * shape.head_dim,
            "z": shape.heads * shape.head_dim,
            "k": shape.kv_heads * shape.head_dim,
            "v": shape.kv_heads * shape.head_dim,
            "result": shape.heads * spec.d_model,
            "pattern": 0,
        }.get(site, spec.d_model)
        total += prompts * tokens * width * element
        if site == "pattern":
            total += prompts * shape.heads * tokens * tokens * 4
    return total


def refuse_large_patterns(plan: Plan, spec: Spec, batch: Batch) -> None:
    """Explicit patterns above 1 GiB are refused with the memory that they would take."""
    layers = [layer for site, layer in plan.sites if site == "pattern"]
    prompts, tokens = batch.ids.shape
    need = sum(prompts * spec.layers[layer].heads * tokens * tokens * 4 for layer in layers)
    if need > PATTERN_LIMIT_BYTES:
        raise RequestError(
            f"The pattern of {len(layers)} layers over {tokens} tokens takes {need / 2**30:.1f} GiB; patterns are for "
            "short prompts. Ask for statistics instead, for one layer ('blocks.5.attn.hook_pattern'), or cut the prompt."
        )
