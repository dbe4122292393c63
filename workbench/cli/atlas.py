"""`workbench atlas`: every detector of a set on one model, where they agree, and which kinds of heads there are."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.attached import attached, count_steps, default_run, predicted_peak
from workbench.cli.heads import tell_run
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session, printable
from workbench.cli.tables import estimate, plain, show_findings, show_table, table
from workbench.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.runs import Run
    from workbench.studies import SurveySettings
    from workbench.tracing import Model

PAIRS = 5


class SetName(StrEnum):
    """Named sets of detectors."""

    core = "core"
    fast = "fast"
    all = "all"


class MapName(StrEnum):
    """Ways of placing heads in two dimensions."""

    pca = "pca"
    tsne = "tsne"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="atlas", cls=Command)(atlas)


def atlas(
    model: options.MaybeModel = None,
    detectors: Annotated[
        str | None, typer.Option(metavar="A,B", help="Detectors by name, costly ones too; --list shows all.")
    ] = None,
    group: Annotated[
        SetName | None,
        typer.Option(
            "--set",
            help="Instead: core (as `workbench heads`), fast (all but the costly ones), all. [default: fast]",
        ),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Print every detector and what it measures, then stop.")
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(min=2, help="Texts of each domain, and repeated sequences. [default: 50 texts, 10 sequences]"),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(metavar="N", min=64, help="Tokens of texts, repeats and needles. [default: 64, 150, 160 and 256]"),
    ] = None,
    method: Annotated[MapName, typer.Option("--map", help="How the map of heads is drawn.")] = MapName.pca,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Run many detectors at once: one table, their agreement, kinds of heads, a map.

    Prompts of one kind share their passes. What cannot run on the model is listed with its reason. An interrupted
    atlas goes on where it stopped. Costly detectors (they train, or patch head by head) run only when named or with
    --set all.
    """
    session = current_session()
    if listing:
        return show_list(session)
    if model is None:
        raise RequestError("Name a model, as in `workbench atlas smollm2-135m`; --list needs none.")
    if detectors is not None and group is not None:
        raise RequestError("Both --detectors and --set were given; leave one of them out.")
    chosen = options.names("--detectors", detectors, "sink,induction")
    group = group or SetName.fast
    path = out or default_run("atlas", model, chosen, group.value, prompts, length, method.value, seed, dtype, device)
    session.writes(path, overwrite=overwrite)
    with session.err.status("importing"):
        settings = _settings(chosen, group, prompts, length, seed)
    with attached(session, model, dtype, device) as loaded:
        run = _run(session, loaded, path, settings, method, overwrite)
    show_findings(session, run)
    show_atlas(session, run)
    tell_run(session, path)


def _settings(
    chosen: tuple[str, ...] | None, group: SetName, prompts: int | None, length: int | None, seed: int
) -> SurveySettings:
    from dataclasses import replace

    from workbench.heads import Settings
    from workbench.heads.detection import choose
    from workbench.studies import atlas_settings

    choose(chosen)
    detection = Settings(seed=seed)
    if prompts is not None:
        detection = replace(detection, text_prompts=prompts, repeat_prompts=prompts)
    if length is not None:
        detection = detection.at_length(length)
    return atlas_settings(chosen, group=group.value, detection=detection)


def _run(session: Session, model: Model, path: Path, settings: SurveySettings, method: MapName, overwrite: bool) -> Run:
    """The atlas under a display, the predicted memory first."""
    from workbench.studies import atlas as run_atlas
    from workbench.studies.atlas import more_steps

    settings.check(len(model.spec.heads()))
    session.say(predicted_peak(model, settings))
    with display(session.err, count_steps(settings) + more_steps(settings)) as shown:
        return run_atlas(
            model, path, settings=settings, method=method.value, overwrite=overwrite, reporter=shown,
            command=session.command,
        )  # fmt: skip


def show_list(session: Session) -> None:
    """Every detector: its kind of prompts, what it measures, its bar and its paper."""
    with session.err.status("importing"):
        from workbench.heads import DETECTORS
        from workbench.heads.sets import SETS, is_costly, members
    core = set(members("core"))
    made = table("detector", "kind", "measures", ">bar", "set", "paper")
    for name, detector in DETECTORS.items():
        group = "all" if is_costly(detector) else "core" if name in core else "fast"
        made.add_row(
            name, detector.kind, printable(f"{detector.measures} ({detector.unit})"),
            "-" if detector.threshold is None else plain(detector.threshold), group, printable(detector.paper),
        )  # fmt: skip
    show_table(session, f"{len(DETECTORS)} detectors", made)
    for name, said in SETS.items():
        session.say(f"--set {name}: {said} ({len(members(name))})")


def show_atlas(session: Session, run: Run) -> None:
    """Kinds of heads, the pairs of detectors that agree most and least, and what could not run."""
    about = run.manifest.get("atlas", {})
    titles = dict(run.table("detectors")[["detector", "title"]].itertuples(index=False))
    if run.has_table("cluster_info"):
        _show_clusters(session, run, about)
    elif about.get("no_map"):
        session.say(f"No map: {about['no_map']}")
    if run.has_table("agreement"):
        _show_pairs(session, run, titles)
    if run.has_table("skipped"):
        made = table("detector", "reason")
        for row in run.table("skipped").to_dict("records"):
            made.add_row(printable(row["title"]), printable(row["reason"]))
        show_table(session, "Could not run on this model", made)


def _show_clusters(session: Session, run: Run, about: dict[str, object]) -> None:
    heads = run.table("head_clusters")
    made = table("kind of heads", ">heads", "most typical")
    for row in run.table("cluster_info").to_dict("records"):
        own = heads[heads["cluster"] == row["cluster"]].nlargest(6, "silhouette")
        named = [f"L{layer}H{head}" for layer, head in zip(own["layer"], own["head"], strict=True)]
        made.add_row(printable(row["name"]), str(row["size"]), " ".join(named))
    show_table(session, "Kinds of heads", made)
    verdict = "tighter than chance" if about.get("structured") else "no tighter than chance"
    session.say(
        f"Mean silhouette {plain(about.get('silhouette'))}, at most {plain(about.get('null_highest'))} in shuffled "
        f"scores: {verdict}."
    )


def _show_pairs(session: Session, run: Run, titles: dict[str, str]) -> None:
    found = run.table("agreement").dropna(subset=["rho"]).sort_values("rho", kind="stable")
    count = min(PAIRS, len(found) // 2)
    made = table("detectors", "rank correlation [95 %]")
    for part in (found.tail(count).iloc[::-1], found.head(count)):
        for row in part.to_dict("records"):
            names = " and ".join(titles.get(row[side], row[side]) for side in ("detector_a", "detector_b"))
            made.add_row(printable(names), estimate(row["rho"], row["low"], row["high"], sign=True))
        made.add_section()
    show_table(session, f"Detectors that rank heads most alike, and most unlike, of {len(found)} pairs", made)
