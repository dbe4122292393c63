"""What prompts are continued with, written by the model or given, with statistics of the rows that produce it.

Many prompts of a grid begin alike, and a step of decoding costs about as much for twenty texts as for one: it is the
weights that have to be read. So:

1. Prompts are taken in the order of their tokens; one KV cache is cut back to what the next prompt shares with the one
   before, so that every shared beginning is run once.
2. A prompt's last row gives the first new token. The prompt is then set aside with its keys, and all that are set
   aside are written together, a token of each a pass. When room or number is exhausted, passes go on until half of them
   have ended, and more prompts are read.
3. Queries of the rows that write are noted as they pass; statistics are taken of all rows of an answer at once when it
   has ended, and only if they are wanted (`wanted`: failed trials of a needle test are not).

The result is greedy decoding's up to rounding: a token whose lead over the next is within it may fall differently. For
a given continuation every row is read at once as if its token had been written.

Cost: each distinct beginning once, and the answers; memory of one path, and of `ROOM` bytes of keys set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import RequestError
from workbench.kernels import StatisticsRequest
from workbench.models import AttentionCall, Batch
from workbench.tracing.branches import Ends, Path, Text, room
from workbench.tracing.generate import Generation, check_request, nothing_of, stop_tokens, texts_of
from workbench.tracing.model import Model
from workbench.tracing.statistics import Measured, Statistic

# Tokens run at once against a filled cache: attention there takes a mask of so many rows.
CHUNK = 1024
# Bytes of keys set aside (a quarter of what is free if that is less, or on a GPU), and texts written together at most.
ROOM, MOST = 1 << 30, 32


@torch.no_grad()
def continue_greedily(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *,
    statistics: Sequence[Statistic] = (),
    stop_ids: Iterable[int] | None = None,
    wanted: Callable[[int, Sequence[int]], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue prompts greedily, as `Model.generate` does.

    Args:
        prompts: token ids of each, without padding.
        statistics: row statistics, and masses on labelled keys (`statistics.mass`, one row a prompt; keys behind the
            prompt do not count).
        stop_ids: tokens that end an answer; the model's own end tokens by default.
        wanted: told a prompt's place and what was written, says whether its statistics are read; all are by default.
    """
    checked = _checked(model, prompts, max_new_tokens, statistics)
    stops = stop_tokens(model) if stop_ids is None else set(stop_ids)
    reader = _Reader(model, statistics, len(checked), wanted, progress)
    with model.attachment.observe(reader.attention):
        for index in _in_order(checked):
            reader.write(Text(index, checked[index]), max_new_tokens, stops)
        reader.finish(max_new_tokens, stops)
    return reader.generation(stops)


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
    reader = _Reader(model, statistics, len(checked), None, progress)
    with model.attachment.observe(reader.attention):
        for index in _in_order(checked):
            reader.read(Text(index, checked[index]), list(answers[index]))
    return reader.generation(set())


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


def _in_order(prompts: list[list[int]]) -> list[int]:
    """In the order of their tokens: neighbours there share the longest beginnings."""
    return sorted(range(len(prompts)), key=lambda index: prompts[index])


