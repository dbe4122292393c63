"""Running text of any length, prose and code in turn, with the classes of its tokens marked.

What patterns of attention and their change with length are measured on.  Each prompt begins at another piece of
the corpus and goes on, piece after piece, until it has the asked number of tokens; a prompt longer than the corpus
begins it again, so that beyond some ten thousand tokens the text repeats.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import cycle

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import Encoded, default_prefix, encode
from workbench.tasks.task import Task

# The classes are disjoint, and no token of text need belong to any.
TOKEN_CLASSES = ("start", "punctuation", "newline", "digits")
LEAST_TOKENS = 32
DOMAINS = ("prose", "code")


def long_texts(tokenizer: PreTrainedTokenizerBase, prompts: int = 4, length: int = 512, seed: int = 0) -> Task:
    """Prompts of exactly `length` tokens (a start token included), by turns of prose and of code.

    `marks` hold one mask for each of `TOKEN_CLASSES`: the prompt's first token, tokens of punctuation and symbols
    alone, those with a line break, those of digits.
    """
    prefix = default_prefix(tokenizer)
    if prompts < 1 or length < LEAST_TOKENS:
        raise RequestError(
            f"prompts={prompts}, length={length}: long texts need a prompt or more, of {LEAST_TOKENS} tokens or more."
        )
    rng, wanted = np.random.default_rng(seed), length - len(prefix.ids)
    domains = [DOMAINS[index % len(DOMAINS)] for index in range(prompts)]
    texts = [_first_tokens(tokenizer, _pieces(domain, rng), wanted) for domain in domains]
    batch = Batch.from_ids([[*prefix.ids, *text.ids] for text in texts], texts=[text.text for text in texts])
    start = torch.full((prompts,), len(prefix.ids))
    return Task(
        name="long_text",
        caption=f"{prompts} texts of {length} tokens, by turns prose and code; {prefix.policy}.",
        seed=seed,
        batch=batch,
        specials=prefix.policy,
        answer_ids=batch.ids[:, 1:].clone(),
        answer_positions=torch.arange(length - 1).expand(prompts, -1).contiguous(),
        spans={"text": torch.stack([start, torch.full_like(start, length)], dim=1)},
        marks=token_classes(tokenizer, batch.ids),
        settings={"prompts": prompts, "length": length, "corpus_sha256": corpus.digest(text.text for text in texts)},
        info=tuple({"domain": domain} for domain in domains),
    )


def token_classes(
    tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "prompt token"]
) -> dict[str, Bool[Tensor, "prompt token"]]:
    """A mask for each of `TOKEN_CLASSES`, of unpadded prompts; the first token of a prompt is of class `start` only."""
    known, place = torch.unique(ids, return_inverse=True)
    words = [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in known.tolist()]
    classes = [_class(word) for word in words]
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    marks = {"start": first}
    for name in TOKEN_CLASSES[1:]:
        marks[name] = torch.tensor([found == name for found in classes])[place] & ~first
    return marks


def _class(word: str) -> str | None:
    """The class of a token's text; None for words, spaces and mixtures."""
    bare = word.strip()
    if not bare:
        return "newline" if "\n" in word else None
    if all(letter.isdigit() for letter in bare):
        return "digits"
    return "punctuation" if all(unicodedata.category(letter)[0] in "PS" for letter in bare) else None


def _pieces(domain: str, rng: np.random.Generator) -> Iterator[str]:
    """Pieces of a domain from a random one on, and round again without end."""
    if domain == "prose":
        paragraphs = [piece for document in corpus.prose_documents() for piece in document.pieces]
        turn = int(rng.integers(len(paragraphs)))
        yield from cycle(paragraphs[turn:] + paragraphs[:turn])
    else:
        files = corpus.code_files()
        turn = int(rng.integers(len(files)))
        for path in cycle(files[turn:] + files[:turn]):
            yield from corpus.code_document(path).pieces


def _first_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[str], wanted: int) -> Encoded:
    """As many pieces as give the wanted number of tokens, cut behind the last of them."""
    text, aim = "", 5 * wanted
    while True:
        while len(text) < aim:
            text += ("\n\n" if text else "") + next(pieces)
        found = encode(tokenizer, text)
        if len(found.ids) >= wanted:
            return Encoded(text[: found.offsets[wanted - 1][1]], found.ids[:wanted], found.offsets[:wanted])
        aim *= 2
