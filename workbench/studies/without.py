"""A model without some heads, to be measured as any other: what their absence does to the heads that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.errors import RequestError
from workbench.heads import KINDS, Ablator, Settings
from workbench.models import Head
from workbench.studies.reference import reference_prompts
from workbench.tracing import Model, ablate
from workbench.tracing.edits import HOWS
from workbench.tracing.standing import EditedModel, edited

# Forms that need nothing of the prompt at hand, so that they stand for every prompt.
STANDING = ("zero", "mean", "uniform", "to_sink", "q_mean", "streaming")
_NOT = {
    "resample": "it takes what heads write on another prompt, column by column",
    "frozen_zero": "it keeps every head's pattern, so that no statistic of attention would change",
}


def without(model: Model, heads: Sequence[str], how: str = "zero", detection: Settings | None = None) -> EditedModel:
    """The model with heads ablated in every pass; means are taken over the detectors' texts, with the model intact."""
    check_form(how)
    chosen = [model.spec.check(Head.parse(name)) for name in heads]
    if not chosen:
        raise RequestError("No heads to ablate were named; name some, as in L18H6.")
    if how in ("mean", "q_mean"):
        ablator = Ablator.prepare(model, how, reference_prompts(model, detection or Settings()))  # type: ignore[arg-type]
        return edited(model, ablator(chosen))
    return edited(model, ablate(chosen, how))  # type: ignore[arg-type]


def check_form(how: str) -> None:
    """Refuse forms that cannot stand for every prompt, or would show nothing."""
    if how not in HOWS:
        raise RequestError(f"how={how!r} is no ablation; choose one of {', '.join(STANDING)}.")
    if how not in STANDING:
        raise RequestError(f"how={how!r} has no place here: {_NOT[how]}. Choose one of {', '.join(STANDING)}.")


def recorded(model: Model) -> dict[str, Any]:
    """What a run's settings say of a model's standing ablation; nothing where it runs as it is."""
    return {"ablate": model.removed} if isinstance(model, EditedModel) else {}


def able_detectors(names: Sequence[str] | None) -> tuple[str, ...]:
    """Of the named detectors (the core ones), those that measure an ablated model; refuses named ones that cannot."""
    from workbench.heads.detection import choose

    chosen = choose(names)
    unable = [one.name for one in chosen if not KINDS[one.kind].traced]
    if names is not None and unable:
        raise RequestError(
            f"{', '.join(unable)}: these read weights, gradients or single calls, where an ablation would not be seen; "
            "leave them out, or measure without --ablate."
        )
    return tuple(one.name for one in chosen if one.name not in unable)
