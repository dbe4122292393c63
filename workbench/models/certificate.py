"""Proof, on attach, that our view of a model is the model.

Each check has a measured error and a tolerance; one failure refuses the model. Errors of logits and outputs are the
largest absolute difference divided by the largest absolute value, so they read the same for all models. In half
precision the error of logits is that of the median position: rounding then flips the routing of single tokens in
mixtures of experts, in our run as between any two backends.

1. logits: the model under our attention function, statistics computed on the way, against the untouched model.
2. output: attention rebuilt in float64 from the captured q, k, v, against the untouched module's own output. Each
   layer goes on with the untouched output, so that rounding does not add up.
3. rows: each row of the pattern sums to one, or to one minus the mass of the learned sink.
4. causal: later tokens change nothing at earlier positions.
5. padding, left and right: padding changes nothing for real tokens.
6. edit: zeroing a layer's z changes the logits (and putting back its own z does not); layers that write nothing
   are passed over.
7. adapter, where a library runs the model: our logits against those of its own call, and each pattern against its
   own, where it gives patterns.

The probe is two prompts of random tokens; the second repeats its first half, which gives induction something to
attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import CertificateFailed, RequestError
from workbench.kernels import StatisticsRequest, attention_pattern
from workbench.models.adapters import Host
from workbench.models.architectures import LayerModules, describe, locate
from workbench.models.attach import Attachment, AttentionCall
from workbench.models.batch import Batch

PROBE_TOKENS = 48
# Statistics, and z with them, are float32 also in a float64 model.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Check:
    """One check: `passed` when the measured error is within the tolerance."""

    name: str
    measured: float
    tolerance: float
    passed: bool
    detail: str


@dataclass(frozen=True)
class Certificate:
    """All checks of one attachment."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    def require(self) -> None:
        """Refuse a model that failed a check."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            reasons = "; ".join(f"{c.name}: {c.measured:.2g} (tolerance {c.tolerance:.2g}), {c.detail}" for c in failed)
            raise CertificateFailed(f"The model is refused, because our view of it is not the model. {reasons}.")


@dataclass(frozen=True)
class _Untouched:
    """What the model does on the probe before we attach."""

    batch: Batch
    logits: Tensor
    z: list[Tensor]
    own_logits: Tensor | None = None
    own_patterns: tuple[Tensor, ...] = ()


def attach_model(model: nn.Module | Host, *, seed: int = 0) -> tuple[Attachment, Certificate]:
    """Attach and certify; raises `CertificateFailed` if a check fails, and leaves the model as it was."""
    host = model if isinstance(model, Host) else Host(model)
    hf_model = host.running
    probe = _probe(hf_model, seed)
    untouched = _own(host, _run_untouched(hf_model, probe))
    if hf_model.training and not torch.equal(untouched.logits, _run_untouched(hf_model, probe).logits):
        raise RequestError(
            "The model is in training mode and two runs of it differ (dropout); call model.eval() first."
        )
    attachment = Attachment(host)
    try:
        certificate = Certificate(tuple(_checks(attachment, untouched)))
        certificate.require()
    except BaseException:
        # A traceback that someone keeps would keep the attachment, too.
        attachment.detach()
        raise
    return attachment, certificate


def _probe(hf_model: nn.Module, seed: int) -> Batch:
    spec = describe(hf_model)
    tokens = min(PROBE_TOKENS, spec.max_positions or PROBE_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.vocab_size, (2, tokens), generator=generator)
    ids[1, tokens - tokens // 2 :] = ids[1, : tokens // 2]
    device = next(hf_model.parameters()).device
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool)).to(device)


@torch.no_grad()
def _run_untouched(hf_model: nn.Module, batch: Batch) -> _Untouched:
    z: list[Tensor] = []
    hooks = [
        layer.projection.register_forward_pre_hook(lambda module, args: z.append(args[0].detach()))
        for layer in locate(hf_model)
    ]
    try:
        logits = forward(hf_model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return _Untouched(batch, logits, z)


@torch.no_grad()
def _own(host: Host, untouched: _Untouched) -> _Untouched:
    """With what the library around the model gives by its own call."""
    ids = untouched.batch.ids
    return replace(untouched, own_logits=host.own_logits(ids), own_patterns=tuple(host.own_patterns(ids)))


def forward(hf_model: Any, batch: Batch, **options: Any) -> Tensor:
    """Logits of a batch; positions count real tokens, so padding on either side shifts nothing."""
    if batch.padded:
        options |= {"attention_mask": batch.mask.long(), "position_ids": batch.positions}
    logits: Tensor = hf_model(batch.ids, use_cache=False, **options).logits
    return logits


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def _logit_error(found: Float[Tensor, "*place vocab"], truth: Float[Tensor, "*place vocab"]) -> float:
    """Relative error at the worst position; in half precision, at the median one."""
    error = (found - truth).abs().amax(-1) / truth.abs().max().clamp(min=1e-30)
    half = truth.dtype in (torch.bfloat16, torch.float16)
    return float(error.float().median() if half else error.max())


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one is, which Python's own `max` may pass over."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def _checks(attachment: Attachment, untouched: _Untouched) -> list[Check]:
    tolerance = TOLERANCE.get(attachment.dtype, 5e-2)
    with torch.no_grad():
        calls = _captured(attachment, untouched)
        logits = _with_statistics(attachment, untouched.batch)
        checks = [_close("logits", _logit_error(logits, untouched.logits), tolerance, "against the untouched model")]
        checks.append(_close("output", *_rebuilt(calls, untouched, tolerance)))
        checks.append(_close("rows", *_rows(calls), "each row sums to one, less the mass of a learned sink"))
        checks.append(_close("causal", *_causal(attachment, untouched, tolerance)))
        for side in ("left", "right"):
            error = _padding(attachment, untouched, side)
            checks.append(_close(f"padding {side}", error, tolerance, "a shorter prompt, alone and padded"))
        checks.extend(_edits(attachment, untouched, tolerance))
        checks.extend(_adapter(attachment, untouched, logits, calls, tolerance))
    return checks


def _adapter(
    attachment: Attachment, untouched: _Untouched, logits: Tensor, calls: list[AttentionCall], tolerance: float
) -> list[Check]:
    """Against the library's own call."""
    checks, name = [], attachment.host.name
    if untouched.own_logits is not None:
        error = _logit_error(logits, untouched.own_logits)
        checks.append(_close(f"{name} logits", error, tolerance, "against the library's own call"))
    if untouched.own_patterns:
        pairs = zip(calls, untouched.own_patterns, strict=True)
        error = _worst(float((call.pattern() - own).abs().max()) for call, own in pairs)
        checks.append(_close(f"{name} patterns", error, tolerance, f"largest difference in {len(calls)} layers"))
    return checks


