"""Patterns of all heads on a prompt that was written on the page: measured once, kept on disk, read in parts.

Kept are q and k after rotation and the rows' log-sum-exp, from which any entry follows exactly; for 512 tokens of a
model with 270 heads that is 50 MB, a sixth of all patterns. Beside the jobs' outcomes (`.lab/<id>.json`) they lie in
`.lab/patterns`, the oldest removed beyond `KEPT_BYTES`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from workbench.apps.library import shortened
from workbench.apps.tokens.short import MOST_TOKENS, ShortPatterns, telling
from workbench.errors import RequestError
from workbench.heads.detector import Progress
from workbench.models import Head, LayerSpec, Spec
from workbench.runs.patterns import Masking, probabilities
from workbench.runs.tensors import Tensors, write_tensors
from workbench.tracing import Model, Trace, statistics

MOST_CHARACTERS = 20_000
# Of one prompt, and of all that are kept.
MOST_BYTES, KEPT_BYTES = 256 << 20, 1 << 30
_MOST_TEXT = 200
_FILE = re.compile(r"[A-Za-z0-9_-]{16}")


def read_prompt(text: str | None, most: int = MOST_CHARACTERS) -> str:
    """A prompt from the page; refuses what is empty or so long that it cannot have few tokens."""
    most = min(most, MOST_CHARACTERS)
    if not text or not text.strip():
        raise RequestError("There is no prompt; write some words.")
    if len(text) > most:
        raise RequestError(f"The prompt has {len(text):,} characters; {most:,} are allowed. {_LONGER}")
    return text


_LONGER = "Shorten it, or store it with `workbench trace MODEL --file TEXT --patterns L18H6` and zoom into that."


def measure(model: Model, prompt: Any, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run one prompt (whatever `Model.batch` takes) and keep what its patterns follow from, in `folder`.

    What is returned, plain numbers and texts, `from_result` reads the patterns by.
    """
    batch = model.batch(prompt)
    tokens = int(batch.lengths[0])
    _check_size(model.spec, tokens)
    layers = [layer for layer in model.spec.layers if layer.heads]
    if not layers:
        raise RequestError(f"{model.source.name} has no attention heads to show.")
    rotated = "rot_" if model.spec.rotary else ""
    names = [f"blocks.{layer.index}.attn.hook_{rotated}{site}" for layer in layers for site in ("q", "k")]
    progress(0, len(layers) + 1)
    trace = model.trace(batch, statistics=[statistics.lse()], sites=names)
    tensors: dict[str, np.ndarray] = {}
    best = (-1.0, Head(layers[0].index, 0))
    for done, layer in enumerate(layers):
        progress(done + 1, len(layers) + 1)
        tensors |= _of_layer(trace, layer)
        for head in range(layer.heads):
            found = _matrix(tensors, layer, head)
            best = max(best, (telling(found), Head(layer.index, head)), key=lambda pair: pair[0])
    return {
        "patterns": _keep(tensors, folder),
        "model": model.source.name,
        "tokens": _texts(model, batch.ids[0, -tokens:].tolist()),
        "start": str(best[1]),
        "layers": [
            {"index": layer.index, "heads": layer.heads, "kv_heads": layer.kv_heads, "scale": layer.scale,
             "window": layer.window, "softcap": layer.softcap}
            for layer in layers
        ],
    }  # fmt: skip


def _check_size(spec: Spec, tokens: int) -> None:
    most = MOST_TOKENS if spec.max_positions is None else min(MOST_TOKENS, spec.max_positions)
    if tokens > most:
        raise RequestError(f"The prompt has {tokens:,} tokens; {most} can be shown token by token. {_LONGER}")
    a_token = 4 * sum((layer.heads + layer.kv_heads) * layer.head_dim + layer.heads for layer in spec.layers)
    if tokens * a_token > MOST_BYTES:
        raise RequestError(
            f"All heads of this model on {tokens} tokens take {tokens * a_token / 1e6:,.0f} MB on disk and "
            f"{MOST_BYTES / 1e6:.0f} MB are allowed: {MOST_BYTES // a_token} tokens fit. Shorten the prompt."
        )


