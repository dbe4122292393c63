"""What the circuits commands have in common: their arguments, and the pairs that they name."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.session import Session

if TYPE_CHECKING:
    from workbench.tasks.pairs import PairTask
    from workbench.tracing import Model

# A task's name or file, how many pairs, and their seed.
Asked = tuple[str, int | None, int]

# Stated here as well, so that `--help` need not import them; a test compares.
TASKS = (
    *("ioi", "colored_objects", "greater_than", "docstring", "gender", "agreement", "mcqa", "facts"),
    *("lag_induction", "json_pairs"),
)
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")


class MetricName(StrEnum):
    """What is read of the logits."""

    logit_difference = "logit_difference"
    logit_margin = "logit_margin"
    probability_difference = "probability_difference"
    log_probability = "log_probability"


Task = Annotated[
    str,
    typer.Option(
        "--task", metavar="NAME|FILE", help=f"{', '.join(TASKS)}; or a .jsonl or .csv file of pairs of your own."
    ),
]
Pairs = Annotated[int | None, typer.Option(metavar="N", min=2, help="Pairs of prompts. [default: 16; of a file, all]")]
Metric = Annotated[MetricName | None, typer.Option(help="What is read of the logits. [default: the task's own]")]


def found_pairs(session: Session, model: Model, asked: Asked, metric: str | None) -> PairTask:
    """The pairs, and what this tokenizer could not take of them."""
    from workbench.studies.pairs import find_pairs

    name, pairs, seed = asked
    task = find_pairs(model, name, pairs, seed, metric)
    dropped = ", ".join(f"{len(words)} {what}" for what, words in task.dropped.items() if words)
    groups = len(set(task.groups.tolist()))
    session.note(
        f"{len(task)} pairs of {task.name} in {groups} {'shape' if groups == 1 else 'shapes'}, up to "
        f"{int(task.clean.lengths.max())} tokens" + (f"; this tokenizer cannot take {dropped}" if dropped else "")
    )
    return task
