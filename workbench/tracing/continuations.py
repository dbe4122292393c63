"""What prompts are continued with, written by the model or given, with statistics of the rows that produce it.

Many prompts of a grid begin alike, and what a model copies can be guessed. So:

1. Prompts are taken in the order of their tokens; one KV cache is cut back to what the next prompt shares with the one
   before, so that every shared beginning is run once.
2. The rest of the prompt runs together with a draft of the answer. Greedy decoding would write the draft's tokens as
   long as each is the most likely one behind those before it; the first that is not is replaced by what is, and from
   there on words that stood in draft or prompt after the same token are tried next.
3. Statistics are taken of the last rows alone: the row of a prompt's last token produces the first new one, as in
   `generate`. The rows are those of token-by-token decoding, several at a time.

The result is greedy decoding's up to rounding: a token whose lead over the next is within it may fall differently. A
given continuation needs no draft: every row is read as if its token had been written.

Cost: each distinct beginning once, a few passes an answer. The cache holds every key also of windowed layers, so
that it can be cut back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall, Batch
from workbench.tracing.generate import Generation, check_request, nothing_of, stop_tokens, texts_of
from workbench.tracing.model import Model
from workbench.tracing.statistics import Measured, Statistic

# Tokens run at once against a filled cache: attention there takes a mask of so many rows.
CHUNK = 1024
# Tokens tried at once after a draft has failed.
LOOKUP = 12


@torch.no_grad()
def continue_greedily(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *,
    drafts: Sequence[Sequence[int]] | None = None,
    statistics: Sequence[Statistic] = (),
    stop_ids: Iterable[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue prompts greedily, as `Model.generate` does.

    Args:
        prompts: token ids of each, without padding.
        drafts: what each may be continued with; good ones save passes, bad ones change nothing.
        statistics: row statistics, and masses on labelled keys (`statistics.mass`, one row a prompt; keys behind the
            prompt do not count).
        stop_ids: tokens that end an answer; the model's own end tokens by default.
    """
    checked = _checked(model, prompts, max_new_tokens, statistics)
    if drafts is not None and len(drafts) != len(checked):
        raise RequestError(f"{len(drafts)} drafts for {len(checked)} prompts; give one for each, if only an empty one.")
    stops = stop_tokens(model) if stop_ids is None else set(stop_ids)
    runner = _Runner(model, statistics)

    def one(index: int, prompt: list[int]) -> list[int]:
        return runner.write(index, prompt, [] if drafts is None else list(drafts[index]), max_new_tokens, stops)

    return _all(model, runner, checked, one, stops, progress)


