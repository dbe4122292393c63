"""A model of nnsight (`TransformersModel`, or its older name `LanguageModel`), attached to where it runs here.

nnsight wraps a Hugging Face model and leaves its modules in place; outside of a trace its wrappers do nothing. So we
attach to the wrapped model. What the user has stored by `model.edit(inplace=True)` is part of the model that is
looked at: with such edits in place every pass runs through nnsight's own interleaving, and they act in it. A trace
that the user opens meanwhile runs under our attention, with no N x N array, and otherwise as ever.

Models that run elsewhere (`remote=True`) are reached by `workbench.tracing.remote`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import MissingExtra, RequestError
from workbench.models.adapters.host import Adapter, Host

_INSTALL = "pip install 'attention-workbench[nnsight]'"


def wrapper_around(hf_model: nn.Module, tokenizer: Any | None) -> Any:
    """nnsight's model over a loaded Hugging Face model."""
    try:
        from nnsight.modeling.transformers import TransformersModel
        from transformers import ByT5Tokenizer
    except ImportError as error:
        raise MissingExtra(f"nnsight is not installed; install it by {_INSTALL}.") from error
    # Without a tokenizer nnsight would look for one under the model's name; this one needs no file.
    return TransformersModel(hf_model, task="text-generation", tokenizer=tokenizer or ByT5Tokenizer())


class NNsightHost(Host):
    """The model that nnsight wraps."""

    name: Adapter = "nnsight"

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        if not hasattr(wrapper, "_module") or not hasattr(wrapper._module, "set_attn_implementation"):
            raise RequestError(
                f"A {type(wrapper).__name__} of nnsight holds no Hugging Face model; attach to a TransformersModel."
            )
        if any(parameter.is_meta for parameter in wrapper._module.parameters()):
            raise RequestError(
                "This model of nnsight has no weights here yet: make it with dispatch=True (or call dispatch()) to run "
                "it on this machine, or load it with remote=True to run it on NDIF."
            )
        super().__init__(wrapper._module)
        self._running = _Interleaved(wrapper)

    @property
    def running(self) -> nn.Module:
        return self._running

    @property
    def tokenizer(self) -> Any | None:
        return getattr(self.wrapper, "tokenizer", None)

    @property
    def interferes(self) -> bool:
        return bool(self.wrapper._edits)

    def own_logits(self, ids: Tensor) -> Float[Tensor, "prompt token vocab"]:
        found: Tensor = self.wrapper.trace(ids, trace=False).logits
        return found


class _Interleaved(nn.Module):
    """The wrapped model, called through nnsight where it has edits to replay; otherwise as it is."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__()
        # Not a submodule: names of modules and parameters stay those of the model.
        object.__setattr__(self, "_wrapper", wrapper)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_wrapper")._module, name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper._module.named_modules(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper._module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper._module.named_buffers(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self._wrapper
        if not wrapper._edits:
            return wrapper._module(*args, **kwargs)
        from nnsight.intervention.batching import Batcher

        # The call's own arguments, without nnsight's padding and positions.
        batcher = Batcher(wrapper, {})
        batcher.add = lambda *inputs, **named: None
        batcher.assemble = lambda fn: (args, kwargs)
        return wrapper.interleave(wrapper._module, batcher=batcher)
