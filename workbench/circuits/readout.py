"""From the residual stream to a logit as a linear map: norms with their scale held where it was.

A logit is `norm(stream) @ W_U + b_U`. Once the norm's scale is that of the actual run, the norm is linear (centring,
where it centres, is linear as it is), and so the logit is a dot product of the stream with one vector a prompt, plus
what the norm's bias and the unembedding's give to every prompt. Whatever adds up to the stream then adds up to the
logit exactly. What this leaves out: a part that changed would change the scale as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import RequestError
from workbench.models import Attachment
from workbench.models.architectures import ends
from workbench.models.projections import norm_gain
from workbench.tasks.task import NONE

# How far a norm may be from its linear form, as a share of its largest output.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
COARSE = 3e-2


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm as it was on some rows: `scale * gain * (x - mean x) + bias`, the mean taken off where it centres.

    All in double precision; `gain` None multiplies by one.
    """

    scale: Float[Tensor, " row"]
    gain: Float[Tensor, " d_model"] | None
    centres: bool
    bias: Float[Tensor, " d_model"] | None

    def linear(self, parts: Float[Tensor, "*part row d_model"]) -> Float[Tensor, "*part row d_model"]:
        """The norm of parts of the rows, without the bias."""
        return _gained(_centred(parts, self.centres), self.gain) * self.scale[:, None]

    def pulled(self, reading: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What reads before the norm what `reading` reads after it: `linear(x) . reading = x . pulled(reading)`."""
        return _centred(_gained(reading, self.gain), self.centres) * self.scale[:, None]


def _gained(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x * gain


def _centred(x: Tensor, centres: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centres else x


@torch.no_grad()
def frozen(attachment: Attachment, norm: nn.Module | None, rows: Float[Tensor, "row d_model"]) -> FrozenNorm:
    """A norm of this model on these rows; its scale is read off its own output.

    Raises `RequestError` where it is not of that form.
    """
    gain, centres = norm_gain(attachment.spec.architecture, norm, torch.float64)
    bias = getattr(norm, "bias", None)
    bias = None if bias is None else cast(Tensor, bias).detach().double()
    output = rows.double() if norm is None else cast(Tensor, norm(rows)).double()
    own = output if bias is None else output - bias
    shape = _gained(_centred(rows.double(), centres), gain)
    scale = (own * shape).sum(-1) / shape.square().sum(-1).clamp(min=1e-300)
    wrong = (shape * scale[:, None] - own).abs().max()
    allowed = TOLERANCE.get(rows.dtype, COARSE) * output.abs().max().clamp(min=1e-6)
    if wrong > allowed:
        raise RequestError(
            f"{attachment.spec.architecture}: {type(norm).__name__} is not linear once its scale is held (off by "
            f"{wrong:.2g}), so that a logit has no exact parts here. Use activation patching instead."
        )
    return FrozenNorm(scale, gain, centres, bias)


@dataclass(frozen=True, eq=False)
class Readout:
    """One logit (or a difference of mean logits) a prompt, as a linear map of the final stream.

    `vector . stream + constant` is its value before any cap; `scale` is what the final norm multiplied by.
    """

    vector: Float[Tensor, "prompt d_model"]
    constant: Float[Tensor, " prompt"]
    scale: Float[Tensor, " prompt"]


@torch.no_grad()
def read_out(
    attachment: Attachment,
    stream: Float[Tensor, "prompt d_model"],
    answers: Int[Tensor, "prompt answer"],
    foils: Int[Tensor, "prompt foil"],
) -> Readout:
    """How the mean logit of the answers, less that of the foils (where there are any), is read off the stream."""
    end = ends(attachment.hf_model)
    norm = frozen(attachment, end.final_norm, stream)
    weight = cast(Tensor, end.unembedding.weight).detach()
    bias = getattr(end.unembedding, "bias", None)
    direction = _mean_rows(weight, answers) - _mean_rows(weight, foils)
    constant = torch.zeros(len(stream), dtype=torch.float64, device=stream.device)
    if norm.bias is not None:
        constant += direction @ norm.bias
    if bias is not None:
        column = cast(Tensor, bias).detach()[:, None]
        constant += (_mean_rows(column, answers) - _mean_rows(column, foils))[:, 0]
    return Readout(norm.pulled(direction), constant, norm.scale)


def _mean_rows(weight: Float[Tensor, "vocab d"], ids: Int[Tensor, "prompt m"]) -> Float[Tensor, "prompt d"]:
    """Mean of the named rows in double precision; zero where none is named."""
    ids = ids.to(weight.device)
    there = (ids != NONE).double()
    rows = weight[ids.clamp(min=0)].double() * there[..., None]
    return rows.sum(1) / there.sum(1, keepdim=True).clamp(min=1)