def _of_layer(trace: Trace, layer: LayerSpec) -> dict[str, np.ndarray]:
    """q and k `[head, token, dim]` and log-sum-exp `[head, token]` of a layer, float32."""
    length = int(trace.batch.lengths[0])
    found = {site: trace.site(site, layer.index)[0, -length:].float().transpose(0, 1) for site in ("q", "k")}
    found["lse"] = trace.values["lse"][0, layer.index, : layer.heads, -length:].float()
    return {f"{name}_{layer.index}": value.contiguous().numpy() for name, value in found.items()}


def _matrix(tensors: Mapping[str, np.ndarray], layer: LayerSpec, head: int) -> Float[np.ndarray, "query key"]:
    q, lse = tensors[f"q_{layer.index}"][head], tensors[f"lse_{layer.index}"][head]
    k = tensors[f"k_{layer.index}"][head // layer.group]
    return _pattern(q, k, lse, Masking(layer.scale, layer.window, layer.softcap))


def _pattern(q: np.ndarray, k: np.ndarray, lse: np.ndarray, masking: Masking) -> Float[np.ndarray, "query key"]:
    every = slice(0, len(q))
    found = probabilities(
        torch.from_numpy(q), torch.from_numpy(k), torch.from_numpy(lse), every, every, masking
    ).numpy()
    return np.asarray(found)


def _texts(model: Model, ids: Sequence[int]) -> list[str]:
    if model.tokenizer is None:
        return [f" {token}" for token in ids]
    return [model.tokenizer.decode([token])[:_MOST_TEXT] for token in ids]


def _keep(tensors: Mapping[str, np.ndarray], folder: Path) -> str:
    """Write the tensors under a name that cannot be guessed, and remove the oldest of too many."""
    name = secrets.token_urlsafe(12)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{name}.partial"
        write_tensors(tensors, unfinished, "patterns")
        unfinished.replace(folder / f"{name}.safetensors")
    except OSError as error:
        raise RequestError(f"The patterns cannot be written to {folder} ({error}); make room there.") from error
    clear(folder)
    return name


def clear(folder: Path, most: int = KEPT_BYTES) -> None:
    """Remove the oldest patterns beyond so many bytes; the newest stays in any case."""
    found = []
    for file in folder.iterdir():
        # Another worker over the same folder may have removed it.
        with suppress(FileNotFoundError):
            facts = file.stat()
            found.append((facts.st_mtime_ns, facts.st_size, file))
    total = 0
    for at, (_, size, file) in enumerate(sorted(found, reverse=True)):
        total += size
        if at and total > most:
            file.unlink(missing_ok=True)


def patterns_folder(lab: Path) -> Path:
    """Where the patterns of prompts lie within the folder of the lab."""
    return lab / "patterns"


def kept(job: str, state: Mapping[str, Any], folder: Path) -> ShortPatterns:
    """The patterns of a finished job, of which `state` is known, in the lab's folder."""
    result = state.get("result", {})
    if not isinstance(result, dict) or "patterns" not in result:
        raise RequestError(f"The job {shortened(job)} has no patterns to show ({state.get('status')}); run it again.")
    return from_result(result, patterns_folder(folder))


def from_result(result: Mapping[str, Any], folder: Path) -> ShortPatterns:
    """The patterns that `measure` kept in a folder."""
    name = str(result["patterns"])
    file = folder / f"{name}.safetensors"
    if not _FILE.fullmatch(name) or not file.is_file():
        raise RequestError("The patterns of this prompt were cleared away to make room; run it again.")
    layers = {int(layer["index"]): layer for layer in result["layers"]}
    heads = tuple(Head(index, head) for index, layer in layers.items() for head in range(int(layer["heads"])))
    windows = {index: int(layer["window"]) for index, layer in layers.items() if layer["window"]}
    matrix = partial(_read, Tensors(file), layers)
    return ShortPatterns(tuple(map(str, result["tokens"])), heads, matrix, Head.parse(result["start"]), windows)


def _read(tensors: Tensors, layers: Mapping[int, Mapping[str, Any]], head: Head) -> Float[np.ndarray, "query key"]:
    layer = layers[head.layer]
    q, lse = (tensors.read(f"{name}_{head.layer}", head.head) for name in ("q", "lse"))
    k = tensors.read(f"k_{head.layer}", head.head // (layer["heads"] // layer["kv_heads"]))
    return _pattern(q, k, lse, Masking(float(layer["scale"]), layer["window"], layer["softcap"]))
