"""`Model`: an attached model with its two verbs, capture and edit, behind `trace` and `generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Attachment, Batch, Certificate, Head, Spec
from workbench.models.adapters import Adapter
from workbench.models.batch import are_texts
from workbench.models.loading import Source
from workbench.models.memory import BodyCost, Prediction, free_memory, measure_body
from workbench.tracing.chunks import check_chunk, run_in_chunks
from workbench.tracing.edits import Ablation, Edit, listed
from workbench.tracing.job import Job, Logits, wanted_positions
from workbench.tracing.plan import Plan, refuse_large_patterns
from workbench.tracing.preflight import Preflight
from workbench.tracing.rotation import mean_queries
from workbench.tracing.statistics import Statistic, Statistics
from workbench.tracing.trace import Collector, Trace
from workbench.tracing.watch import Watch

Progress = Callable[[int, int], None]
Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Int[Tensor, "prompt token"] | Batch
# Prompts run together until they have this many tokens.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
_log = logging.getLogger("workbench")


@dataclass
class Model:
    """An attached, certified model.

    `trace` reads and edits a forward pass; `generate` continues prompts greedily under the same edits. The
    Hugging Face model itself is `attachment.hf_model`, with its own weights and code; `detach` gives it back as
    it was.
    """

    attachment: Attachment
    tokenizer: Any | None
    source: Source
    certificate: Certificate

    def __post_init__(self) -> None:
        self._cost: BodyCost | None = None
        self._told_of_length = False

    def __repr__(self) -> str:
        spec = self.spec
        shape = f"{spec.n_layers} layers, {len(spec.heads())} heads"
        return f"<Model {self.source.name}: {spec.architecture}, {shape}>"

    @property
    def spec(self) -> Spec:
        return self.attachment.spec

    @property
    def device(self) -> torch.device:
        return self.attachment.device

    @property
    def adapter(self) -> Adapter:
        """What runs the model: Hugging Face itself ("native"), or the library around it."""
        return self.attachment.host.name

    def detach(self) -> None:
        """Give the Hugging Face model its own attention back."""
        self.attachment.detach()

    def batch(self, prompts: Prompts, *, special_tokens: bool = True) -> Batch:
        """Prompts as a batch: texts (with the tokenizer's special tokens unless turned off) or token ids."""
        if isinstance(prompts, Batch):
            return prompts
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not are_texts(prompts):
            return Batch.from_ids(prompts)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise RequestError("This model came without a tokenizer; pass token ids, or load it with one.")
        rows = [self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"] for text in prompts]
        empty = [index for index, row in enumerate(rows) if not len(row)]
        if empty:
            raise RequestError(f"Prompt {empty[0]} ({prompts[empty[0]]!r}) has no tokens; give it some text.")
        return Batch.from_ids(rows, texts=prompts)  # type: ignore[arg-type]

    def trace(
        self,
        prompts: Prompts,
        *,
        statistics: Statistics = (),
        sites: Sequence[str] = (),
        edits: Edit | Sequence[Edit] = (),
        logits: Logits = None,
        loss: bool = False,
        tokens_at_once: int | None = None,
        chunk: int | None = None,
        memory_limit: int | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Run prompts once; read statistics and sites, under edits.

        Args:
            statistics: from `workbench.statistics`; exact, streaming, of every head.
            sites: names of `workbench.tracing.SITES` for all layers, or `"blocks.5.attn.hook_z"` for one.
            edits: from `ablate` and `patch`; statistics see the model as edited in earlier layers.
            logits: "last", "all", or positions `[prompt, kept]`.
            loss: nats of each next token.
            tokens_at_once: prompts are run together up to this many tokens.
            chunk: prompts longer than this run one by one, in chunks of so many tokens over a KV cache: the same
                numbers, in the memory of the cache and one chunk.
            memory_limit: bytes that the trace may take beyond the weights; what is free by default.
            progress: called with (done, in all), counted in prompts, and in chunks where a prompt has several.

        Raises:
            MemoryRefused: before allocation, with the predicted peak and what would fit.
        """
        job = self._job(prompts, statistics, sites, listed(edits), logits, loss, tokens_at_once, chunk)
        batch, prediction = job.batch, self._predict(job)
        prediction.check(free_memory(self.device) if memory_limit is None else memory_limit, job.advice)
        _log.info("trace of %d prompts, %d tokens: %s", len(batch), int(batch.mask.sum()), prediction)
        self._tell_of_length(int(batch.lengths.max()))
        collector = Collector(batch, self.spec, job.plan.statistics, prediction)
        collector.trace.logit_positions = job.wanted
        done, total = 0, sum(job.steps(piece) for _, piece in job.pieces)

        def step(count: int = 1) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        for rows, piece in job.pieces:
            if job.in_chunks(piece):
                self._run_in_chunks(job, rows, collector, step)
            else:
                collector.rows = rows
                self._run(job, rows, piece, collector)
                step(len(piece))
        return collector.finish()

    def predict_memory(
        self,
        prompts: Any,
        *,
        statistics: Statistics = (),
        sites: Sequence[str] = (),
        logits: Logits = None,
        loss: bool = False,
        tokens_at_once: int | None = None,
        chunk: int | None = None,
    ) -> Prediction:
        """The peak that `trace` with these arguments would reach beyond the weights; runs three short probes."""
        return self._predict(self._job(prompts, statistics, sites, (), logits, loss, tokens_at_once, chunk))

    def head_outputs(self, prompts: Any, heads: Iterable[Head], *, mean: bool) -> dict[Head, Tensor]:
        """z of heads on reference prompts: all `[prompt, token, dim]`, or its mean over real tokens `[dim]`."""
        chosen = list(heads)
        batch = self.batch(prompts)
        layers = sorted({head.layer for head in chosen})
        found = self.trace(batch, sites=[f"blocks.{layer}.attn.hook_z" for layer in layers])
        outputs = {head: found.site("z", head.layer)[:, :, head.head] for head in chosen}
        real = batch.mask.cpu()
        return {head: z[real].float().mean(0) for head, z in outputs.items()} if mean else outputs

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 50,
        *,
        edits: Edit | Sequence[Edit] = (),
        statistics: Statistics = (),
        stop_ids: Iterable[int] | None = None,
        phase: str = "both",
    ) -> Any:
        """Continue prompts greedily; see `workbench.tracing.generate.generate`."""
        from workbench.tracing.generate import check_request, generate

        batch, wanted, edits = self._checked(self.batch(prompts)), _flatten(statistics), listed(edits)
        check_request(self.spec, batch, max_new_tokens, edits, wanted, phase)  # type: ignore[arg-type]
        self._tell_of_length(int(batch.lengths.max()) + max_new_tokens - 1)
        return generate(self, batch, max_new_tokens, self._resolved(edits, batch), wanted, stop_ids, phase)  # type: ignore[arg-type]

    def _checked(self, batch: Batch) -> Batch:
        low, high = int(batch.ids[batch.mask].min()), int(batch.ids[batch.mask].max())
        if low < 0 or high >= self.spec.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"Token id {wrong} is outside the vocabulary of {self.spec.vocab_size}.")
        longest, most = int(batch.lengths.max()), self.spec.max_positions
        if most is not None and not self.spec.rotary and longest > most:
            raise RequestError(f"A prompt of {longest} tokens exceeds the model's {most} learned positions; cut it.")
        return batch

    def _tell_of_length(self, longest: int) -> None:
        """Warn, once a model, of more tokens than it was trained for: rotation goes on, but into the unknown."""
        most = self.spec.max_positions
        if self.spec.rotary and most is not None and longest > most and not self._told_of_length:
            self._told_of_length = True
            _log.warning(
                "%s was made for %d positions, and a prompt reaches %d: beyond them it may behave otherwise than "
                "within. Cut the prompts to stay within. (Said once.)",
                self.source.name, most, longest,
            )  # fmt: skip

    def _resolved(self, edits: Sequence[Edit], batch: Batch, chunk: int | None = None) -> list[Edit]:
        """Edits with their reference prompts run, so that the plan holds values only."""
        resolved: list[Edit] = []
        for edit in edits:
            if isinstance(edit, Ablation) and edit.how == "frozen_zero" and edit.unresolved:
                edit.check(self.spec)
                edit = replace(edit, frozen=self._clean_keys(batch, min(head.layer for head in edit.heads), chunk))
            elif isinstance(edit, Ablation) and edit.unresolved:
                assert edit.reference is not None
                edit.check(self.spec)
                edit = replace(edit, values=self._values(edit, edit.reference, batch))
            resolved.append(edit)
        return resolved

    def _values(self, edit: Ablation, reference: Batch, batch: Batch) -> dict[Head, Tensor]:
        """What the edit puts in place, from its reference prompts."""
        if edit.how == "q_mean":
            return mean_queries(self, self._checked(self.batch(reference)), edit.heads)
        if edit.how == "resample":
            _check_reference(reference, batch)
        return self.head_outputs(reference, edit.heads, mean=edit.how == "mean")

    def _clean_keys(self, batch: Batch, first: int, chunk: int | None) -> dict[int, tuple[Tensor, Tensor]]:
        """q and k of the unedited run, in all layers after `first`: they fix every pattern without storing one."""
        layers = range(first + 1, self.spec.n_layers)
        if not layers:
            return {}
        names = [f"blocks.{layer}.attn.hook_{self._rotated}{name}" for layer in layers for name in "qk"]
        found = self.trace(batch, sites=names, chunk=chunk)
        return {layer: (found.site("q", layer), found.site("k", layer)) for layer in layers}

    @property
    def _rotated(self) -> str:
        return "rot_" if self.spec.rotary else ""

    def pieces(self, batch: Batch, tokens_at_once: int | None = None) -> Iterator[tuple[slice, Batch]]:
        """Consecutive prompts, cut to the longest among them on the right."""
        if tokens_at_once is not None and tokens_at_once < 1:
            raise RequestError(f"tokens_at_once = {tokens_at_once}: a trace takes at least 1 token at a time.")
        budget = tokens_at_once or TOKENS_AT_ONCE.get(self.device.type, TOKENS_AT_ONCE["cuda"])
        ends = (batch.starts + batch.lengths).tolist()
        first = 0
        while first < len(batch):
            last, width = first + 1, ends[first]
            while last < len(batch) and max(width, ends[last]) * (last + 1 - first) <= budget:
                width = max(width, ends[last])
                last += 1
            rows = slice(first, last)
            yield rows, Batch(batch.ids[rows, :width], batch.mask[rows, :width])
            first = last

    def _job(
        self,
        prompts: Any,
        statistics: Statistics,
        sites: Sequence[str],
        edits: Sequence[Edit],
        logits: Logits,
        loss: bool,
        tokens_at_once: int | None,
        chunk: int | None,
    ) -> Job:
        """Everything checked that can be before the model runs (but for reference prompts of edits)."""
        batch = self._checked(self.batch(prompts))
        wanted = wanted_positions(batch, logits)
        plan = Plan.compile(self.spec, _flatten(statistics), sites, edits)
        check_chunk(chunk, plan)
        refuse_large_patterns(plan, self.spec, batch)
        if any(isinstance(edit, Ablation) and edit.unresolved for edit in edits):
            plan = Plan.compile(self.spec, plan.statistics, sites, self._resolved(edits, batch, chunk))
        plan = plan.laid_out(self.spec, batch)
        return Job(batch, plan, list(self.pieces(batch, tokens_at_once)), wanted, loss, chunk)

    def _predict(self, job: Job) -> Prediction:
        if self._cost is None:
            self._cost = measure_body(self.attachment)
        preflight = Preflight(self.attachment, self._cost, job.plan, job.batch, job.wanted, job.loss)
        return preflight.predict([job.measured(rows, piece) for rows, piece in job.pieces])

    @torch.no_grad()
    def _run(self, job: Job, rows: slice, piece: Batch, collector: Collector) -> None:
        width = piece.ids.shape[1]
        watch = Watch(self.attachment, job.plan, rows, width, collector.statistic, collector.site)
        own, kept = job.own(rows, width), job.kept(rows, piece)
        options: dict[str, Any] = {"logits_to_keep": kept.to(self.device)}
        piece = piece.to(self.device)
        if piece.padded:
            options |= {"attention_mask": piece.mask.long(), "position_ids": piece.positions}
        with watch.running():
            logits = self.attachment.hf_model(piece.ids, use_cache=False, **options).logits
        if own is not None:
            collector.logits(logits, kept, own)
        if job.loss:
            collector.loss(logits, piece.ids[:, 1:])

    def _run_in_chunks(self, job: Job, rows: slice, collector: Collector, step: Callable[[], None]) -> None:
        assert job.chunk is not None
        for row in range(rows.start, rows.stop):
            wanted = None if job.wanted is None else job.wanted[row]
            run_in_chunks(self.attachment, job.plan, collector, row, job.chunk, wanted, job.loss, step)


def _flatten(statistics: Statistics) -> list[Statistic]:
    flat: list[Statistic] = []
    # One statistic stands for a list of one.
    for statistic in [statistics] if isinstance(statistics, Statistic) else statistics:
        flat.extend(statistic if isinstance(statistic, tuple) else [statistic])
    for found in flat:
        if not isinstance(found, Statistic):
            raise RequestError(
                f"{found!r} is no statistic; make one, e.g. statistics=[workbench.statistics.entropy()]."
            )
    return flat


def _check_reference(reference: Batch, batch: Batch) -> None:
    """Resampling takes z column by column, so the reference needs a real token wherever the batch has one."""
    rows, columns = batch.ids.shape
    mask = reference.mask[:rows, :columns].cpu()
    mask = mask.expand(rows, -1) if len(mask) == 1 else mask
    if mask.shape != batch.mask.shape or bool((batch.mask.cpu() & ~mask).any()):
        raise RequestError(
            f"ablate(how='resample'): {len(reference)} reference prompts of up to {reference.ids.shape[1]} tokens "
            f"have no token in some columns of the batch, {rows} prompts of up to {columns}; use reference prompts "
            "at least as long and as many (or one), padded on the same side."
        )