def _close(name: str, measured: float, tolerance: float, detail: str) -> Check:
    return Check(name, measured, tolerance, measured <= tolerance, detail)


def _captured(attachment: Attachment, untouched: _Untouched) -> list[AttentionCall]:
    """Every attention call of the model on its own course: each is answered with the untouched z."""
    calls: list[AttentionCall] = []

    def watch(call: AttentionCall) -> Tensor:
        calls.append(call)
        prompts, heads, tokens, _ = call.q.shape
        return untouched.z[call.layer].reshape(prompts, tokens, heads, -1).transpose(1, 2)

    with attachment.observe(watch):
        forward(attachment.hf_model, untouched.batch)
    return calls


def _with_statistics(attachment: Attachment, batch: Batch) -> Tensor:
    """Logits of the model under z as it comes out of the statistics kernel."""
    request = StatisticsRequest(output=True, lse=True, max_prob=True, column_sum=True)

    def watch(call: AttentionCall) -> Tensor:
        output = call.statistics(request).output
        assert output is not None
        return output.to(call.q.dtype)

    with attachment.observe(watch):
        return forward(attachment.hf_model, batch)


def _rebuilt(calls: list[AttentionCall], untouched: _Untouched, tolerance: float) -> tuple[float, float, str]:
    errors = []
    for call, own in zip(calls, untouched.z, strict=True):
        group = call.q.shape[1] // call.k.shape[1]
        z = call.pattern(torch.float64) @ call.v.double().repeat_interleave(group, dim=1)
        errors.append(_error(z.transpose(1, 2).flatten(2), own.double().reshape(len(own), own.shape[1], -1)))
    exercised = [call.window for call in calls if call.window is not None and call.window < call.k.shape[2]]
    windows = [call.window for call in calls if call.window is not None]
    note = ""
    if windows and not exercised:
        note = f"; windows of {min(windows)} keys are longer than the probe and were not exercised"
    return _worst(errors), tolerance, f"z rebuilt in float64 from q, k, v of {len(calls)} layers{note}"


