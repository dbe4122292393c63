"""`workbench report`: a run as one HTML file."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import options
from workbench.cli.demo import check_target, report_path, write
from workbench.cli.session import Command, current_session


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="report", cls=Command)(report)


def report(
    run: options.Run,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file to write. [default: RUN.html]")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Another run: a section tells how its head scores differ.")
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            metavar="MB",
            min=0.05,
            max=1000,
            help="The file's largest size; what is least important is left out, and the report says so.",
        ),
    ] = 8.0,
    open_report: options.Open = False,
) -> None:
    """Write a run as one HTML file that needs no network."""
    session = current_session()
    from workbench.runs import Run

    found = Run.open(run)
    target = report_path(Path(run)) if out is None else out
    check_target(target)
    write(session, found, target, None if against is None else Run.open(against), round(budget * 1e6))
    session.say(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    if open_report:
        webbrowser.open(target.resolve().as_uri())
