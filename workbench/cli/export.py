"""`workbench export`: the head scores of a run in the formats of other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.session import Command, current_session
from workbench.errors import RequestError, RunError

if TYPE_CHECKING:
    from workbench.runs import Run


class FormatName(StrEnum):
    """Formats of other tools."""

    retrieval_head = "retrieval-head"
    duo = "duo"
    headvis = "headvis"


class JoinName(StrEnum):
    """How the query heads of a KV head become one number."""

    mean = "mean"
    max = "max"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="export", cls=Command)(export)


def export(
    run: options.Run,
    form: Annotated[
        FormatName,
        typer.Option(
            "--format",
            help="A JSON file, DuoAttention's folder (KV heads), or HeadVis's folder (all detectors).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The file or folder to write; it must not exist yet.")],
    detector: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose scores, for retrieval-head and duo. [default: retrieval]"),
    ] = None,
    join: Annotated[
        JoinName, typer.Option(help="How the query heads of a KV head are joined, for duo.")
    ] = JoinName.mean,
) -> None:
    """Write the head scores of a run for another tool."""
    session = current_session()
    if form is FormatName.headvis and detector is not None:
        raise RequestError("--detector is not for --format headvis, which takes all of them; leave it out.")
    if out.exists():
        raise RunError(f"{out} exists already; name a file or folder that does not (--out).")
    with session.err.status("reading"):
        from workbench.runs import Run

        found = Run.open(run)
    if not found.has_table("head_scores"):
        raise RunError(f"{run} is of kind {found.kind} and has no head scores; give a run of heads, atlas or demo.")
    name = detector or "retrieval"
    with session.err.status("writing"):
        from workbench.runs.interchange import write_duo, write_retrieval_head

        scores = found.table("head_scores")
        if form is FormatName.retrieval_head:
            write_retrieval_head(scores, name, out)
        elif form is FormatName.duo:
            write_duo(scores, name, out, _group(found), join=join.value, config=_provenance(found, name, join))
        else:
            _headvis(found, out)
    session.say(str(out))


def _group(run: Run) -> int:
    """Query heads that share a KV head."""
    model = run.manifest.get("model", {})
    heads, kv_heads = model.get("heads"), model.get("kv_heads")
    if not heads or not kv_heads:
        raise RunError(f"{run.path} does not record its model's KV heads, which DuoAttention's table is of.")
    return int(heads) // int(kv_heads)


def _provenance(run: Run, detector: str, join: JoinName) -> dict[str, object]:
    name = run.manifest.get("model", {}).get("name")
    return {"model_name": name, "detector": detector, "joined": join.value, "run": run.id}


def _headvis(run: Run, out: Path) -> None:
    from workbench.runs.headvis import kept_patterns, write_headvis

    name = str(run.manifest.get("model", {}).get("name") or "model")
    write_headvis(run.table("head_scores"), run.table("detectors"), out, model=name, sequences=kept_patterns(run))
