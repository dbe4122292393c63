"""`workbench circuits attribute` and `discover`: scores of nodes and edges, and circuits that searches keep."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.attached import attached, default_run
from workbench.cli.circuit_options import Asked, Metric, Pairs, Task, found_pairs
from workbench.cli.circuit_tables import show_methods, show_scores, tell_pairs
from workbench.cli.heads import tell_run
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.errors import RequestError

if TYPE_CHECKING:
    from workbench.runs import Run
    from workbench.studies.searches import SearchSettings
    from workbench.tracing import Model


class WayName(StrEnum):
    """What is moved."""

    noising = "noising"
    denoising = "denoising"


class FreezeName(StrEnum):
    """Norms whose scale gradients take as given."""

    none = "none"
    final = "final"
    all = "all"


class AblationName(StrEnum):
    """What stands in for a clean activation."""

    patching = "patching"
    mean = "mean"
    mean_positional = "mean-positional"
    zero = "zero"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="attribute", cls=Command)(attribute)
    app.command(name="discover", cls=Command)(discover)


Listing = Annotated[bool, typer.Option("--list", help="Print every method, then stop.")]


def attribute(
    model: options.MaybeModel = None,
    task: Task = "ioi",
    pairs: Pairs = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="eap, eap-ig, atp, relp, direct and others; --list shows all.")
    ] = "eap-ig",
    listing: Listing = False,
    metric: Metric = None,
    direction: Annotated[
        WayName, typer.Option(help="From clean to corrupt (noising), or the other way round.")
    ] = WayName.noising,
    ablation: Annotated[
        AblationName, typer.Option(help="What stands in for a clean activation: the corrupt one, a mean, or nothing.")
    ] = AblationName.patching,
    freeze: Annotated[
        FreezeName, typer.Option(help="Norms whose scale is held: the final one saturates gradients.")
    ] = FreezeName.none,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps of integrated gradients. [default: 5]")
    ] = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Score every node or edge from a few gradients; positive scores help the task.

    These are estimates: `workbench circuits evaluate` tests the circuits that they choose. `--method direct` sums up
    exactly what each part writes straight to the logits instead.
    """
    session = current_session()
    if listing:
        return show_methods(session, "attribute")
    own: dict[str, Any] = {
        "direction": direction.value, "ablation": ablation.value, "freeze_ln_scale": freeze.value, "steps": steps or 5,
    }  # fmt: skip
    if method == "direct":
        if (metric, direction, ablation, freeze, steps) != (
            None, WayName.noising, AblationName.patching, FreezeName.none, None,
        ):  # fmt: skip
            raise RequestError("--method direct patches nothing and takes no gradient; leave its other options out.")
        own = {}
    _search(session, "attribute", model, (task, pairs, seed), method, metric, own, out, overwrite, dtype, device)


def discover(
    model: options.MaybeModel = None,
    task: Task = "ioi",
    pairs: Pairs = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="acdc, hisp, edge-pruning, ugs and others; --list shows all.")
    ] = "acdc",
    listing: Listing = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method's own; --list shows which."),
    ] = None,
    metric: Metric = None,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Search for the circuit of a task: what can be cut without losing it.

    Searches run the model once for each edge, or train masks, so that they take much longer than attribution.
    """
    session = current_session()
    if listing:
        return show_methods(session, "discover")
    own = settings_from(setting or ())
    _search(session, "discover", model, (task, pairs, seed), method, metric, own, out, overwrite, dtype, device)


def _search(
    session: Session,
    kind: str,
    model: str | None,
    asked: Asked,
    method: str,
    metric: Any,
    own: dict[str, Any],
    out: Path | None,
    overwrite: bool,
    dtype: Any,
    device: str | None,
) -> None:
    """What the two commands share: check, load, run, tell."""
    if model is None:
        raise RequestError(f"Name a model, as in `workbench circuits {kind} smollm2-135m`; --list needs none.")
    name = None if metric is None else metric.value
    path = out or default_run(kind, model, asked, method, name, sorted(own.items()), dtype, device)
    session.writes(path, overwrite=overwrite)
    with session.err.status("importing"):
        session.silence_transformers()
        from workbench.studies.pairs import check_task
        from workbench.studies.searches import SearchSettings, method_names

        check_task(asked[0], name, asked[1])
        spaced = method.replace("-", " ")
        chosen = spaced if spaced in method_names(kind) else method  # type: ignore[arg-type]
        settings = SearchSettings(kind, chosen, name, asked[2], own)  # type: ignore[arg-type]
        settings.check()
    with attached(session, model, dtype, device) as loaded:
        run = _run(session, loaded, path, settings, model, asked, overwrite)
    tell_pairs(session, run)
    show_scores(session, run)
    tell_run(session, path)
    if run.has_array("scores"):
        session.say(f"Next:   {shlex.join(['workbench', 'circuits', 'evaluate', str(path)])}")


def _run(
    session: Session, model: Model, path: Path, settings: SearchSettings, named: str, asked: Asked, overwrite: bool
) -> Run:
    from workbench.studies.searches import STEPS, search_run

    task = found_pairs(session, model, asked, settings.metric)
    with display(session.err, STEPS) as shown:
        return search_run(
            model, task, path, settings=settings, overwrite=overwrite, reporter=shown, command=session.command,
            asked=(named, *asked),
        )  # fmt: skip


def settings_from(texts: list[str] | tuple[()]) -> dict[str, Any]:
    """`steps=200`, `renormalise=true`, `threshold=0.01,0.02` as values."""
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise RequestError(f"--set {text!r}: write it as NAME=VALUE, as in --set steps=200.")
        parts = [_value(part.strip()) for part in value.split(",") if part.strip()]
        found[name.strip()] = parts[0] if len(parts) == 1 else tuple(parts)
    return found


def _value(text: str) -> int | float | bool | str | None:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
