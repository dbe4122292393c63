"""Captures and edits compiled into one plan for a forward pass: which hooks, which statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from workbench.errors import MemoryRefused, RequestError
from workbench.kernels import StatisticsRequest
from workbench.models import Batch, Head, Spec
from workbench.models.memory import size
from workbench.tracing.edits import Ablation, Edit, Patch
from workbench.tracing.sites import ATTENTION_SITES, SITES, Site, check_exists, parse_site
from workbench.tracing.statistics import Statistic

# Explicit patterns are O(N^2): a display, not a measurement.
PATTERN_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What one trace does; `compile` it for a model, then `laid_out` on a batch."""

    statistics: tuple[Statistic, ...]
    request: StatisticsRequest
    sites: frozenset[tuple[Site, int]]
    ablations: tuple[Ablation, ...]
    patches: tuple[Patch, ...]

    @staticmethod
    def compile(spec: Spec, statistics: Sequence[Statistic], sites: Sequence[str], edits: Sequence[Edit]) -> Plan:
        names = [statistic.name for statistic in statistics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RequestError(f"Two statistics are called {twice[0]!r}; give each its own name.")
        for edit in edits:
            edit.check(spec)
        _refuse_twice([edit for edit in edits if isinstance(edit, Ablation)])
        request = reduce(lambda a, b: a | b, (s.request for s in statistics), StatisticsRequest())
        return Plan(
            tuple(statistics),
            request,
            _expand_sites(spec, sites),
            tuple(edit for edit in edits if isinstance(edit, Ablation)),
            tuple(edit for edit in edits if isinstance(edit, Patch)),
        )

    def laid_out(self, spec: Spec, batch: Batch) -> Plan:
        """The plan with its values in the shape of this batch; refuses what was made for another."""
        for statistic in self.statistics:
            for given in statistic.given:
                if given.shape[:2] != batch.ids.shape:
                    raise RequestError(
                        f"{statistic.name!r} is given for {tuple(given.shape[:2])} prompts and tokens, but the "
                        f"batch has {tuple(batch.ids.shape)}."
                    )
        return replace(
            self,
            ablations=tuple(edit.laid_out(spec, batch) for edit in self.ablations),
            patches=tuple(edit.laid_out(spec, batch) for edit in self.patches),
        )

    def captured(self, layer: int, kinds: frozenset[Site] | None = None) -> list[Site]:
        """Sites to store in a layer, in order of the forward pass."""
        return [s for s in SITES if (s, layer) in self.sites and (kinds is None or s in kinds)]

    def patches_at(self, layer: int, *sites: Site) -> list[Patch]:
        return [patch for patch in self.patches if patch.layer == layer and patch.site in sites]

    @property
    def turned_layers(self) -> set[int]:
        """Layers whose rotation an ablation needs."""
        return {head.layer for edit in self.ablations if edit.how == "q_mean" for head in edit.heads}

    @property
    def first_layer(self) -> int:
        """The first layer that has to run: before it nothing is read or changed, and what enters it is given."""
        given = [p.layer for p in self.patches if p.site == "resid_pre" and p.positions is None]
        if self.statistics or not given:
            return 0
        touched = {layer for _, layer in self.sites} | {patch.layer for patch in self.patches}
        touched |= {layer for edit in self.ablations for layer in edit.layers}
        return max(given) if max(given) == min(touched) else 0

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


def refuse_large_patterns(plan: Plan, spec: Spec, batch: Batch) -> None:
    """Explicit patterns above 1 GiB are refused with the memory that they would take."""
    layers = [layer for site, layer in plan.sites if site == "pattern"]
    prompts, tokens = batch.ids.shape
    need = sum(prompts * spec.layers[layer].heads * tokens * tokens * 4 for layer in layers)
    if need > PATTERN_LIMIT_BYTES:
        raise MemoryRefused(
            f"The pattern of {len(layers)} layers over {tokens} tokens takes {size(need)}; {size(PATTERN_LIMIT_BYTES)} "
            "are allowed, as patterns are for short prompts. Ask for statistics instead, for one layer "
            "('blocks.5.attn.hook_pattern'), or cut the prompt."
        )


def _refuse_twice(ablations: Sequence[Ablation]) -> None:
    """A head ablated everywhere in two ways has no meaning; by positions it may."""
    seen: dict[Head, Ablation] = {}
    for ablation in ablations:
        for head in ablation.heads if ablation.positions is None else ():
            if head in seen:
                both = f"{seen[head].how!r} and {ablation.how!r}"
                raise RequestError(f"{head} is ablated twice, by {both}; name it in one ablation.")
            seen[head] = ablation
