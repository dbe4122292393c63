"""A model that always runs under the same edits: whatever is measured on it is measured without the heads removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import RequestError
from workbench.tracing.edits import Ablation, Edit, listed
from workbench.tracing.model import Model
from workbench.tracing.trace import Trace


@dataclass(repr=False, eq=False)
class EditedModel(Model):
    """`trace` and `generate` of a model under `standing` edits, before any that a call adds.

    What reads the attached model in another way (weights, gradients, single calls) sees it as it is: kinds of prompts
    that do so refuse an edited model. The model shares its weights with the one it was made from.
    """

    standing: tuple[Edit, ...] = field(default=())

    def trace(self, *given: Any, **options: Any) -> Trace:
        """As `Model.trace`."""
        options["edits"] = [*self.standing, *listed(options.get("edits", ()))]
        return super().trace(*given, **options)

    def generate(self, *given: Any, **options: Any) -> Any:
        """As `Model.generate`."""
        options["edits"] = [*self.standing, *listed(options.get("edits", ()))]
        return super().generate(*given, **options)

    @property
    def removed(self) -> dict[str, Any]:
        """Which heads are ablated, and how, as manifests keep it."""
        ablations = [edit for edit in self.standing if isinstance(edit, Ablation)]
        heads = [str(head) for edit in ablations for head in edit.heads]
        return {"heads": heads, "how": ", ".join(dict.fromkeys(edit.how for edit in ablations))}


def edited(model: Model, edits: Edit | Sequence[Edit]) -> EditedModel:
    """The model under edits that hold for every prompt: ablations with their values, if they take any, at hand."""
    standing = tuple(listed(edits))
    for edit in standing:
        if not isinstance(edit, Ablation) or edit.positions is not None or edit.unresolved or edit.how == "resample":
            raise RequestError(
                "Only ablations that need nothing of the prompt at hand can stand for all prompts: whole heads, by "
                "zero, uniform, to_sink or streaming, or by mean or q_mean with their values."
            )
        edit.check(model.spec)
    return EditedModel(model.attachment, model.tokenizer, model.source, model.certificate, standing)