def _rows(calls: list[AttentionCall]) -> tuple[float, float]:
    """Row sums under the streaming log-sum-exp: an error in it, or a key too many or too few, shows here.

    The tolerance allows for the rounding of the largest float32 logit; some models have logits in the hundreds.
    """
    errors, largest = [], 1.0
    for call in calls:
        options = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        pattern, lse = attention_pattern(call.q, call.k, call.geometry, **options)  # type: ignore[arg-type]
        streamed = call.statistics(StatisticsRequest(lse=True)).lse
        assert streamed is not None
        total = pattern.sum(-1) * torch.exp(lse - streamed)
        if call.sinks is not None:
            total = total + torch.exp(call.sinks.double()[None, :, None] - streamed)
        errors.append(float((total - 1).abs().max()))
        norms = [float(torch.linalg.vector_norm(x.float(), dim=-1).max()) for x in (call.q, call.k)]
        largest = max(largest, call.scale * norms[0] * norms[1])
    return _worst(errors), max(2e-5, 4 * torch.finfo(torch.float32).eps * largest)


def _causal(attachment: Attachment, untouched: _Untouched, tolerance: float) -> tuple[float, float, str]:
    batch, cut = untouched.batch, untouched.batch.ids.shape[1] // 2
    changed = batch.ids.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % attachment.spec.vocab_size
    logits = forward(attachment.hf_model, Batch(changed, batch.mask))
    detail = f"logits before position {cut} with all later tokens changed"
    return _logit_error(logits[:, :cut], untouched.logits[:, :cut]), tolerance, detail


def _padding(attachment: Attachment, untouched: _Untouched, side: str) -> float:
    """A prompt that fills two thirds of the row, padded with the other third, against the untouched model."""
    ids, tokens = untouched.batch.ids, untouched.batch.ids.shape[1]
    kept = max(1, tokens * 2 // 3)
    rows, mask = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
    place = slice(tokens - kept, tokens) if side == "left" else slice(0, kept)
    rows[1], mask[1] = 0, False
    rows[1, place], mask[1, place] = ids[1, :kept], True
    logits = forward(attachment.hf_model, Batch(rows, mask))
    whole = _logit_error(logits[0], untouched.logits[0])
    return _worst([whole, _logit_error(logits[1, place], untouched.logits[1, :kept])])


def _edits(attachment: Attachment, untouched: _Untouched, tolerance: float) -> list[Check]:
    """z of the first, middle and last layer: zeroed, and replaced by itself.

    A whole layer, because a trained model may have heads that do nothing; layers whose output projection is zero,
    as compiled programs have them, are passed over. The change has to stand out from what the same pass differs by
    without a change (nothing, but for kernels that are not deterministic).
    """
    last = attachment.spec.n_layers - 1
    chosen = [layer.index for layer in attachment.layers if _writes(layer)] or list(range(last + 1))
    clean = forward(attachment.hf_model, untouched.batch)
    same = _edited(attachment, untouched.batch, last // 2, torch.clone)
    moved = -_worst(
        -_error(_edited(attachment, untouched.batch, layer, torch.zeros_like), clean)
        for layer in sorted({chosen[0], chosen[(len(chosen) - 1) // 2], chosen[-1]})
    )
    rounding = min(torch.finfo(attachment.dtype).eps, torch.finfo(torch.float32).eps)
    least = 10 * _worst([_error(same, clean), rounding])
    detail = f"least change of the logits when a layer's z is zeroed; must exceed {least:.1g}"
    return [
        Check("edit", moved, least, moved > least, detail),
        _close("no edit", _logit_error(same, untouched.logits), tolerance, "logits with z replaced by itself"),
    ]


def _writes(layer: LayerModules) -> bool:
    weight = cast(Tensor, layer.projection.weight)
    # Weights that wait on disk have no values to look at.
    return weight.is_meta or bool(weight.any())


def _edited(attachment: Attachment, batch: Batch, layer: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    def watch(call: AttentionCall) -> Tensor:
        return change(call.output()) if call.layer == layer else call.output()

    with attachment.observe(watch):
        return forward(attachment.hf_model, batch)
