"""Explicit attention patterns on two short prompts, for looking at heads one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from workbench.models import Head
from workbench.tracing import Model

LONGEST = 64


class Example(NamedTuple):
    """A short prompt and what there is to see in it."""

    name: str
    title: str
    text: str


EXAMPLES = (
    Example(
        "prose",
        "A sentence that comes back",
        "The grey heron watched the river at dawn. By noon the boats were gone, and the grey heron watched the river "
        "again.",
    ),
    Example(
        "code",
        "Two small functions",
        "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n"
        "    return area(width, height) * depth\n",
    ),
)


def example_tables(
    model: Model, heads: Sequence[Head], examples: Sequence[Example] = EXAMPLES
) -> tuple[pd.DataFrame, pd.DataFrame, xr.Dataset]:
    """Tokens, titles, and the patterns of `heads` on each example; empty where the model has no tokenizer."""
    tokens, info = [], []
    stack: list[NDArray[np.float32]] = []
    labels: list[tuple[str, int, int]] = []
    for example in examples if model.tokenizer is not None else ():
        assert model.tokenizer is not None
        whole = model.batch(example.text)
        batch = model.batch([whole.ids[0, :LONGEST].tolist()])
        ids = batch.ids[0].tolist()
        texts = [model.tokenizer.decode([token]) for token in ids]
        tokens += [
            {"example": example.name, "position": position, "token_id": token, "text": text}
            for position, (token, text) in enumerate(zip(ids, texts, strict=True))
        ]
        caption = f"{len(ids)} tokens, written for this report; attention of one forward pass."
        info.append({"example": example.name, "title": example.title, "caption": caption})
        layers = sorted({head.layer for head in heads})
        found = model.trace(batch, sites=[f"blocks.{layer}.attn.hook_pattern" for layer in layers])
        for head in heads:
            stack.append(found.site("pattern", head.layer)[0, head.head].float().numpy())
            labels.append((example.name, head.layer, head.head))
    width = max((len(pattern) for pattern in stack), default=0)
    padded = np.full((len(stack), width, width), np.nan, dtype=np.float32)
    for index, pattern in enumerate(stack):
        padded[index, : len(pattern), : len(pattern)] = pattern
    names, layer, head_index = zip(*labels, strict=True) if labels else ((), (), ())
    patterns = xr.Dataset(
        {"pattern": (("example_head", "query", "key"), padded)},
        coords={
            "example": ("example_head", np.array(names, dtype="<U16")),
            "layer": ("example_head", np.array(layer, dtype=np.int64)),
            "head": ("example_head", np.array(head_index, dtype=np.int64)),
        },
    )
    return (
        pd.DataFrame(tokens, columns=["example", "position", "token_id", "text"]),
        pd.DataFrame(info, columns=["example", "title", "caption"]),
        patterns,
    )
