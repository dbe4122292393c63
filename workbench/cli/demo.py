"""`workbench demo`: the whole path on a small real model, from weights to a report."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.attached import attached, count_steps, predicted_peak
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.cli.tables import LEADING, show_certificate, show_findings
from workbench.errors import RunError

if TYPE_CHECKING:
    from workbench.runs import Run

MODEL = "smollm2-135m"
KIND = "demo"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="demo", cls=Command)(demo)


def demo(
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder of the run; the report is written beside it.")
    ] = Path("runs/demo"),
    open_report: options.Open = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Find and test the heads of SmolLM2-135M; a few minutes, one report."""
    session = current_session()
    finished = None if overwrite else _finished(out)
    if finished is None:
        run = _analyse(session, out, overwrite)
    else:
        run = finished
        session.say(
            f"{out} is a complete run already (finished {run.manifest.get('finished')}); this is what it found. "
            "To make it again: workbench demo --overwrite"
        )
    report = report_path(out)
    write(session, run, report)
    _tell(session, run, out, report)
    if open_report:
        webbrowser.open(report.resolve().as_uri())


def _finished(path: Path) -> Run | None:
    """The demo's run at a path; None where there is none yet."""
    if not (path / "manifest.json").is_file():
        return None
    from workbench.runs import Run

    run = Run.open(path)
    if run.kind != KIND:
        raise RunError(
            f"{path} holds a run of kind {run.kind}, not a demo; choose another path (--out), or replace it "
            "(--overwrite)."
        )
    return run


def _analyse(session: Session, out: Path, overwrite: bool) -> Run:
    session.writes(out, overwrite=overwrite)
    with attached(session, MODEL, None, None) as model:
        show_certificate(session, model.certificate.as_dict())
        from workbench.studies import SurveySettings, survey

        settings = SurveySettings()
        session.say(predicted_peak(model, settings))
        with display(session.err, count_steps(settings)) as shown:
            return survey(
                model,
                out,
                settings=settings,
                kind=KIND,
                title=f"Attention heads of {MODEL}",
                overwrite=overwrite,
                reporter=shown,
                command=session.command,
            )


def report_path(run: Path) -> Path:
    """Beside the run, whose own files are checked."""
    run = run if run.name.strip(".") else run.resolve()
    return run.with_name(f"{run.name}.html")


def check_target(report: Path) -> None:
    """Refuse a path that no file can be written to, before the work is done."""
    folder = next(parent for parent in report.absolute().parents if parent.exists())
    if report.is_dir():
        raise RunError(f"{report} is a folder; name the HTML file to write (--out FILE).")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RunError(
            f"{report} cannot be written: {folder} is no folder that you may write to; choose another path (--out)."
        )


def write(
    session: Session, run: Run, report: Path, against: Run | None = None, budget_bytes: int | None = None
) -> None:
    """Write a report, saying so."""
    with display(session.err) as shown:
        shown.step("report", str(report), kept=False)
        from workbench.reports import BUDGET_BYTES, write_report

        write_report(run, report, against=against, budget_bytes=budget_bytes or BUDGET_BYTES)


def _tell(session: Session, run: Run, out: Path, report: Path) -> None:
    show_findings(session, run, LEADING)
    seconds = run.manifest["seconds"]
    session.say()
    session.say(f"Report:   {report} ({report.stat().st_size / 1e6:.1f} MB, opens offline)")
    session.say(f"Run:      {out}")
    session.say(f"Analysis: {sum(seconds.values()):.0f} s, measured, in {len(seconds)} steps")
