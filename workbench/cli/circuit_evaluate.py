"""`workbench circuits evaluate`: how good circuits are, on other prompts than those that they were found on."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.attached import attached, default_run
from workbench.cli.circuit_options import Metric, found_pairs
from workbench.cli.circuit_tables import show_evaluation, tell_pairs
from workbench.cli.heads import tell_run
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.errors import RequestError, RunError

if TYPE_CHECKING:
    from workbench.runs import Run
    from workbench.studies.evaluations import EvaluationSettings
    from workbench.tracing import Model

# Pairs of an evaluation are never those that the circuit was found on.
HELD_OUT = 1000


class OutsideName(StrEnum):
    """What stands in for everything outside of a circuit."""

    patching = "patching"
    mean = "mean"
    zero = "zero"


class SelectName(StrEnum):
    """How edges are taken by their scores."""

    top = "top"
    greedy = "greedy"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="evaluate", cls=Command)(evaluate)


Sources = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Runs of attribute or discover, or JSON files as MIB's.")
]


def evaluate(
    runs: Sources,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model. [default: that of the first run]")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The task. [default: that of the first run]")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Pairs of prompts. [default: as in the first run]")
    ] = None,
    same: Annotated[
        bool, typer.Option("--same-pairs", help="Evaluate on the very pairs that the circuit was found on.")
    ] = False,
    fractions: Annotated[
        str | None, typer.Option(metavar="0.01,0.1", help="Shares of edges to keep. [default: MIB's ten, 0.001 to 1]")
    ] = None,
    select: Annotated[SelectName, typer.Option(help="The best edges, or grown from the logits.")] = SelectName.top,
    ablation: Annotated[
        OutsideName, typer.Option(help="What stands in for everything outside: the corrupt prompt's, means, zero.")
    ] = OutsideName.patching,
    random: Annotated[int, typer.Option(metavar="N", min=0, help="Random circuits to compare each with.")] = 5,
    metric: Metric = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the kept circuit as MIB's JSON.")
    ] = None,
    graphml: Annotated[
        Path | None, typer.Option("--graphml", metavar="FILE", help="Also write it as GraphML (Gephi, yEd, networkx).")
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Measure how faithful circuits of all sizes are, beside random circuits of equal size.

    Everything outside of a circuit is replaced, and the model runs on what is left. The curve gives CPR and CMD;
    resampling the prompts tells how stable the choice of edges is. The smallest circuit that keeps 80 % of the task is
    the one that is drawn and exported.
    """
    session = current_session()
    shares = _shares(fractions)
    for file in (json_file, graphml):
        if file is not None and file.exists():
            raise RunError(f"{file} exists already; name a file that does not.")
    asked = _asked(runs, model, task, pairs, same)
    path = out or default_run("evaluate", asked[0], *map(str, runs), *asked, shares, select, ablation, random, metric)
    session.writes(path, overwrite=overwrite)
    with session.err.status("importing"):
        session.silence_transformers()
        from workbench.studies.evaluations import EvaluationSettings
        from workbench.studies.pairs import check_task

        check_task(asked[1], None if metric is None else metric.value, asked[2])
        given: dict[str, Any] = {} if shares is None else {"fractions": shares}
        settings = EvaluationSettings(
            how=select.value, metric=None if metric is None else metric.value, ablation=ablation.value, random=random,
            seed=asked[3], **given,
        )  # fmt: skip
        settings.check()
    with attached(session, asked[0], dtype, device) as loaded:
        run = _run(session, loaded, path, settings, runs, asked, overwrite)
        _export(session, loaded, run, json_file, graphml)
    tell_pairs(session, run)
    show_evaluation(session, run)
    tell_run(session, path)


def _asked(
    runs: list[Path], model: str | None, task: str | None, pairs: int | None, same: bool
) -> tuple[str, str, int | None, int]:
    """Model, task, pairs and seed: as given, else as the first run had them; the seed is another one."""
    from workbench.runs import Run

    known: tuple[str | None, str | None, int | None, int] = (None, None, None, 0)
    for source in runs:
        if source.suffix == ".json":
            if not source.is_file():
                raise RunError(f"There is no file {source}; give runs of attribute or discover, or circuits as JSON.")
            continue
        about = Run.open(source).manifest.get("circuits", {})
        if not about.get("scores"):
            raise RunError(f"{source} has no scores of nodes or edges; give a run of attribute or discover.")
        if known[0] is None and about.get("asked"):
            known = tuple(about["asked"])
    found = (model or known[0], task or known[1])
    if found[0] is None or found[1] is None:
        what = "--model" if found[0] is None else "--task"
        raise RequestError(f"No run says which {what[2:]} it is about; name it with {what}.")
    return found[0], found[1], pairs or known[2], known[3] + (0 if same else HELD_OUT)


def _shares(text: str | None) -> tuple[float, ...] | None:
    named = options.names("--fractions", text, "0.01,0.1")
    if named is None:
        return None
    try:
        return tuple(sorted({float(one) for one in named}))
    except ValueError:
        raise RequestError(f"--fractions {text!r}: write shares as in 0.01,0.1,0.5.") from None


def _run(
    session: Session,
    model: Model,
    path: Path,
    settings: EvaluationSettings,
    runs: list[Path],
    asked: tuple[str, str, int | None, int],
    overwrite: bool,
) -> Run:
    from workbench.studies.evaluations import count_steps, evaluation_run, load_found

    found = load_found(model, runs)
    task = found_pairs(session, model, asked[1:], settings.metric)
    with display(session.err, count_steps(found)) as shown:
        return evaluation_run(
            model, task, found, path, settings=settings, sources=[str(one) for one in runs], overwrite=overwrite,
            reporter=shown, command=session.command,
        )  # fmt: skip


def _export(session: Session, model: Model, run: Run, json_file: Path | None, graphml: Path | None) -> None:
    """The kept circuit in the formats of others."""
    if json_file is None and graphml is None:
        return
    from workbench.circuits import Graph
    from workbench.circuits.exchange import write_graphml, write_mib
    from workbench.studies.evaluations import kept_circuit

    circuit = kept_circuit(run, Graph.of(model))
    for file in (json_file, graphml):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        write_mib(circuit, json_file, model.spec.d_model)
        session.say(f"Circuit: {shlex.quote(str(json_file))}")
    if graphml is not None:
        write_graphml(circuit, graphml)
        session.say(f"Circuit: {shlex.quote(str(graphml))}")
