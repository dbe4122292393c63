"""`workbench study`: grids of cells from a study file; run, resumed cell by cell, shown and drawn."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session, printable
from workbench.cli.tables import show_table, table
from workbench.errors import RequestError

if TYPE_CHECKING:
    from workbench.studies import Study
    from workbench.studies.cells import Cell

# Some cells failed; what could be measured is kept.
FAILED = 3
app = typer.Typer(no_args_is_help=True, help="Run studies: grids of measurements, resumable cell by cell.")


class EngineName(StrEnum):
    """Where cells are measured."""

    local = "local"
    ray = "ray"


StudyPath = Annotated[Path, typer.Argument(metavar="PATH", help="A folder with a study.toml, or the file.")]
ModelName = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Run every cell on this model. [default: as the study says]"),
]
Place = Annotated[Path | None, typer.Option(metavar="RUN", help="Folder of the run. [default: runs/study-NAME-MODEL]")]


@app.command(name="run", cls=Command)
def run(
    path: StudyPath,
    engine: Annotated[
        EngineName, typer.Option(help="local: on this machine; ray: by Ray, also on a cluster.")
    ] = EngineName.local,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Cells measured at once. [default: local: 1, in this process; ray: one a GPU or core]",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", help="Ray's cluster, as ray://host:10001. [default: RAY_ADDRESS, or this machine]"),
    ] = None,
    model: ModelName = None,
    out: Place = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CELL", help="Only these cells, by id or words of the label; may be repeated."),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Measure the cells of a study that are missing, and join all into a run.

    Every cell is kept as it is done: repeat the command after an interruption, or with more cells in the file, and no
    cell is measured twice. A cell that fails is told at the end (exit code 3) and tried again the next time.
    """
    session = current_session()
    with session.err.status("importing"):
        session.silence_transformers()
        from workbench.studies import read_study, run_study
        from workbench.studies.engine import make_engine
        from workbench.studies.store import Store

        study = read_study(path)
        worker = make_engine(engine.value, device, workers, address)
    target = out or default_place(study, model)
    session.run, session.cells = target, Store(target).folder
    wanted = None if dtype is None else dtype.value
    cells = study.cells(model, wanted)
    session.say(f"{study.study.title}\n{len(cells)} cells on {', '.join(dict.fromkeys(cell.model for cell in cells))}")
    with display(session.err, None if only else len(cells)) as shown:
        found = run_study(
            study, target, model=model, dtype=wanted, only=only or (), engine=worker, reporter=shown,
            command=session.command,
        )  # fmt: skip
    _tell(session, path, target, model, found.cells, found.failed)
    if found.failed:
        raise typer.Exit(FAILED)


@app.command(name="show", cls=Command)
def show(path: StudyPath, model: ModelName = None, out: Place = None, dtype: options.Dtype = None) -> None:
    """List the cells of a study, and which of them are measured."""
    session = current_session()
    with session.err.status("importing"):
        from workbench.studies import read_study
        from workbench.studies.store import Store

        study = read_study(path)
    target = out or default_place(study, model)
    store, cells = Store(target), study.cells(model, None if dtype is None else dtype.value)
    made = table("cell", "measurement", "state", "what is wrong")
    states = [store.state(cell) for cell in cells]
    for cell, state in zip(cells, states, strict=True):
        made.add_row(cell.id, printable(cell.label), state, printable(store.error(cell)) if state == "failed" else "")
    session.say(study.study.title)
    session.say(study.study.question)
    show_table(session, f"{states.count('done')} of {len(cells)} cells are measured", made)
    session.say(f"Run: {target}")


@app.command(name="figure", cls=Command)
def figure(
    path: StudyPath,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="figure.html, or figure.png (needs Chromium).")],
    model: ModelName = None,
    out: Place = None,
) -> None:
    """Draw the figure of a study from its run."""
    session = current_session()
    with session.err.status("drawing"):
        from workbench.reports.study import study_figure, write_figure
        from workbench.runs import Run
        from workbench.studies import read_study

        study = read_study(path)
        if study.figure is None:
            raise RequestError(f"{path} has no [figure]; add one, with draw = ... and table = ....")
        found = Run.open(out or default_place(study, model))
        write_figure(study_figure(found, study.figure), study.study.title, to)
    session.say(str(to))


def default_place(study: Study, model: str | None) -> Path:
    """Where a study's run lies by default: one folder a study and model."""
    name = model or study.study.model
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower()).strip("-.") or "model"
    return Path("runs") / f"study-{study.name}-{slug}"


def _tell(
    session: Session, path: Path, target: Path, model: str | None, cells: list[Cell], failed: dict[str, str]
) -> None:
    """What failed, where the run is, and what to do with it."""
    labels = {cell.id: cell.label for cell in cells}
    for name, error in failed.items():
        session.say(f"Failed: {labels[name]} ({name}): {error}")
    if failed:
        count = "1 cell" if len(failed) == 1 else f"{len(failed)} cells"
        session.say(f"{count} failed; the same command tries again.")
    extra = ["--model", model] if model else []
    session.say()
    session.say(f"Run:    {target}")
    session.say(f"Tables: {shlex.join(['workbench', 'runs', 'show', str(target)])}")
    drawn = ["workbench", "study", "figure", str(path), *extra, "--out", str(target), "--to", "figure.html"]
    session.say(f"Figure: {shlex.join(drawn)}")
