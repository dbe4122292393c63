"""`workbench circuits`: what is moved between the runs of a pair, and which parts of a model do a task."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import circuit_evaluate, circuit_search, options
from workbench.cli.attached import attached, default_run
from workbench.cli.circuit_options import SITES, Asked, Metric, Pairs, Task, found_pairs
from workbench.cli.circuit_tables import show_effects, show_tasks, tell_pairs
from workbench.cli.heads import tell_run
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.runs import Run
    from workbench.studies.patches import PatchSettings
    from workbench.tracing import Model

app = typer.Typer(no_args_is_help=True, help="Patch, attribute, discover and evaluate circuits, on pairs of prompts.")
circuit_search.register(app)
circuit_evaluate.register(app)


class ByName(StrEnum):
    """Axes of a scan."""

    layer = "layer"
    position = "position"
    head = "head"
    head_position = "head_position"
    key = "key"


class DirectionName(StrEnum):
    """Which run is patched into which."""

    both = "both"
    denoising = "denoising"
    noising = "noising"


class FormName(StrEnum):
    """What is frozen between a sender and a receiver."""

    wang = "wang"
    strict = "strict"


@app.command(name="tasks", cls=Command)
def tasks(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Also how often this model answers rightly.")
    ] = None,
    pairs: Pairs = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """List the built-in tasks, and how well a model does them."""
    session = current_session()
    if model is None:
        return show_tasks(session, {})
    with attached(session, model, dtype, device) as loaded:
        found = _measured(session, loaded, pairs, seed)
    show_tasks(session, found)


def _measured(session: Session, model: Model, pairs: int | None, seed: int) -> dict[str, dict[str, Any] | str]:
    """Each task's means on a model, or why it cannot be asked."""
    from workbench.studies.pairs import find_pairs, pair_table
    from workbench.tasks.pair_tasks import PAIR_TASKS

    found: dict[str, dict[str, Any] | str] = {}
    with display(session.err, len(PAIR_TASKS)) as shown:
        for name in PAIR_TASKS:
            shown.step(name, "clean and corrupt prompts", kept=False)
            try:
                task = find_pairs(model, name, pairs, seed)
            except RequestError as reason:
                found[name] = str(reason)
                continue
            frame = pair_table(model, task)
            found[name] = {
                "n": len(task),
                "metric": task.metric,
                "tokens": int(task.clean.lengths.max()),
                **{column: float(frame[column].mean()) for column in ("clean", "corrupt", "right")},
            }
    return found


Site = Annotated[str | None, typer.Option(metavar="A,B", help=f"Where to patch: {', '.join(SITES)}. [default: z]")]
By = Annotated[
    ByName | None, typer.Option(help="One patch for each of these. [default: head; of the residual stream, position]")
]
Direction = Annotated[
    DirectionName,
    typer.Option(help="Clean into corrupt (denoising: sufficient), corrupt into clean (noising: necessary)."),
]
Positions = Annotated[
    str | None,
    typer.Option(
        metavar="S2,END|0,1|all",
        help="Roles of the task, or tokens. [default: the roles where prompts differ in shape, else all]",
    ),
]
Layers = Annotated[str | None, typer.Option(metavar="0-5,8", help="Only these layers. [default: all]")]
Paths = Annotated[
    str | None,
    typer.Option(
        metavar="RECEIVERS", help="Instead, paths from every head and MLP to these: logits, or L9H6.q,L5KV1.v,L7.mlp."
    ),
]
Form = Annotated[
    FormName | None,
    typer.Option(help="With --paths: MLPs on the way are recomputed (wang, the default), or nothing is (strict)."),
]
Apart = Annotated[bool, typer.Option("--apart", help="With --paths: each receiver by itself.")]