@torch.no_grad()
def continue_with(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    statistics: Sequence[Statistic] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Statistics of the rows that would produce given answers, teacher-forced; arguments as above."""
    if len(answers) != len(prompts):
        raise RequestError(f"{len(answers)} answers for {len(prompts)} prompts; give one for each.")
    empty = [index for index, answer in enumerate(answers) if not len(answer)]
    if empty:
        raise RequestError(f"The answer to prompt {empty[0]} has no tokens; give it at least one.")
    checked = _checked(model, prompts, max(map(len, answers), default=1), statistics)
    runner = _Runner(model, statistics)

    def one(index: int, prompt: list[int]) -> list[int]:
        return runner.read(index, prompt, list(answers[index]))

    return _all(model, runner, checked, one, set(), progress)


def _checked(
    model: Model, prompts: Sequence[Sequence[int]], new: int, statistics: Sequence[Statistic]
) -> list[list[int]]:
    batch = model.batch(Batch.from_ids(prompts))
    labelled = [statistic for statistic in statistics if statistic.key_features is not None]
    check_request(model.spec, batch, new, (), [s for s in statistics if s.key_features is None])
    for statistic in labelled:
        assert statistic.key_features is not None
        rows, keys = statistic.key_features.shape[:2]
        if rows != len(batch) or keys < batch.ids.shape[1]:
            raise RequestError(
                f"{statistic.name!r} is given for {rows} prompts of {keys} tokens, but there are {len(batch)} of up to "
                f"{batch.ids.shape[1]}."
            )
    return [[int(token) for token in prompt] for prompt in prompts]


def _all(
    model: Model,
    runner: _Runner,
    prompts: list[list[int]],
    one: Callable[[int, list[int]], list[int]],
    stops: set[int],
    progress: Callable[[int, int], None] | None,
) -> Generation:
    """Every prompt, in the order of their tokens: neighbours there share the longest beginnings."""
    written: list[list[int]] = [[] for _ in prompts]
    found: list[dict[str, Tensor]] = [{} for _ in prompts]
    with model.attachment.observe(runner.attention):
        for done, index in enumerate(sorted(range(len(prompts)), key=lambda i: prompts[i]), start=1):
            written[index] = one(index, prompts[index])
            found[index] = runner.collect()
            if progress is not None:
                progress(done, len(prompts))
    new = torch.full((len(prompts), max(map(len, written))), -1)
    for row, tokens in zip(new, written, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    values = {name: _padded([one[name] for one in found], new.shape[1]) for name in found[0]}
    return Generation(new, texts_of(model, new, stops), values)


def _padded(rows: list[Tensor], steps: int) -> Tensor:
    """`[layer, head, step, ...]` of all prompts in one tensor, ended ones filled up."""
    shape = (len(rows), *rows[0].shape[:2], steps, *rows[0].shape[3:])
    whole = torch.full(shape, nothing_of(rows[0]), dtype=rows[0].dtype)
    for place, row in zip(whole, rows, strict=True):
        place[:, :, : row.shape[2]] = row
    return whole


class _Runner:
    """One model with one cache; the observer of its attention."""

    def __init__(self, model: Model, statistics: Sequence[Statistic]) -> None:
        from transformers import DynamicCache

        self._model, self._hf = model, model.attachment.hf_model
        self._statistics = statistics
        # Without a configuration every layer keeps all keys, so that any beginning can be gone back to.
        self._cache: Any = DynamicCache()
        self._held: list[int] = []
        self._features: Tensor | None = None
        self._rows = 0
        self._layers: dict[str, list[Tensor]] = {}
        self._blocks: dict[str, list[Tensor]] = {}

    def write(self, index: int, prompt: list[int], draft: list[int], most: int, stops: set[int]) -> list[int]:
        """The prompt's greedy continuation."""
        self._begin(index, prompt)
        written: list[int] = []
        source, guess = [*prompt, *draft], draft[: most - 1]
        while True:
            said = self._step([*prompt, *written], guess)
            right = next((at for at, token in enumerate(guess) if token != said[at]), len(guess))
            fresh = said[: right + 1]
            end = next((at for at, token in enumerate(fresh) if token in stops), len(fresh) - 1)
            fresh = fresh[: end + 1]
            self._keep(len(fresh))
            written += fresh
            if fresh[-1] in stops or len(written) >= most:
                return written
            guess = _looked_up(source, written)[: min(LOOKUP, most - len(written) - 1)]

    def read(self, index: int, prompt: list[int], answer: list[int]) -> list[int]:
        """The rows that would write the answer."""
        self._begin(index, prompt)
        self._step(prompt, answer[:-1])
        self._keep(len(answer))
        return answer

    def collect(self) -> dict[str, Tensor]:
        """The statistics of the prompt just done, `[layer, head, step, ...]`."""
        return {name: torch.cat(blocks, dim=2) for name, blocks in self._blocks.items()}

    def _begin(self, index: int, prompt: list[int]) -> None:
        self._blocks = {}
        given = [s.key_features[index] for s in self._statistics if s.key_features is not None]
        self._features = torch.cat(given, dim=-1)[: len(prompt)].to(self._model.device) if given else None

    def _step(self, text: list[int], guess: list[int]) -> list[int]:
        """Run what the cache lacks of the text, and the guess behind it; the most likely token after each row."""
        same = 0
        while same < min(len(self._held), len(text) - 1) and self._held[same] == text[same]:
            same += 1
        self._cut(same)
        left, rows = [*text[same:], *guess], len(guess) + 1
        # Before an empty cache any length runs without a mask.
        while same and len(left) > CHUNK + rows:
            self._forward(left[:CHUNK], 0)
            left = left[CHUNK:]
        found: list[int] = self._forward(left, rows).argmax(-1).tolist()
        return found

    def _cut(self, length: int) -> None:
        if length < len(self._held):
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
            self._held = self._held[:length]

    def _forward(self, ids: list[int], rows: int) -> Float[Tensor, "row vocab"]:
        start, self._rows, self._layers = len(self._held), rows, {}
        positions = torch.arange(start, start + len(ids), device=self._model.device)[None]
        output = self._hf(
            torch.tensor([ids], device=self._model.device),
            attention_mask=torch.ones(1, start + len(ids), dtype=torch.long, device=self._model.device),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=max(rows, 1),
        )
        self._held += ids
        logits: Tensor = output.logits[0]
        return logits

    def _keep(self, rows: int) -> None:
        """The first rows of the last pass's statistics; the rest belong to guesses that were wrong."""
        for name, layers in self._layers.items():
            heads = max(layer.shape[0] for layer in layers)
            even = [_widened(layer[:, :rows], heads) for layer in layers]
            self._blocks.setdefault(name, []).append(torch.stack(even))

    def attention(self, call: AttentionCall) -> Tensor:
        """The observer: measures the last rows of a pass."""
        if self._statistics and self._rows:
            self._measure(call.last_queries(self._rows))
        return call.output()

    def _measure(self, call: AttentionCall) -> None:
        request = reduce(lambda a, b: a | b, (s.request for s in self._statistics), StatisticsRequest(output=True))
        features = None
        if self._features is not None:
            features = self._features.new_zeros(1, call.k.shape[2], self._features.shape[-1])
            features[0, : len(self._features)] = self._features
        found, first = call.statistics(request, key_features=features), 0
        for statistic in self._statistics:
            own = None
            if statistic.key_features is not None:
                assert found.features is not None
                last = first + statistic.key_features.shape[-1]
                own, first = found.features[..., first:last], last
            value = statistic.read(Measured(found, request, call, own, None, None))
            self._layers.setdefault(statistic.name, []).append(value[0].cpu())


def _widened(layer: Tensor, heads: int) -> Tensor:
    """With empty heads, as many as the widest layer has."""
    short = heads - layer.shape[0]
    return torch.cat([layer, torch.full_like(layer[:1], nothing_of(layer)).expand(short, *layer.shape[1:])])


def _looked_up(source: Sequence[int], written: Sequence[int]) -> list[int]:
    """What follows the latest place of the source that ends as the text does (two tokens, else one)."""
    text = [*source, *written]
    for size in (2, 1):
        tail = text[-size:]
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == tail:
                return text[end : end + LOOKUP]
    return []
