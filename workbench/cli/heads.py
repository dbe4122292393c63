"""`workbench heads`: scores of every head, with intervals and nulls."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.attached import attached, count_steps, default_run, predicted_peak
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.cli.tables import show_findings

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.runs import Run
    from workbench.studies import SurveySettings
    from workbench.tracing import Model


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="heads", cls=Command)(heads)


def heads(
    model: options.Model,
    detectors: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help=f"Detectors: {', '.join(options.DETECTOR_NAMES)} (the default); `workbench atlas --list` has all.",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(min=2, help="Texts of each domain, and repeated sequences. [default: 50 texts, 10 sequences]"),
    ] = None,
    ablate: options.Ablate = None,
    how: options.AblateHow = options.StandingName.zero,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Score every head of a model by detectors; with --ablate, of the model without some of its heads."""
    session = current_session()
    chosen = options.names("--detectors", detectors, "sink,induction")
    removed = options.removed(ablate, how)
    path = out or default_run("heads", model, chosen, prompts, seed, dtype, device, *removed)
    session.writes(path, overwrite=overwrite)
    with session.err.status("importing"):
        from dataclasses import replace

        from workbench.heads import Settings
        from workbench.heads.detection import choose
        from workbench.studies import SurveySettings
        from workbench.studies.without import able_detectors, without
    choose(chosen)
    if removed:
        chosen = able_detectors(chosen)
    detection = Settings(seed=seed)
    if prompts is not None:
        detection = replace(detection, text_prompts=prompts, repeat_prompts=prompts)
    settings = SurveySettings(detectors=chosen, verify=(), detection=detection)
    with attached(session, model, dtype, device) as loaded:
        measured = without(loaded, removed[:-1], removed[-1], detection) if removed else loaded
        run = surveyed(session, measured, path, settings, "heads", overwrite)
    show_findings(session, run)
    tell_run(session, path)


def surveyed(session: Session, model: Model, path: Path, settings: SurveySettings, kind: str, overwrite: bool) -> Run:
    """Run a survey under a display, the predicted memory first."""
    from workbench.studies import survey

    settings.check(len(model.spec.heads()))
    session.say(predicted_peak(model, settings))
    with display(session.err, count_steps(settings)) as shown:
        return survey(
            model,
            path,
            settings=settings,
            kind=kind,
            overwrite=overwrite,
            reporter=shown,
            command=session.command,
        )


def tell_run(session: Session, path: Path) -> None:
    """Where the run is, and what to do with it."""
    session.say()
    session.say(f"Run:    {path}")
    session.say(f"Report: {shlex.join(['workbench', 'report', str(path)])}")