@app.command(name="patch", cls=Command)
def patch(
    model: options.Model,
    task: Task,
    pairs: Pairs = None,
    site: Site = None,
    by: By = None,
    direction: Direction = DirectionName.both,
    positions: Positions = None,
    layers: Layers = None,
    metric: Metric = None,
    paths: Paths = None,
    form: Form = None,
    apart: Apart = False,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Patch activations, or paths, between the two prompts of each pair.

    Every patch is exact. Each place gets its effect in both directions with an interval over prompts, as a share of
    the gap between the clean and the corrupt run, and a permutation p-value.
    """
    session = current_session()
    if paths is not None and (site, by, positions) != (None, None, None):
        raise RequestError("--paths is from whole heads and MLPs; leave out --site, --by and --positions.")
    if paths is None:
        for name, given in (("--apart", apart), ("--form", form)):
            if given:
                raise RequestError(f"{name} is about receivers of paths; name them with --paths, or leave it out.")
    from workbench.circuits.spots import patch_site

    sites = tuple(dict.fromkeys(map(patch_site, options.names("--site", site, "z,mlp_out") or ("z",))))
    asked: dict[str, Any] = {
        "sites": sites,
        "by": _axis(by, sites),
        "direction": direction.value,
        "metric": None if metric is None else metric.value,
        "positions": options.names("--positions", positions, "S2,END"),
        "layers": _layers(layers),
        "receivers": options.names("--paths", paths, "L9H6.q,L5KV1.v") or (),
        "form": (form or FormName.wang).value,
        "apart": apart,
        "seed": seed,
    }
    path = out or default_run("patch", model, task, pairs, *asked.items(), dtype, device)
    session.writes(path, overwrite=overwrite)
    settings = _settings(session, model, (task, pairs, seed), asked)
    with attached(session, model, dtype, device) as loaded:
        settings.check_model(loaded.spec)
        run = _patched(session, loaded, path, settings, (task, pairs, seed), overwrite)
    tell_pairs(session, run)
    show_effects(session, run)
    tell_run(session, path)
    tell_next(session, run, model, task)


def _settings(session: Session, model: str, task: Asked, asked: dict[str, Any]) -> PatchSettings:
    """What is asked, checked as far as it can be before a model's weights are read."""
    with session.err.status("importing"):
        session.silence_transformers()
        from workbench.models.loading import stated_heads
        from workbench.studies.pairs import check_task
        from workbench.studies.patches import PatchSettings

        check_task(task[0], asked["metric"], task[1])
        settings = PatchSettings(**asked)
        settings.check()
        heads = stated_heads(model)
        if heads is not None:
            settings.check_fit(heads)
    return settings


def _axis(by: ByName | None, sites: tuple[str, ...]) -> str:
    if by is not None:
        return by.value
    return "head" if set(sites) <= {"z", "q", "k", "v", "pattern"} else "position"


def _layers(text: str | None) -> tuple[int, ...] | None:
    """`0-5,8` as numbers."""
    found: list[int] = []
    for part in options.names("--layers", text, "0-5,8") or ():
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise RequestError(f"--layers {text!r}: {part!r} names no layers; write them as in 0-5,8.")
        found += range(int(low), int(high or low) + 1)
    return tuple(dict.fromkeys(found)) or None


def _patched(
    session: Session,
    model: Model,
    path: Path,
    settings: PatchSettings,
    asked: Asked,
    overwrite: bool,
) -> Run:
    """The run under a display."""
    from workbench.studies.patches import count_steps, patch_run

    task = found_pairs(session, model, asked, settings.metric)
    settings.check_places(task)
    with display(session.err, count_steps(settings)) as shown:
        return patch_run(
            model, task, path, settings=settings, overwrite=overwrite, reporter=shown, command=session.command
        )


def tell_next(session: Session, run: Run, model: str, task: str) -> None:
    """The command that goes on from here."""
    best = run.table("effects").dropna(subset=["effect", "head"])
    # Nothing but the embedding comes before layer 0.
    best = best[(best["site"] == "z") & (best["layer"] > 0)]
    if run.manifest["circuits"].get("receivers") or best.empty:
        return
    top = best.loc[best["effect"].abs().idxmax()]
    receiver = f"L{top['layer']}H{top['head']}.q"
    words = ["workbench", "circuits", "patch", model, "--task", task, "--paths", receiver]
    session.say(f"Next:   {shlex.join(words)}   (what that head's queries come from)")
