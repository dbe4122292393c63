"""`load`: from what a user names to an attached, certified model, here or on a server."""

from __future__ import annotations

from typing import Any

import torch

from workbench.models import attach_model
from workbench.models.adapters import Adapter
from workbench.models.loading import resolve
from workbench.tracing.model import Model
from workbench.tracing.remote import load_remote


def load(
    x: Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    through: Adapter | None = None,
    remote: bool | str = False,
) -> Model:
    """Load and attach a model, and certify that our view of it is the model.

    `x` is a hub name, a local folder, a GGUF file, a built-in name (`smollm2-135m`), a Hugging Face model in
    memory, a `TransformerBridge` of TransformerLens, a model of nnsight, or a pair of model and tokenizer. `through`
    ("transformer-lens", "nnsight") puts a Hugging Face model into that library first. With `remote`, a model of
    nnsight (or a name on the hub) is traced where NDIF runs it; see `workbench.tracing.remote`.

    Raises `SourceError` where it cannot be found, `ModelRefused` (by name) where an architecture or configuration field
    is not one that we reproduce, and `CertificateFailed` where a check fails.
    """
    if remote:
        asked: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision, "through": through}
        return load_remote(x, remote, **{name: value for name, value in asked.items() if value is not None})
    found = resolve(x, dtype=dtype, device=device, revision=revision, through=through)
    attachment, certificate = attach_model(found.host)
    return Model(attachment, found.tokenizer, found.source, certificate)
