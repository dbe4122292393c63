"""Runs a plan on one piece of a batch: observes attention calls, and hooks the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models import Attachment, AttentionCall
from workbench.models.architectures import output_weight, rewritten, written
from workbench.tracing.edits import Patch, apply_ablation, frozen_call, masked
from workbench.tracing.measured import computed, shared_out
from workbench.tracing.plan import Plan
from workbench.tracing.rotation import Rotation
from workbench.tracing.sites import Site
from workbench.tracing.skip import skipping

StatisticSink = Callable[[str, int, Tensor], None]
SiteSink = Callable[[Site, int, Tensor], None]


class Watch:
    """One forward pass under a plan.

    `rows` are the prompts of this piece within the batch and `tokens` its width: what statistics and edits
    given for the whole batch are cut to. Results go to the two sinks, layer by layer, so that nothing is held
    twice.
    """

    def __init__(
        self,
        attachment: Attachment,
        plan: Plan,
        rows: slice,
        tokens: int,
        statistic: StatisticSink,
        site: SiteSink,
    ) -> None:
        self.attachment, self.plan, self.rows, self.tokens = attachment, plan, rows, tokens
        self.put_statistic, self.put_site = statistic, site
        self._resid_pre: dict[int, Tensor] = {}
        self._z: dict[int, Tensor] = {}
        self._rotation = Rotation(attachment)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Observer and hooks in place; all removed on the way out."""
        with ExitStack() as stack:
            # First, as it may have to run the model once.
            stack.enter_context(skipping(self.attachment, self.plan.first_layer))
            for layer in range(self.attachment.spec.n_layers):
                for hook in self._hooks(layer):
                    stack.callback(hook.remove)
            stack.enter_context(self._rotation.noting(self.plan.turned_layers))
            stack.enter_context(self.attachment.observe(self.attention))
            yield

    def attention(self, call: AttentionCall) -> Tensor:
        """The observer: patches of q, k, v; statistics; captures; then z with its edits."""
        plan, layer = self.plan, call.layer
        for patch in plan.patches_at(layer, "q", "k", "v"):
            old: Tensor = getattr(call, patch.site)
            changed: dict[str, Any] = {patch.site: self._patched(old.transpose(1, 2), patch).transpose(1, 2)}
            call = replace(call, **changed)
        for ablation in plan.ablations:
            call = frozen_call(call, ablation, self.rows)
        for site in plan.captured(layer, frozenset(["q", "k", "v"])):
            # A chunk's call holds the keys and values before it, too.
            self.put_site(site, layer, getattr(call, site)[:, :, -self.tokens :].transpose(1, 2))
        pattern = self._pattern(call)
        z = self._measure(call) if plan.statistics else call.output()
        if pattern is not None:
            group = call.q.shape[1] // call.k.shape[1]
            z = pattern.to(call.v.dtype) @ call.v.repeat_interleave(group, dim=1)
        for ablation in plan.ablations:
            z = apply_ablation(z, call, ablation, self.rows, self._rotation)
        for patch in plan.patches_at(layer, "z"):
            z = self._patched(z.transpose(1, 2), patch).transpose(1, 2)
        if "z" in plan.captured(layer):
            self.put_site("z", layer, z.transpose(1, 2))
        if plan.patches_at(layer, "result"):
            self._z[layer] = z
        elif "result" in plan.captured(layer):
            self.put_site("result", layer, self._result(z, layer))
        return z

    def _measure(self, call: AttentionCall) -> Tensor:
        """All statistics of one layer in one pass, whose output is the model's z."""
        statistics, request = self.plan.statistics, replace(self.plan.request, output=True)
        found = computed(statistics, request, call, self.rows, self.tokens)
        parts = shared_out(statistics, found, request, call, self.result_factor(call.layer))
        for statistic, measured in zip(statistics, parts, strict=True):
            self.put_statistic(statistic.name, call.layer, statistic.read(measured))
        assert found.output is not None
        return found.output.to(call.q.dtype)

    def result_factor(self, layer: int) -> Float[Tensor, "head dim dim"] | None:
        """R of W_O^T = Q R per head: |z W_O| = |R z|, from d x d numbers instead of d x d_model."""
        if not any(statistic.needs_result_factor for statistic in self.plan.statistics):
            return None
        weight = output_weight(self.attachment.layers[layer], self.attachment.spec.layers[layer]).float()
        factor: Tensor = torch.linalg.qr(weight.transpose(1, 2), mode="r").R
        return factor.transpose(1, 2)

    def _pattern(self, call: AttentionCall) -> Tensor | None:
        """The explicit pattern where it is captured or patched; returned only if it was changed."""
        patches = self.plan.patches_at(call.layer, "pattern")
        wanted = "pattern" in self.plan.captured(call.layer)
        if not patches and not wanted:
            return None
        pattern = call.pattern()
        for patch in patches:
            pattern = self._patched(pattern.transpose(1, 2), patch).transpose(1, 2)
        if wanted:
            self.put_site("pattern", call.layer, pattern)
        return pattern if patches else None

    def _result(self, z: Float[Tensor, "batch head token dim"], layer: int) -> Tensor:
        weight = output_weight(self.attachment.layers[layer], self.attachment.spec.layers[layer])
        return torch.einsum("b h t d, h d m -> b t h m", z, weight.to(z.dtype))

    def _patched(self, old: Tensor, patch: Patch) -> Tensor:
        """`old` `[prompt, token, (head,) ...]` with this piece of the patch's value in it."""
        value = patch.value[self.rows]
        if patch.site == "pattern":
            value = value[..., : self.tokens, : self.tokens].transpose(1, 2)
        value = value[:, : old.shape[1]].to(old)
        if patch.heads is not None:
            value = torch.index_copy(old, 2, torch.tensor(patch.heads, device=old.device), value)
        return masked(old, value, patch.positions, self.rows)

    def _hooks(self, layer: int) -> Iterator[Any]:
        modules = self.attachment.layers[layer]
        if self.plan.patches_at(layer, "result"):
            yield modules.projection.register_forward_hook(self._on_result(layer))
        if not self.plan.touches_residual(layer):
            return
        yield modules.block.register_forward_pre_hook(self._on_entry(layer), with_kwargs=True)
        yield modules.attention_write.register_forward_hook(self._on_attention_out(layer))
        if modules.mlp_write is not None:
            yield modules.mlp_write.register_forward_hook(self._on_write(layer, "mlp_out"))
        yield modules.block.register_forward_hook(self._on_write(layer, "resid_post"))

    def _keep(self, site: Site, layer: int, value: Tensor) -> None:
        if site in self.plan.captured(layer):
            self.put_site(site, layer, value)

    def _on_entry(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = "hidden_states" in kwargs
            value = kwargs["hidden_states"] if named else args[0]
            for patch in self.plan.patches_at(layer, "resid_pre"):
                value = self._patched(value, patch)
            self._resid_pre[layer] = value
            self._keep("resid_pre", layer, value)
            return (args, kwargs | {"hidden_states": value}) if named else ((value, *args[1:]), kwargs)

        return hook

    def _on_attention_out(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            entry = self._resid_pre.pop(layer)
            value = written(output, entry)
            for patch in self.plan.patches_at(layer, "attn_out"):
                value = self._patched(value, patch)
            # resid_mid has no module of its own: it is moved through what attention adds.
            for patch in self.plan.patches_at(layer, "resid_mid"):
                value = self._patched(value + entry, patch) - entry
            self._keep("attn_out", layer, value)
            self._keep("resid_mid", layer, value + entry)
            return rewritten(output, value)

        return hook

    def _on_write(self, layer: int, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            shape = (-1, self.tokens, self.attachment.spec.d_model)
            first = output[0] if isinstance(output, tuple) else output
            value = written(output, first.reshape(shape))
            for patch in self.plan.patches_at(layer, site):
                value = self._patched(value, patch)
            self._keep(site, layer, value)
            return rewritten(output, value)

        return hook

    def _on_result(self, layer: int) -> Callable[..., Any]:
        """A patched `result` enters as its difference from z W_O, added to the projection's output."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            result = self._result(self._z.pop(layer), layer)
            patched = result
            for patch in self.plan.patches_at(layer, "result"):
                patched = self._patched(patched, patch)
            self._keep("result", layer, patched)
            return output + (patched - result).sum(2).reshape(output.shape)

        return hook
