"""From what a user names to a model in memory: hub name, folder, GGUF file, built-in name, or the model
itself.

The network is used only for a hub name, and only because the user gave one. Files are the same as for a
folder from then on: a hub name is first brought to a local snapshot, whose commit becomes the revision.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from workbench.errors import RequestError, SourceError
from workbench.models import smollm2
from workbench.models.adapters import Host, host_of, unwrapped
from workbench.models.architectures import architecture_of
from workbench.models.checkpoints import (
    LOAD_ERRORS,
    Progress,
    hash_files,
    hash_parameters,
    load_folder,
    load_gguf,
    on_device,
    report,
)

Kind = Literal["builtin", "hub", "folder", "gguf", "memory", "remote"]

# Name -> (makes the model's folder, licence).
BUILTIN: dict[str, tuple[Callable[[Progress | None], smollm2.Converted], str]] = {
    smollm2.NAME: (smollm2.prepare, smollm2.LICENSE),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
# Sub-folders hold other formats of the same weights; so does the vendor's own single file.
_UNWANTED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Source:
    """Where a model came from: what a stored result needs to name its weights."""

    name: str
    kind: Kind
    path: str | None
    revision: str | None
    weights_sha256: str
    license: str | None


class Loaded(NamedTuple):
    """A model in memory, its tokenizer if it has one, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: Source
    host: Host


def resolve(
    x: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    through: str | None = None,
) -> Loaded:
    """Load what `x` names; take a model, or a pair of model and tokenizer, as it is.

    `through` names a library to run a Hugging Face model in ("transformer-lens", "nnsight").

    Weights are float32 on the CPU, bfloat16 on CUDA and as stored elsewhere unless `dtype` says otherwise;
    the device is CUDA where there is one.
    """
    if not isinstance(x, str | Path):
        found = _in_memory(x, dtype, device, revision)
    else:
        found = _named(x, dtype, device, revision, progress)
    if through is None or through == found.host.name:
        return found
    if found.host.name != "native":
        raise RequestError(f"through={through!r}, but the model given is one of {found.host.name}; leave it out.")
    return found._replace(host=host_of(found.model, found.tokenizer, through))


def _named(
    x: str | Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    revision: str | None,
    progress: Progress | None,
) -> Loaded:
    if not str(x).strip():
        raise SourceError(f"The name of the model is empty ({str(x)!r}). {_choices('')}")
    device = _device(device)
    if revision is not None and not _is_hub_name(x):
        raise RequestError(f"revision={revision!r} is meant for names on the hub; {str(x)!r} has no revisions.")
    wanted = _dtype(dtype, device)
    if isinstance(x, str) and x in BUILTIN:
        prepare, license_name = BUILTIN[x]
        folder, sha256 = prepare(progress)
        source = Source(x, "builtin", str(folder), None, sha256, license_name)
        return _from_folder(source, wanted, device, progress)
    path = Path(x).expanduser()
    if path.is_dir():
        return _from_folder(_folder_source(path.resolve(), "folder"), wanted, device, progress)
    if path.suffix == ".gguf":
        return _from_gguf(path, dtype, device, progress)
    if path.exists():
        raise SourceError(f"{x} is neither a folder nor a GGUF file; give the folder that holds config.json.")
    if _is_hub_name(x):
        return _from_folder(_snapshot(str(x), revision, progress), wanted, device, progress)
    raise SourceError(_unknown(str(x)))


def stated_heads(x: str | Path) -> tuple[int, ...] | None:
    """Heads of each layer as config.json states them, before any weights are read.

    None where only loading can tell: the file is not on this machine, or is not one that can be attached.
    """
    folder = smollm2.cache_folder() / x if x in BUILTIN else Path(x).expanduser()
    file: object = folder / "config.json"
    if _is_hub_name(x):
        file = try_to_load_from_cache(str(x), "config.json")
    if not str(x).strip() or not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(Path(file).parent, trust_remote_code=False, local_files_only=True)
        layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    except (*LOAD_ERRORS, TypeError):
        # Loading says what is wrong.
        return None
    return (heads,) * layers


def _from_folder(source: Source, dtype: torch.dtype | str, device: torch.device, progress: Progress | None) -> Loaded:
    report(progress, f"loading {source.name}")
    model, tokenizer = load_folder(Path(cast(str, source.path)), dtype=dtype, device=device)
    return Loaded(model, tokenizer, source, Host(model))


