"""Starting in the middle: where the residual stream that enters a layer is given, the layers before it need not run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models import Attachment

# How many things each block puts out; 0 for a bare tensor.
_OUTPUTS: weakref.WeakKeyDictionary[Attachment, tuple[int, ...]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def block_outputs(attachment: Attachment) -> tuple[int, ...]:
    """The length of each block's output tuple, 0 for a bare tensor; found once, by running one token."""
    if attachment not in _OUTPUTS:
        found: list[int] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append(len(output) if isinstance(output, tuple) else 0)

        with ExitStack() as stack:
            for layer in attachment.layers:
                stack.callback(layer.block.register_forward_hook(hook).remove)
            token = torch.zeros(1, 1, dtype=torch.long, device=attachment.device)
            attachment.hf_model(token, use_cache=False, logits_to_keep=1)
        _OUTPUTS[attachment] = tuple(found)
    return _OUTPUTS[attachment]


@contextmanager
def skipping(attachment: Attachment, first: int) -> Iterator[None]:
    """Blocks before layer `first` hand on what they are given; undone on the way out.

    None does where something that the user has set up in another library acts in every pass.
    """
    first = 0 if attachment.host.interferes else first
    # Blocks may hold a `forward` of their own already (dispatched over devices).
    held: list[tuple[nn.Module, Any]] = []
    try:
        for layer, outputs in zip(attachment.layers[:first], block_outputs(attachment) if first else (), strict=False):
            held.append((layer.block, vars(layer.block).get("forward")))
            # Past the setters of modules that hand attributes on to what they wrap.
            vars(layer.block)["forward"] = _handing_on(outputs)
        yield
    finally:
        for block, own in held:
            vars(block).pop("forward")
            if own is not None:
                vars(block)["forward"] = own


def _handing_on(outputs: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    return forward
