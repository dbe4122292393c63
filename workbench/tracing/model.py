"""`Model`: an attached model with its two verbs, capture and edit, behind `trace` and `generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import RequestError
from workbench.models import Attachment, Batch, Certificate, Head, Spec, attach_model
from workbench.models.loading import Source, resolve
from workbench.models.memory import BodyCost, Prediction, free_memory, measure_body
from workbench.tracing.edits import Ablation, Edit
from workbench.tracing.plan import Plan, predict, refuse_large_patterns
from workbench.tracing.statistics import Statistic
from workbench.tracing.trace import Collector, Trace
from workbench.tracing.watch import Watch

Progress = Callable[[int, int], None]
Logits = Literal["last", "all"] | Int[Tensor, "prompt kept"] | None
# Prompts run together until they have this many tokens.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65536}
_log = logging.getLogger("workbench")


@dataclass
class Model:
    """An attached, certified model.

    `trace` reads and edits a forward pass; `generate` continues prompts greedily under the same edits. The Hugging
    Face model itself is `attachment.hf_model`, with its own weights and code; `detach` gives it back as it was.
    """

    attachment: Attachment
    tokenizer: Any | None
    source: Source
    certificate: Certificate

    def __post_init__(self) -> None:
        self._cost: BodyCost | None = None

    def __repr__(self) -> str:
        spec = self.spec
        return f"<Model {self.source.name}: {spec.architecture}, {spec.n_layers} layers, {len(spec.heads())} heads>"

    @property
    def spec(self) -> Spec:
        return self.attachment.spec

    @property
    def device(self) -> torch.device:
        return self.attachment.device

    def detach(self) -> None:
        """Give the Hugging Face model its own attention back."""
        self.attachment.detach()

    def batch(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]] | Batch, *, special_tokens: bool = True
    ) -> Batch:
        """Prompts as a batch: texts (the tokenizer's own special tokens unless turned off) or lists of token ids."""
        if isinstance(prompts, Batch):
            return prompts
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not len(prompts):
            raise RequestError("No prompts were given.")
        if not isinstance(prompts[0], str):
            return Batch.from_ids(prompts)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise RequestError("This model came without a tokenizer; pass token ids, or load it with one.")
        rows = [self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"] for text in prompts]
        empty = [index for index, row in enumerate(rows) if not row]
        if empty:
            raise RequestError(f"Prompt {empty[0]} ({prompts[empty[0]]!r}) has no tokens; give it some text.")
        return Batch.from_ids(rows, texts=prompts)  # type: ignore[arg-type]

    def trace(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]] | Batch,
        *,
        statistics: Iterable[Statistic | tuple[Statistic, ...]] = (),
        sites: Sequence[str] = (),
        edits: Sequence[Edit] = (),
        logits: Logits = None,
        loss: bool = False,
        tokens_at_once: int | None = None,
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
            memory_limit: bytes that the trace may take beyond the weights; what is free by default.
            progress: called with (prompts done, prompts in all).

        Raises:
            MemoryRefused: before allocation, with the predicted peak and what would fit.
        """
        batch = self._checked(self.batch(prompts))
        plan = Plan.compile(self.spec, _flatten(statistics), sites, self._resolved(edits, batch))
        refuse_large_patterns(plan, self.spec, batch)
        pieces = list(self._pieces(batch, tokens_at_once))
        wanted = _wanted_positions(batch, logits)
        prediction = self._predict(plan, batch, max(pieces, key=lambda p: p[1].ids.numel())[1], wanted, loss)
        prediction.check(
            free_memory(self.device) if memory_limit is None else memory_limit,
            f"Cut the prompts, trace fewer of them, or lower tokens_at_once (now {pieces[0][1].ids.numel()} tokens).",
        )
        _log.info("trace of %d prompts, %d tokens: %s", len(batch), int(batch.mask.sum()), prediction)
        collector = Collector(batch, self.spec, plan.statistics, prediction)
        collector.trace.logit_positions = wanted
        for rows, piece in pieces:
            collector.rows = rows
            self._run(plan, rows, piece, wanted, loss, collector)
            if progress is not None:
                progress(rows.stop, len(batch))
        return collector.finish()

    def predict_memory(
        self, prompts: Any, *, statistics: Iterable[Statistic | tuple[Statistic, ...]] = (), sites: Sequence[str] = (),
        logits: Logits = None, loss: bool = False, tokens_at_once: int | None = None,
    ) -> Prediction:  # fmt: skip
        """The peak that `trace` with these arguments would reach beyond the weights; runs nothing but two probes."""
        batch = self._checked(self.batch(prompts))
        plan = Plan.compile(self.spec, _flatten(statistics), sites, ())
        largest = max(self._pieces(batch, tokens_at_once), key=lambda piece: piece[1].ids.numel())[1]
        return self._predict(plan, batch, largest, _wanted_positions(batch, logits), loss)

    def head_outputs(self, prompts: Any, heads: Iterable[Head], *, mean: bool) -> dict[Head, Tensor]:
        """z of heads on reference prompts: their mean over all real positions `[dim]`, or all `[prompt, token, dim]`."""
        chosen = list(heads)
        batch = self.batch(prompts)
        layers = sorted({head.layer for head in chosen})
        found = self.trace(batch, sites=[f"blocks.{layer}.attn.hook_z" for layer in layers])
        outputs = {head: found.site("z", head.layer)[:, :, head.head] for head in chosen}
        return {head: z[batch.mask].mean(0) for head, z in outputs.items()} if mean else outputs

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 50,
        *,
        edits: Sequence[Edit] = (),
        statistics: Iterable[Statistic | tuple[Statistic, ...]] = (),
        stop_ids: Iterable[int] | None = None,
    ) -> Any:
        """Continue prompts greedily; see `workbench.tracing.generate.generate`."""
        from workbench.tracing.generate import generate

        batch = self._checked(self.batch(prompts))
        return generate(
            self, batch, max_new_tokens, self._resolved(edits, batch), _flatten(statistics), stop_ids
        )

    # --- inside ------------------------------------------------------------------------------------------------

    def _checked(self, batch: Batch) -> Batch:
        low, high = int(batch.ids[batch.mask].min()), int(batch.ids[batch.mask].max())
        if low < 0 or high >= self.spec.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"Token id {wrong} is outside the vocabulary of {self.spec.vocab_size}.")
        longest, most = int(batch.lengths.max()), self.spec.max_positions
        if most is not None and not self.spec.rotary and longest > most:
            raise RequestError(
                f"A prompt of {longest} tokens exceeds the model's {most} learned positions; cut it."
            )
        return batch

    def _resolved(self, edits: Sequence[Edit], batch: Batch) -> list[Edit]:
        """Edits with their reference prompts run, so that the plan holds values only."""
        resolved: list[Edit] = []
        for edit in edits:
            if isinstance(edit, Ablation) and edit.values is None and edit.reference is not None:
                edit.check(self.spec)
                values = self.head_outputs(edit.reference, edit.heads, mean=edit.how == "mean")
                edit = replace(edit, values=values)
            resolved.append(edit)
        return resolved

    def _pieces(self, batch: Batch, tokens_at_once: int | None) -> Iterator[tuple[slice, Batch]]:
        """Consecutive prompts, cut to the longest among them on the right."""
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

    def _predict(
        self, plan: Plan, batch: Batch, piece: Batch, wanted: Tensor | None, loss: bool
    ) -> Prediction:
        if self._cost is None:
            self._cost = measure_body(self.attachment)
        kept = None if loss else _kept(wanted, piece.ids.shape[1])
        return predict(self.attachment, self._cost, plan, batch, piece, kept, wanted, loss)

    @torch.no_grad()
    def _run(
        self, plan: Plan, rows: slice, piece: Batch, wanted: Tensor | None, loss: bool, collector: Collector
    ) -> None:
        width = piece.ids.shape[1]
        watch = Watch(self.attachment, plan, rows, width, collector.statistic, collector.site)
        own = None if wanted is None else wanted[rows].clamp(max=width - 1)
        kept = torch.arange(width) if loss else _kept(own, width)
        options: dict[str, Any] = {"logits_to_keep": kept.to(self.device)}
        piece = piece.to(self.device)
        if piece.padded:
            options |= {"attention_mask": piece.mask.long(), "position_ids": piece.positions}
        with watch.running():
            logits = self.attachment.hf_model(piece.ids, use_cache=False, **options).logits
        if own is not None:
            collector.logits(logits, kept, own)
        if loss:
            collector.loss(logits, piece.ids)


def load(
    x: Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Model:
    """Load and attach a model, and certify that our view of it is the model.

    `x` is a hub name, a local folder, a GGUF file, a built-in name (`smollm2-135m`), a Hugging Face model in memory,
    or a pair of model and tokenizer. Raises `SourceError` where it cannot be found, `ModelRefused` (by name) where an
    architecture or configuration field is not one that we reproduce, and `CertificateFailed` where a check fails.
    """
    found = resolve(x, dtype=dtype, device=device, revision=revision)
    attachment, certificate = attach_model(found.model)
    return Model(attachment, found.tokenizer, found.source, certificate)


def _flatten(statistics: Iterable[Statistic | tuple[Statistic, ...]]) -> list[Statistic]:
    flat: list[Statistic] = []
    for statistic in statistics:
        flat.extend(statistic if isinstance(statistic, tuple) else [statistic])
    return flat


def _wanted_positions(batch: Batch, logits: Logits) -> Tensor | None:
    if logits is None:
        return None
    if isinstance(logits, Tensor):
        if logits.ndim != 2 or len(logits) != len(batch):
            raise RequestError(
                f"logits: positions of shape {tuple(logits.shape)} for {len(batch)} prompts; give [prompt, kept]."
            )
        if int(logits.min()) < 0 or int(logits.max()) >= batch.ids.shape[1]:
            raise RequestError(
                f"logits: position {int(logits.max())} is outside the batch of {batch.ids.shape[1]} columns."
            )
        return logits.cpu()
    if logits == "last":
        return (batch.starts + batch.lengths - 1)[:, None].cpu()
    if logits == "all":
        return torch.arange(batch.ids.shape[1]).expand(len(batch), -1)
    raise RequestError(f"logits={logits!r}: choose 'last', 'all' or positions [prompt, kept].")


def _kept(wanted: Tensor | None, width: int) -> Tensor:
    """Columns whose logits the model computes: all that some prompt wants, or only the last."""
    return torch.tensor([width - 1]) if wanted is None else torch.unique(wanted)
