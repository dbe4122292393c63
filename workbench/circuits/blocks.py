"""A model's own decoder layers, run on rows of the residual stream from any layer on.

Rows are tokens laid side by side in one axis, of whatever prompts and positions: everything in a decoder layer but
attention treats tokens one by one, and attention passes through the observer of the attachment, which knows which
rows belong together. So one call serves patches that begin at different tokens, without padding. Nothing of the
model is rewritten: blocks are called with the arguments that the model itself passes, cut to the rows' positions.

What this relies on is checked before it is used (`check`): a block must give on rows what it gave in the model's own
pass, and the model's end the same logits. Where it does not, patching falls back on whole edited passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.models import Attachment, AttentionCall
from workbench.models.architectures import rewritten, written
from workbench.tracing.skip import skipping

# Arguments that hold one entry a token, and how many axes stand before it.
_BY_POSITION = frozenset(["position_ids", "position_embeddings"])
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE = 3e-2
# Rows whose logits are made together.
LOGIT_ROWS = 256
Rewrite = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row d_model"]]
Attend = Callable[[AttentionCall], Tensor]


class CannotRun(Exception):
    """Why blocks of this model cannot be run on rows; patching then takes the slower route."""


class Blocks:
    """The decoder layers of an attached model, for prompts of up to `tokens` tokens."""

    def __init__(self, attachment: Attachment, tokens: int) -> None:
        self.attachment, self.tokens = attachment, tokens
        if attachment.host.interferes:
            raise CannotRun(f"edits or hooks of {attachment.host.name} act in every pass of the whole model")
        self._given = self._arguments()
        self.rows = 0

    @torch.no_grad()
    def _arguments(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model passes to each block beside the residual stream."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            found.append((args[1:] if "hidden_states" not in kwargs else args, rest))

        ids = torch.zeros(1, self.tokens, dtype=torch.long, device=self.attachment.device)
        with ExitStack() as stack:
            # First, as it may have to run the model once.
            stack.enter_context(skipping(self.attachment, self.attachment.spec.n_layers))
            for layer in self.attachment.layers:
                stack.callback(layer.block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            self.attachment.hf_model(ids, use_cache=False, logits_to_keep=1)
        for number, (args, kwargs) in enumerate(found):
            named = {f"argument {place + 2}": value for place, value in enumerate(args)} | kwargs
            for name, value in named.items():
                if name not in _BY_POSITION and any(isinstance(leaf, Tensor) for leaf in _leaves(value)):
                    raise CannotRun(f"block {number} is handed a tensor {name!r} that is not known to be by position")
        return found

    def run(
        self,
        layer: int,
        hidden: Float[Tensor, "row d_model"],
        positions: Int[Tensor, " row"],
        attend: Attend,
        rewrites: Mapping[str, Rewrite] | None = None,
    ) -> Float[Tensor, "row d_model"]:
        """The residual stream after a layer; `attend` gives z `[1, head, row, dim]` of the call over all rows.

        `rewrites` change `attn_out` and `mlp_out` on their way into the stream.
        """
        args, kwargs = self._given[layer]
        kwargs = {name: _cut(value, positions) if name in _BY_POSITION else value for name, value in kwargs.items()}
        self.rows += len(hidden)
        with self.attachment.observe(attend), self._rewriting(layer, hidden, rewrites or {}):
            output = self.attachment.layers[layer].block(hidden[None], *args, **kwargs)
        return written(output, hidden[None])[0]

    @contextmanager
    def _rewriting(self, layer: int, hidden: Tensor, rewrites: Mapping[str, Rewrite]) -> Iterator[None]:
        modules = self.attachment.layers[layer]
        with ExitStack() as stack:
            for site, module in (("attn_out", modules.attention_write), ("mlp_out", modules.mlp_write)):
                if site in rewrites and module is not None:
                    stack.callback(module.register_forward_hook(_on_write(rewrites[site], hidden)).remove)
            yield

    def added(
        self, layer: int, z: Float[Tensor, "row head dim"], hidden: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """attn_out of given z; the rest of the block does not run."""
        projected = self.attachment.layers[layer].projection(z.flatten(1)[None])
        modules = self.attachment.layers[layer]
        if modules.attention_write is modules.projection:
            return written(projected, hidden[None])[0]
        return written(modules.attention_write(projected), hidden[None])[0]

    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        """The model's own end (norm, unembedding, caps) on rows that left the last layer."""
        return torch.cat([self._end(part) for part in torch.split(hidden, LOGIT_ROWS)])

    def _end(self, hidden: Tensor) -> Tensor:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": hidden[:, None]}
            return (hidden[:, None], *args[1:]), kwargs

        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        first = self.attachment.layers[0].block.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with skipping(self.attachment, self.attachment.spec.n_layers):
                logits: Tensor = self.attachment.hf_model(ids, use_cache=False).logits
        finally:
            first.remove()
        return logits[:, -1]


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways of computing the same agree to the rounding of their type."""
    tolerance = TOLERANCE.get(found.dtype, COARSE)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple | list) else [value]


def _cut(value: Any, positions: Tensor) -> Any:
    """`[1, token, ...]` at the rows' positions."""
    if isinstance(value, tuple):
        return tuple(_cut(part, positions) for part in value)
    return value[:, positions] if isinstance(value, Tensor) else value


def _on_write(rewrite: Rewrite, hidden: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = written(output, hidden[None])
        return rewritten(output, rewrite(value[0])[None])

    return hook
