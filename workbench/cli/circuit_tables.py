"""What the circuits commands print, from a run's manifest and tables alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.cli.session import Session, printable
from workbench.cli.tables import estimate, plain, probability, show_table, table

if TYPE_CHECKING:
    import pandas as pd

    from workbench.runs import Run

TOP = 10
_WORDS = {"denoising": "restored (clean into corrupt)", "noising": "broken (corrupt into clean)"}


def show_tasks(session: Session, measured: Mapping[str, dict[str, Any] | str]) -> None:
    """The tasks; with a model, what it makes of them."""
    with session.err.status("importing"):
        session.silence_transformers()
        from workbench.tasks.known_circuits import KNOWN_CIRCUITS
        from workbench.tasks.pair_tasks import PAIR_TASKS
    columns = ("right", ">clean", ">corrupt", "metric", ">pairs", ">tokens") if measured else ()
    made = table("task", "what it is", *columns, "known circuit of")
    for name, build in PAIR_TASKS.items():
        said = (sys.modules[build.__module__].__doc__ or "").partition("\n\n")[0]
        known = ", ".join(one.model for one in KNOWN_CIRCUITS.get(name, ())) or "-"
        found = measured.get(name)
        if isinstance(found, str):
            made.add_row(name, printable(found), *[""] * len(columns), known)
            continue
        cells = [] if found is None else [
            f"{100 * found['right']:.0f} %", plain(found["clean"], sign=True), plain(found["corrupt"], sign=True),
            found["metric"], str(found["n"]), str(found["tokens"]),
        ]  # fmt: skip
        made.add_row(name, printable(said), *cells, known)
    show_table(session, f"{len(PAIR_TASKS)} tasks", made)
    session.say("Pairs of your own: a .jsonl or .csv file with the fields clean, corrupt, answer and foil.")


def tell_pairs(session: Session, run: Run) -> None:
    """What the two runs score by themselves."""
    about = run.manifest["circuits"]
    session.say(
        f"{about['task']} ({about['n']} pairs, {about['metric'].replace('_', ' ')}): clean {plain(about['clean'])}, "
        f"corrupt {plain(about['corrupt'])}; the clean prompt is answered rightly in {100 * about['right']:.0f} %."
    )
    if about["right"] < 0.5:
        session.say("Note: the model mostly fails this task, so that what is found is no circuit of doing it.")
    if about.get("refusal"):
        session.say(f"Note: {about['refusal']}.")


def show_effects(session: Session, run: Run, top: int = TOP) -> None:
    """The strongest places of each direction."""
    frame = run.table("effects")
    for direction, rows in frame.groupby("direction", sort=False):
        known = rows.dropna(subset=["effect"])
        made = table(*_columns(known), ">effect [95 %]", "share of the gap", ">p", ">q")
        best = known.loc[known["effect"].abs().sort_values(ascending=False, kind="stable").index[:top]]
        for row in best.to_dict("records"):
            made.add_row(
                *(printable("-" if row[name] is None or row[name] != row[name] else str(row[name]))
                  for name in _columns(known)),
                estimate(row["effect"], row["effect_low"], row["effect_high"], sign=True),
                estimate(row["recovery"], row["low"], row["high"], sign=True),
                probability(row["p"]),
                probability(row["q"]),
            )  # fmt: skip
        found = int((known["q"] < 0.05).sum())
        show_table(session, f"What is {_WORDS[str(direction)]}: {found} of {len(known)} places at q < 0.05", made)
    least = 2.0 ** (1 - int(frame["n"].max()))
    if least * 20 > 1 / len(frame):
        session.say(f"With so few pairs p cannot fall below {plain(least)}; --pairs 16 or more tells chance apart.")


def _columns(rows: pd.DataFrame) -> list[str]:
    """What tells places apart; columns that are the same everywhere say nothing."""
    wanted = ["node", "receiver", "site", "position", "key"]
    there = [name for name in wanted if name in rows and rows[name].notna().any()]
    return [name for name in there if name == "node" or rows[name].nunique() > 1]
