"""Which library an object belongs to, by where its class is defined, so that nothing is imported to find out."""

from __future__ import annotations

from typing import Any

from torch import nn

from workbench.errors import RequestError
from workbench.models.adapters.host import ADAPTERS, Host

_LIBRARIES = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}


def library_of(x: Any) -> str | None:
    """ "transformer-lens" for a bridge, "nnsight" for a model of it, None for anything else."""
    for kind in type(x).__mro__:
        found = _LIBRARIES.get(kind.__module__.split(".")[0])
        if found is not None:
            return found
    return None


def unwrapped(x: Any) -> Host | None:
    """The host of a library's object; None for what belongs to none."""
    library = library_of(x)
    if library == "transformer-lens":
        from workbench.models.adapters.transformer_lens import BridgeHost

        if not hasattr(x, "original_model"):
            raise RequestError(
                f"A {type(x).__name__} is no bridge to a Hugging Face model; attach to a TransformerBridge "
                "(TransformerBridge.boot_transformers(...)) or to the Hugging Face model itself."
            )
        return BridgeHost(x)
    if library == "nnsight":
        from workbench.models.adapters.nnsight import NNsightHost

        return NNsightHost(x)
    return None


def host_of(hf_model: nn.Module, tokenizer: Any | None, through: str | None) -> Host:
    """A host for a loaded Hugging Face model."""
    if through is None or through == "native":
        return Host(hf_model)
    if through == "transformer-lens":
        from workbench.models.adapters.transformer_lens import BridgeHost, bridge_around

        return BridgeHost(bridge_around(hf_model, tokenizer))
    if through == "nnsight":
        from workbench.models.adapters.nnsight import NNsightHost, wrapper_around

        return NNsightHost(wrapper_around(hf_model, tokenizer))
    raise RequestError(f"through={through!r} is no adapter; choose one of {', '.join(ADAPTERS)}.")
