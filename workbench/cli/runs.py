"""`workbench runs`: what is on disk."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.circuit_tables import show_circuits
from workbench.cli.session import Command, Session, current_session
from workbench.cli.tables import estimate, plain, show_certificate, show_facts, show_findings, show_table, table

if TYPE_CHECKING:
    import pandas as pd

    from workbench.runs import Run

app = typer.Typer(no_args_is_help=True, help="List, show and compare runs.")


@app.command(name="list", cls=Command)
def show_list(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs lie.")] = Path("runs"),
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every file and compare its checksum, as `runs show` does for one run."),
    ] = False,
) -> None:
    """List the runs in a folder: finished, interrupted, damaged.

    Whether every file is there with its size is always checked, and the manifest against its checksum; the
    contents of tables and arrays only with --verify. The column "checked" says which.
    """
    session = current_session()
    with session.err.status("reading"):
        from workbench.runs import list_runs

        found = list_runs(folder, verify=verify)
    if found.empty:
        session.say(f"There are no runs in {folder}.")
        return
    made = table("run", "kind", "model", "created", "status", "checked", "certificate")
    for row in found.to_dict("records"):
        made.add_row(
            _inside(folder, str(row["path"])),
            row["kind"],
            row["model"],
            row["created"],
            row["status"],
            _checked(row["status"], verify),
            "passed" if row["certificate"] else "-",
        )
    show_table(session, f"Runs in {folder}", made)
    if not verify and (found["status"] == "complete").any():
        again = shlex.join(["workbench", "runs", "list", str(folder), "--verify"])
        session.say(f"Contents were not read; to compare them with their checksums: {again}")


@app.command(name="show", cls=Command)
def show(
    run: options.Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON instead.")] = False,
) -> None:
    """Show what a run holds and what it found; every checksum is compared."""
    session = current_session()
    with session.err.status("reading"):
        from workbench.runs import Run

        found = Run.open(run)
    if as_json:
        typer.echo(json.dumps(found.manifest, indent=2))
        return
    _show_manifest(session, found)
    show_certificate(session, found.manifest.get("certificate", {}))
    show_findings(session, found)
    if found.manifest.get("circuits"):
        show_circuits(session, found)


@app.command(name="compare", cls=Command)
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run with head scores, or of a trace.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
    top: Annotated[int, typer.Option(min=0, help="Largest differences to print.")] = 10,
) -> None:
    """Compare head scores, or a trace's statistics, of two runs (differences are B less A, with intervals)."""
    session = current_session()
    with session.err.status("reading"):
        from workbench.runs import Run, compare_runs

        found = compare_runs(Run.open(a), Run.open(b))
    for note in found.attrs["notes"]:
        session.say(f"Note: {note}")
    _show_agreement(session, found)
    if not found.attrs.get("identical"):
        _show_differences(session, found, top)


def _show_manifest(session: Session, run: Run) -> None:
    manifest = run.manifest
    model, machine = manifest.get("model", {}), manifest.get("environment", {})
    rows = [
        ("id", run.id),
        ("kind", run.kind),
        ("created", manifest.get("created")),
        ("finished", manifest.get("finished")),
        ("command", manifest.get("command")),
        ("model", f"{model.get('name')}, {model.get('dtype')} on {model.get('device')}"),
        ("weights, SHA-256", model.get("weights_sha256")),
        ("special tokens", model.get("special_tokens")),
        ("seed", manifest.get("settings", {}).get("seed")),
        ("versions", ", ".join(f"{name} {machine.get(name)}" for name in ("workbench", "torch", "transformers"))),
        ("machine", f"{machine.get('cpu')}, {machine.get('threads')} threads"),
        ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in manifest.get("seconds", {}).items())),
        ("tables", ", ".join(f"{name} ({entry['rows']} rows)" for name, entry in manifest["tables"].items())),
        ("arrays", ", ".join(manifest["arrays"]) or "none"),
    ]
    rows += [
        (f"prompts: {prompt.get('name')}", f"{prompt.get('n')}, {prompt.get('tokens')} tokens, {prompt.get('sha256')}")
        for prompt in manifest.get("prompts", [])
    ]
    show_facts(session, run.title, rows)


def _show_agreement(session: Session, found: pd.DataFrame) -> None:
    from workbench.figures.verdict import SIGNIFICANT

    made = table("detector", ">heads", ">rank correlation", ">mean |difference|", ">told from zero")
    for detector, rows in found.groupby("detector", sort=False):
        both = rows[["value_a", "value_b"]].dropna()
        # The correlation of constant scores does not exist.
        varied = len(both) > 1 and bool((both.nunique() > 1).all())
        told = int((rows["q"] < SIGNIFICANT).sum())
        made.add_row(
            str(detector),
            str(len(both)),
            plain(both["value_a"].rank().corr(both["value_b"].rank())) if varied else "-",
            plain(rows["difference"].abs().mean()),
            f"{told} of {int(rows['q'].notna().sum())}",
        )
    show_table(session, f"Agreement (told from zero: q below {SIGNIFICANT:g} over a detector's heads)", made)


def _show_differences(session: Session, found: pd.DataFrame, top: int) -> None:
    order = found["difference"].abs().sort_values(ascending=False, kind="stable").index[:top]
    rows = found.loc[order]
    if rows.empty:
        return
    made = table("detector", "head", "A", "B", "B - A", ">q")
    for row in rows.to_dict("records"):
        made.add_row(
            str(row["detector"]),
            f"L{row['layer']}H{row['head']}",
            estimate(row["value_a"], row["low_a"], row["high_a"]),
            estimate(row["value_b"], row["low_b"], row["high_b"]),
            estimate(row["difference"], row["low"], row["high"], sign=True),
            plain(row["q"]),
        )
    show_table(session, "Largest differences", made)


def _checked(status: str, verify: bool) -> str:
    """What a row's status rests on; of an unfinished run only its list of steps is read by default."""
    if status == "newer":
        return "-"
    return "contents" if verify else "sizes" if status in ("complete", "corrupt") else "-"


def _inside(folder: Path, path: str) -> str:
    """The path as the user would write it."""
    place = folder.expanduser().resolve()
    return str(folder / Path(path).relative_to(place)) if Path(path).is_relative_to(place) else path
