"""Reading weights from a folder of safetensors or from a GGUF file, and naming them by their checksum.

Code that comes with a checkpoint is never run and pickles are never opened. Loading is strict: a weight that
is missing or left over means that the model would not be the one on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from workbench.errors import MissingExtra, SourceError
from workbench.models.architectures import Architecture, architecture_of

Progress = Callable[[str], None]

_LOG = logging.getLogger(__name__)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tokenizer_config.json",
)
# What the readers of files raise on damaged or foreign ones.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
    struct.error,
)


def report(progress: Progress | None, message: str) -> None:
    """Tell what is going on: to the log and, if there is one, to the caller's display."""
    _LOG.info(message)
    if progress is not None:
        progress(message)


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other in order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def hash_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """SHA-256 of the bytes of named parameters (tied ones once), in order of their names."""
    digest = hashlib.sha256()
    for _, parameter in sorted(parameters, key=itemgetter(0)):
        flat = parameter.detach().contiguous().cpu().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_folder(
    folder: Path, *, dtype: torch.dtype | str, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Model and, if the folder has one, tokenizer of a checkpoint in the Hugging Face layout."""
    row = _check_folder(folder)
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                attn_implementation=row.backend,
            )
            tokenizer = load_tokenizer(folder)
        except LOAD_ERRORS as error:
            raise SourceError(f"The model in {folder} cannot be read: {_first_line(error)}") from error
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    _check_complete(folder, info)
    return on_device(model, device), tokenizer


def on_device(model: PreTrainedModel, device: torch.device | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model moved, in evaluation mode."""
    module: nn.Module = model
    module.to(device=device, dtype=dtype)
    module.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has no tokenizer files."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_gguf(file: Path, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a GGUF file, in float32 on the CPU, without a trace of the quantisation.

    What `transformers` returns remembers the file it came from and refuses to be saved, so the dequantised
    weights go into a model built afresh from the configuration. Takes some 30 s for 135 million parameters.
    """
    if not file.is_file():
        raise SourceError(f"There is no file {file}.")
    absent = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if absent:
        raise MissingExtra(f"Reading GGUF files needs {' and '.join(absent)}: pip install {' '.join(absent)}")
    report(progress, f"dequantising {file.name} to float32")
    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with quiet_transformers():
        try:
            raw = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
            report(progress, f"reading the tokenizer of {file.name}")
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
        except LOAD_ERRORS as error:
            raise SourceError(f"The GGUF file {file} cannot be read: {_first_line(error)}") from error
        return _without_quantisation(raw), cast(PreTrainedTokenizerBase, tokenizer)


def _without_quantisation(raw: PreTrainedModel) -> PreTrainedModel:
    leftovers = ("quantization_config", "_model_name_or_path", "_name_or_path")
    values = {name: value for name, value in raw.config.to_dict().items() if name not in leftovers}
    config = type(raw.config).from_dict(values)
    clean: PreTrainedModel = type(raw).from_pretrained(
        None,
        config=config,
        state_dict=raw.state_dict(),
        dtype=torch.float32,
        attn_implementation=architecture_of(raw.config.model_type).backend,
    )
    clean.generation_config = raw.generation_config
    return on_device(clean, "cpu")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars of `transformers`, which would write over the caller's own display."""
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _check_folder(folder: Path) -> Architecture:
    if not folder.is_dir():
        raise SourceError(f"There is no folder {folder}.")
    if (folder / "adapter_config.json").is_file():
        raise SourceError(f"{folder} holds an adapter; merge it into its base model and save that (merge_and_unload).")
    row = architecture_of(_model_type(folder / "config.json"))
    if any(folder.glob("*.safetensors")):
        return row
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise SourceError(
            f"The weights in {folder} are pickles ({pickles[0]}), which can run code when read, so they are "
            "refused. Convert them to safetensors first: model.save_pretrained(...) in a place where you "
            "trust them."
        )
    raise SourceError(f"{folder} has no weights (*.safetensors).")


def _model_type(file: Path) -> str:
    advice = "Give the folder that save_pretrained wrote, or a GGUF file."
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file.parent} is no model folder: it has no config.json. {advice}") from None
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}; make it readable.") from error
    except ValueError as error:
        raise SourceError(f"{file} is not valid JSON ({error}). Mend the file, or take it from a copy.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise SourceError(f"{file} names no model_type, so it is no model's configuration. {advice}")
    return str(config["model_type"])


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            raise SourceError(
                f"The weights in {folder} are not those of the model that its config.json describes: "
                f"{len(names)} {kind.replace('_', ' ')}, the first {names[0]!r}."
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
