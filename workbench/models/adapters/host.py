"""Who runs the model: Hugging Face itself, or a library around it.

Everything works on a Hugging Face model (`Attachment`). A host says where that model is inside another library's
object, what has to be changed for as long as we are attached so that its attention can be watched, and what of that
library's own goes unheard meanwhile. The native host changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

Adapter = Literal["native", "transformer-lens", "nnsight"]
ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)


class Host:
    """A Hugging Face model run by itself.

    `hf_model` is the model as Hugging Face made it; `running` is what is called, and answers to the same names.
    """

    name: Adapter = "native"

    def __init__(self, hf_model: nn.Module) -> None:
        self.hf_model = hf_model

    @property
    def running(self) -> nn.Module:
        return self.hf_model

    def install(self) -> Callable[[], None]:
        """Make the model's attention ask for the registered function; returns what takes that back."""
        return _nothing

    def native(self, attention: nn.Module) -> nn.Module:
        """The Hugging Face attention module behind the one that stands in the model."""
        return attention

    def check(self) -> None:
        """Refuse what the user has set up in the library and we would pass over; asked before every run."""

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer that the library holds, if it does."""
        return None

    @property
    def interferes(self) -> bool:
        """Whether something of the user's, set up in the library, acts in every pass."""
        return False

    def own_logits(self, ids: Tensor) -> Float[Tensor, "prompt token vocab"] | None:
        """What the library's own call gives, unattached; None where that is the model's own call."""
        return None

    def own_patterns(self, ids: Tensor) -> list[Float[Tensor, "prompt head query key"]]:
        """Attention patterns as the library gives them, unattached; empty where it gives none."""
        return []

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters under the names that Hugging Face gives them, each once."""
        return list(self.hf_model.named_parameters())


def _nothing() -> None:
    """There is nothing to take back."""


def plain(module: Any) -> Any:
    """A module, or what a component of TransformerLens wraps."""
    while isinstance(module, nn.Module) and "_original_component" in module._modules:
        module = module._modules["_original_component"]
    return module
