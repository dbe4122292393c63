"""Equally long texts from two domains: a head may be active on code and dormant on prose.

Active-dormant heads (Guo et al. 2024, arXiv 2410.13835) rest on the first token on one kind of text and
work on another; the published measurement takes 64 tokens of natural text a prompt.  Here every prompt
begins where a paragraph (prose) or a top-level function or class (code) begins and holds exactly the asked
number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import Encoded, Prefix, default_prefix, encode, start_token
from workbench.tasks.task import Task

# Of any tokenizer that is worth the name: fewer characters a token than this.
_CHARACTERS_A_TOKEN = 12


Loader = Callable[[], corpus.Document]


def _prose() -> list[Loader]:
    return [partial(_itself, document) for document in corpus.prose_documents()]


def _itself(document: corpus.Document) -> corpus.Document:
    return document


def _code() -> list[Loader]:
    return [partial(corpus.code_document, path) for path in corpus.code_files()]


# Documents are read one by one, since parsing the whole standard library takes seconds.
DOMAINS: dict[str, Callable[[], list[Loader]]] = {"prose": _prose, "code": _code}
_WHENCE = {"prose": "pydoc's topics", "code": "the standard library's sources"}


def text_domains(
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[str] = ("prose", "code"),
    prompts: int = 50,
    length: int = 64,
    seed: int = 0,
    *,
    bos: bool | None = None,
) -> dict[str, Task]:
    """One task a domain; each prompt has ``length`` tokens, a start token included.

    ``bos``: None does what the tokenizer does by default, True puts a start token before each prompt, False
    none.
    """
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown:
        raise RequestError(f"Domain {unknown[0]!r} is unknown; choose from {', '.join(DOMAINS)}.")
    prefix = _prefix(tokenizer, bos)
    if prompts < 1 or length < len(prefix.ids) + 2:
        raise RequestError(
            f"prompts={prompts}, length={length}: ask for at least one prompt of {len(prefix.ids) + 2} tokens."
        )
    return {domain: _task(tokenizer, domain, prefix, prompts, length, seed) for domain in domains}


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> Prefix:
    if bos is None:
        return default_prefix(tokenizer)
    return start_token(tokenizer) if bos else Prefix((), "nothing before the text")


def _task(
    tokenizer: PreTrainedTokenizerBase, domain: str, prefix: Prefix, prompts: int, length: int, seed: int
) -> Task:
    wanted = length - len(prefix.ids)
    found = _windows(tokenizer, domain, wanted, prompts, seed)
    batch = Batch.from_ids(
        [[*prefix.ids, *window.ids] for _, window in found], texts=[window.text for _, window in found]
    )
    rows = torch.arange(length - 1).expand(len(batch), -1).contiguous()
    start = torch.full((len(batch),), len(prefix.ids))
    return Task(
        name=f"text_{domain}",
        caption=f"{prompts} passages of {length} tokens of {domain} from {_WHENCE[domain]}; {prefix.policy}.",
        seed=seed,
        batch=batch,
        specials=prefix.policy,
        answer_ids=batch.ids[:, 1:].clone(),
        answer_positions=rows,
        spans={"text": torch.stack([start, torch.full_like(start, length)], dim=1)},
        settings={
            "domain": domain,
            "prompts": prompts,
            "length": length,
            "corpus_sha256": corpus.digest(window.text for _, window in found),
        },
        info=tuple({"document": name} for name, _ in found),
    )


def _windows(
    tokenizer: PreTrainedTokenizerBase, domain: str, wanted: int, prompts: int, seed: int
) -> list[tuple[str, Encoded]]:
    """Passages of ``wanted`` tokens, spread over the documents; none overlaps another."""
    documents = DOMAINS[domain]()
    rng = np.random.default_rng(seed)
    order, starts = rng.permutation(len(documents)), rng.random(len(documents))
    passages = [_passages(tokenizer, documents[at], wanted, starts[at]) for at in order]
    found: list[tuple[str, Encoded]] = []
    while passages:
        left = []
        for stream in passages:
            window = next(stream, None)
            if window is None:
                continue
            found.append(window)
            if len(found) == prompts:
                return found
            left.append(stream)
        passages = left
    raise RequestError(
        f"{_WHENCE[domain].capitalize()} hold {len(found)} passages of {wanted} tokens, and {prompts} were "
        "asked for; ask for fewer or shorter ones."
    )


def _passages(
    tokenizer: PreTrainedTokenizerBase, load: Loader, wanted: int, start: float
) -> Iterator[tuple[str, Encoded]]:
    """Passages that begin with a piece of the document: from a share of it to its end, then those before."""
    document = load()
    turn = int(start * len(document.pieces))
    for pieces in (document.pieces[turn:], document.pieces[:turn]):
        first = 0
        while first < len(pieces):
            text = document.joint.join(pieces[first:])[: wanted * _CHARACTERS_A_TOKEN]
            window = encode(tokenizer, text)
            if len(window.ids) < wanted:
                break
            end = window.offsets[wanted - 1][1]
            yield document.name, Encoded(text[:end], window.ids[:wanted], window.offsets[:wanted])
            used = 0
            while used < end and first < len(pieces):
                used += len(pieces[first]) + len(document.joint)
                first += 1