class _Reader:
    """One model with a path and ends; the observer of its attention."""

    def __init__(
        self,
        model: Model,
        statistics: Sequence[Statistic],
        prompts: int,
        wanted: Callable[[int, Sequence[int]], bool] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._model, self._hf = model, model.attachment.hf_model
        self._statistics, self._wanted, self._progress = statistics, wanted, progress
        self._path, self._ends, self._room = Path(), Ends(), room(model.device, ROOM)
        # The path's tokens; the text that is read along it, how many of its rows write, and whether ends run instead.
        self._held: list[int] = []
        self._reading: Text | None = None
        self._rows, self._together = 0, False
        # Constants of each layer's attention, and the layer of the cache behind it.
        self._layers: dict[int, tuple[AttentionCall, int]] = {}
        self._written: list[list[int]] = [[] for _ in range(prompts)]
        self._found: list[dict[str, Tensor] | None] = [None] * prompts
        self._like: dict[str, Tensor] = {}
        self._done = 0

    def read(self, text: Text, answer: list[int]) -> None:
        """The rows that would write the answer."""
        self._run(text, answer[:-1])
        text.written = answer
        self._end(text)

    def write(self, text: Text, most: int, stops: set[int]) -> None:
        """The first token of the prompt's greedy continuation; the rest comes with that of others."""
        text.written = [self._run(text, [])]
        if text.written[-1] in stops or most == 1:
            self._end(text)
            return
        capacity = text.keys + most - 1
        self._make_room(capacity * self._path.bytes_per_token(), most, stops)
        text.store = self._path.copy(text.keys, capacity)
        self._ends.add(text)

    def finish(self, most: int, stops: set[int]) -> None:
        """Write all that are left to their end."""
        while self._ends.texts:
            self._pass(most, stops)

    def generation(self, stops: set[int]) -> Generation:
        """What was written and found, in the order of the prompts."""
        new = torch.full((len(self._written), max(map(len, self._written))), -1)
        for row, tokens in zip(new, self._written, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        values = {name: self._padded(name, new.shape[1]) for name in self._like}
        return Generation(new, texts_of(self._model, new, stops), values)

    def attention(self, call: AttentionCall) -> Tensor:
        """The observer: notes the queries of rows that write."""
        if self._together:
            calls = self._ends.each(call)
            for text, own in zip(self._ends.texts, calls, strict=True):
                self._note(text, call.layer, own.q[0])
            return torch.cat([own.output() for own in calls])
        if self._reading is not None and self._rows:
            self._note(self._reading, call.layer, call.q[0, :, -self._rows :])
            nothing = {name: getattr(call, name)[:, :, :0].clone() for name in ("q", "k", "v")}
            self._layers[call.layer] = replace(call, **nothing), self._path.layer_of(call)
        return call.output()

    def _note(self, text: Text, layer: int, queries: Float[Tensor, "head row dim"]) -> None:
        if self._statistics:
            text.queries.setdefault(layer, []).append(queries.clone())

    def _run(self, text: Text, given: list[int]) -> int:
        """Run what the path lacks of the prompt, and the tokens given behind it; the most likely token after them."""
        same, rows = 0, len(given) + 1
        while same < min(len(self._held), len(text.prompt) - 1) and self._held[same] == text.prompt[same]:
            same += 1
        self._path.cut(same)
        self._held = self._held[:same]
        self._reading, left = text, [*text.prompt[same:], *given]
        # Before an empty cache any length runs without a mask.
        while same and len(left) > CHUNK + rows:
            self._forward(left[:CHUNK], 0)
            left = left[CHUNK:]
        return self._forward(left, rows)

    def _forward(self, ids: list[int], rows: int) -> int:
        start, self._rows = len(self._held), rows
        places = range(start, start + len(ids))
        self._held += ids
        return int(self._call([ids], [list(places)], len(self._held), self._path)[0])

    def _call(self, ids: list[list[int]], places: list[list[int]], keys: int, cache: Any) -> Tensor:
        """One pass; the most likely token after each row of ids."""
        device = self._model.device
        output = self._hf(
            torch.tensor(ids, device=device),
            attention_mask=torch.ones(len(ids), keys, dtype=torch.long, device=device),
            position_ids=torch.tensor(places, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        found: Tensor = output.logits[:, -1].argmax(-1)
        return found

    def _make_room(self, size: int, most: int, stops: set[int]) -> None:
        """Where one more does not fit, pass until no more than half of what fits is left."""
        if len(self._ends.texts) < MOST and self._ends.bytes() + size <= self._room:
            return
        while self._ends.texts and (len(self._ends.texts) > MOST // 2 or self._ends.bytes() + size > self._room // 2):
            self._pass(most, stops)

    def _pass(self, most: int, stops: set[int]) -> None:
        """One token more of each text set aside; those that have ended leave."""
        texts, self._together = self._ends.texts, True
        tokens = self._call([[text.written[-1]] for text in texts], [[text.keys] for text in texts], 1, self._ends)
        self._together = False
        for text, token in zip(list(texts), tokens.tolist(), strict=True):
            text.written.append(token)
            if token in stops or len(text.written) >= most:
                texts.remove(text)
                self._end(text)

    def _end(self, text: Text) -> None:
        """Keep what was written, and its statistics where they are wanted (once in any case, for their shapes)."""
        self._written[text.index] = text.written
        keep = self._wanted is None or self._wanted(text.index, text.written)
        if self._statistics and (keep or not self._like):
            found = self._measured(text)
            self._like = self._like or {name: value[:, :, :0] for name, value in found.items()}
            self._found[text.index] = found if keep else None
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self._written))

    def _measured(self, text: Text) -> dict[str, Tensor]:
        """Statistics of the rows that wrote a text, `[layer, head, step, ...]`."""
        found: dict[str, list[Tensor]] = {}
        store = self._path.store() if text.store is None else text.store
        for layer, (constants, place) in sorted(self._layers.items()):
            keys, values = (part[None, :, : text.keys] for part in store[place])
            queries = torch.cat(text.queries[layer], dim=1)[None]
            call = replace(constants, q=queries, k=keys, v=values)
            for name, value in _read(call, self._statistics, text).items():
                found.setdefault(name, []).append(value)
        return {name: _even(layers) for name, layers in found.items()}

    def _padded(self, name: str, steps: int) -> Tensor:
        """`[prompt, layer, head, step, ...]`, filled up behind the end of an answer and where none was wanted."""
        like = self._like[name]
        shape = (len(self._found), *like.shape[:2], steps, *like.shape[3:])
        whole = torch.full(shape, nothing_of(like), dtype=like.dtype)
        for place, found in zip(whole, self._found, strict=True):
            if found is not None:
                place[:, :, : found[name].shape[2]] = found[name]
        return whole


def _read(call: AttentionCall, statistics: Sequence[Statistic], text: Text) -> dict[str, Tensor]:
    """Each statistic of one layer, `[head, step, ...]`; keys behind the prompt have no label."""
    request = reduce(lambda a, b: a | b, (s.request for s in statistics), StatisticsRequest(output=True))
    given = [s.key_features[text.index, : len(text.prompt)] for s in statistics if s.key_features is not None]
    features = None
    if given:
        labels = torch.cat(given, dim=-1).to(call.q.device)
        features = labels.new_zeros(1, call.k.shape[2], labels.shape[-1])
        features[0, : len(labels)] = labels
    found, first, values = call.statistics(request, key_features=features), 0, {}
    for statistic in statistics:
        own = None
        if statistic.key_features is not None:
            assert found.features is not None
            last = first + statistic.key_features.shape[-1]
            own, first = found.features[..., first:last], last
        values[statistic.name] = statistic.read(Measured(found, request, call, own, None, None))[0].cpu()
    return values


def _even(layers: list[Tensor]) -> Tensor:
    """Layers side by side; with empty heads where one has fewer than the widest."""
    heads = max(layer.shape[0] for layer in layers)
    return torch.stack(
        [torch.cat([x, torch.full_like(x[:1], nothing_of(x)).expand(heads - x.shape[0], *x.shape[1:])]) for x in layers]
    )
