"""Readings of a head's weights on the model at hand: asked for on the head's card, made by the worker, kept on disk.

What a reading says follows from the weights, the head and the tokens alone, so that it is kept under a digest of these
(`.lab/readings`), for whoever asks again and after a restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import RequestError
from workbench.heads.detector import Progress
from workbench.heads.readings import CIRCUITS, MOST_TOKENS, circuit_directions, summary, token_readings
from workbench.heads.weights import read_weights
from workbench.models import Head
from workbench.models.memory import free_memory
from workbench.runs import Run
from workbench.runs.disk import write_atomically
from workbench.studies.readings import direction_rows, token_texts
from workbench.tracing import Model

JOB = "reading"
MOST_CHARACTERS = 200
MOST_KEPT = 500
# Embedding, unembedding and one product of both, in float32, with room to work.
_COPIES, _BYTES = 4, 4


def asked_of(run: Run, head: Head, text: str) -> dict[str, str]:
    """What a reading is asked by; refuses a text that is too long."""
    if len(text) > MOST_CHARACTERS:
        raise RequestError(
            f"The tokens have {len(text)} characters; {MOST_CHARACTERS} are allowed, and the first {MOST_TOKENS} "
            "tokens are read. Shorten them."
        )
    weights = run.manifest.get("model", {}).get("weights_sha256")
    return {"head": str(head), "tokens": text, "weights": str(weights or "")}


def at_hand(name: str | None, run: Run) -> bool:
    """Whether the server was started, as `name`, with the run's model; the worker compares weights."""
    model = run.manifest.get("model", {}).get("name")
    return bool(name and model) and model in (name, Path(str(name)).name, Path(str(name)).stem)


def kept_reading(folder: Path, asked: Mapping[str, str]) -> dict[str, Any] | None:
    """The reading, where it was made before."""
    try:
        found = json.loads(_file(folder, asked).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_job(model: Model, asked: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """The worker's part; the outcome is plain values, with tokens as text."""
    if asked.get("weights") and model.source.weights_sha256 != asked["weights"]:
        raise RequestError(
            f"The server's {model.source.name} has other weights than the run's; start it with the model of the run."
        )
    head = model.spec.check(Head.parse(str(asked["head"])))
    ids = _ids(model, str(asked.get("tokens", "")))
    _check_room(model)
    steps = 2 + len(CIRCUITS) * 2
    progress(0, steps)
    weights = read_weights(model)
    progress(1, steps)
    found: dict[str, Any] = {"summary": summary(weights, head), "directions": [], "tokens": []}
    for at, circuit in enumerate(CIRCUITS):
        progress(2 + 2 * at, steps)
        own = circuit_directions(weights, head.layer, circuit)[head.head]
        found["directions"] += [{"circuit": circuit, **row} for row in direction_rows(model, own)]
        progress(3 + 2 * at, steps)
        found["tokens"] += [] if not ids else _tokens(model, weights, head, circuit, ids)
    found["left_out"] = list(weights.ignored)
    found["rotary"] = model.spec.rotary
    found["group"] = model.spec.layers[head.layer].group
    found["vocabulary"] = model.spec.vocab_size
    _keep(folder, asked, found)
    return found


def _ids(model: Model, text: str) -> list[int]:
    if not text.strip():
        return []
    if model.tokenizer is None:
        raise RequestError("The model has no tokenizer; leave the tokens empty.")
    ids = model.tokenizer(text[:MOST_CHARACTERS], add_special_tokens=False)["input_ids"]
    return list(dict.fromkeys(int(one) for one in ids))[:MOST_TOKENS]


def _check_room(model: Model) -> None:
    """Refuse before anything of the vocabulary's size is made."""
    need, free = _COPIES * _BYTES * model.spec.vocab_size * model.spec.d_model, free_memory(model.device)
    if free is not None and need > free:
        raise RequestError(
            f"Reading the weights against {model.spec.vocab_size} tokens takes {need / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} are free; stop other work, or start the server on a larger machine."
        )


def _tokens(model: Model, weights: Any, head: Head, circuit: str, ids: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "circuit": circuit,
            "token": token_texts(model, [one])[0],
            "raised": token_texts(model, read.raised.tolist()),
            "lowered": token_texts(model, read.lowered.tolist()),
            "raised_by": [round(float(value), 3) for value in read.raised_by],
            "lowered_by": [round(float(value), 3) for value in read.lowered_by],
            "own_place": read.own_place,
            "own_p": read.own_p,
        }
        for one, read in zip(ids, token_readings(weights, head, circuit, ids), strict=True)
    ]


def _file(folder: Path, asked: Mapping[str, Any]) -> Path:
    text = json.dumps({name: str(asked.get(name, "")) for name in ("weights", "head", "tokens")}, sort_keys=True)
    return folder / "readings" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _keep(folder: Path, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if not asked.get("weights"):
        return
    file = _file(folder, asked)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found, allow_nan=False) + "\n")
    kept = sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
    for old in kept[:-MOST_KEPT]:
        old.unlink(missing_ok=True)