def _from_gguf(file: Path, dtype: torch.dtype | str | None, device: torch.device, progress: Progress | None) -> Loaded:
    model, tokenizer = load_gguf(file, progress)
    wanted = torch.float32 if dtype is None else _dtype(dtype, device)
    source = Source(file.stem, "gguf", str(file.resolve()), None, hash_files([file]), None)
    model = on_device(model, device, wanted if isinstance(wanted, torch.dtype) else None)
    return Loaded(model, tokenizer, source, Host(model))


def _in_memory(x: Any, dtype: object, device: object, revision: str | None) -> Loaded:
    model, tokenizer = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    host = unwrapped(model)
    if host is not None:
        model, tokenizer = host.hf_model, tokenizer or host.tokenizer
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise RequestError(
            f"A {type(x).__name__} is no model; give a hub name, a folder, a GGUF file, one of "
            f"{', '.join(BUILTIN)}, a Hugging Face model, a bridge of TransformerLens, a model of nnsight, or a pair "
            "of model and tokenizer."
        )
    if dtype is not None or device is not None or revision is not None:
        raise RequestError(
            "dtype, device and revision apply to models that are loaded; move a model in memory yourself: "
            "model.to(...)."
        )
    architecture_of(model_type)
    dropout = [name for name, rate in vars(model.config).items() if "drop" in name and _is_positive(rate)]
    if model.training and dropout:
        raise RequestError(f"The model is in training mode and has dropout ({dropout[0]!r}); call model.eval() first.")
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    host = Host(model) if host is None else host
    source = Source(str(name), "memory", None, None, hash_parameters(host.parameters()), None)
    return Loaded(cast(PreTrainedModel, model), tokenizer, source, host)


def _folder_source(folder: Path, kind: Kind, name: str | None = None, revision: str | None = None) -> Source:
    card = folder / "README.md"
    found = _LICENSE.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    sha256 = hash_files(folder.glob("*.safetensors"))
    return Source(name or folder.name, kind, str(folder), revision, sha256, found.group(1) if found else None)


def _snapshot(name: str, revision: str | None, progress: Progress | None) -> Source:
    report(progress, f"fetching {name} from the hub, or from its cache")
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        folder = _download(name, revision)
    except GatedRepoError as error:
        raise SourceError(
            f"{name} is gated: accept its licence on its page on the hub, then sign in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{name} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{name} is neither a folder here nor a model on the hub that you may read. {_choices(name)}"
        ) from error
    except (EntryNotFoundError, HFValidationError, OSError) as error:
        raise SourceError(
            f"{name}{at} is not in the local cache of the hub, and the hub could not be reached (no network, "
            "or HF_HUB_OFFLINE is set, which allows the cache alone). Download the model where there is a "
            "network and give its folder instead of its name."
        ) from error
    path = Path(folder)
    return _folder_source(path, "hub", name, path.name)


def _download(name: str, revision: str | None) -> str:
    fetch = partial(snapshot_download, name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    try:
        return fetch()
    except OfflineModeIsEnabled:
        # Some versions look up a commit on the hub even when it is cached.
        return fetch(local_files_only=True)


def _is_hub_name(x: str | Path) -> bool:
    return isinstance(x, str) and x not in BUILTIN and _HUB_NAME.fullmatch(x) is not None and not Path(x).exists()


def _unknown(name: str) -> str:
    return f"{name!r} is neither a folder, a GGUF file, a built-in name nor a name on the hub. {_choices(name)}"


def _choices(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), BUILTIN, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Give a path, a name on the hub as 'organisation/name', or a built-in name: {', '.join(BUILTIN)}."


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"device={device!r} is no device of torch; use 'cpu', 'cuda' or 'cuda:1'.") from error
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # Torch without CUDA says so by an assertion.
        raise RequestError(f"device={str(device)!r} is not on this machine; use 'cpu', or leave it out.") from error
    return found


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """A torch type, or "auto" for the type that the weights are stored in."""
    if dtype is None:
        return {"cpu": torch.float32, "cuda": torch.bfloat16}.get(device.type, "auto")
    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if named == "auto" or (isinstance(named, torch.dtype) and named.is_floating_point):
        return cast("torch.dtype | str", named)
    raise RequestError(f"dtype={dtype!r} is no floating-point type; use 'float32', 'bfloat16', 'float16' or 'auto'.")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
