"""What the circuits commands print, from a run's manifest and tables alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.cli.session import Session, printable
from workbench.cli.tables import ascii_signs, estimate, plain, probability, show_table, table

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
    from workbench.reports.circuit_sentences import told_apart

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
    caution = told_apart(frame)
    if caution:
        session.say(caution)


def _columns(rows: pd.DataFrame) -> list[str]:
    """What tells places apart; columns that are the same everywhere say nothing."""
    wanted = ["node", "receiver", "site", "position", "key"]
    there = [name for name in wanted if name in rows and rows[name].notna().any()]
    return [name for name in there if name == "node" or rows[name].nunique() > 1]


def show_methods(session: Session, kind: str) -> None:
    """The methods of a command with what they do, or their settings."""
    with session.err.status("importing"):
        session.silence_transformers()
        from workbench.circuits.attribution import METHODS as ATTRIBUTION
        from workbench.circuits.discovery import METHODS as DISCOVERY
        from workbench.studies.searches import DIRECT, defaults
    if kind == "attribute":
        made = table("method", "scores", "what it does", "paper")
        for name, method in ATTRIBUTION.items():
            made.add_row(name, "nodes" if method.of_edges is None else "edges", method.caption, method.paper)
        made.add_row(DIRECT, "nodes", "what each head and MLP writes straight to the logits, exactly", "-")
    else:
        made = table("method", "what it does", "settings (--set NAME=VALUE)")
        for name, function in DISCOVERY.items():
            said = (function.__doc__ or "").strip().partition("\n\n")[0]
            listed = ", ".join(f"{key}={_brief(value)}" for key, value in defaults(name).items())
            made.add_row(name.replace(" ", "-"), printable(" ".join(said.split())), listed)
    show_table(session, "Methods", made)


def _brief(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 3:
        return f"{value[0]:g} to {value[-1]:g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_scores(session: Session, run: Run, top: int = TOP) -> None:
    """The largest scores of edges and nodes, what was kept, and what parts write."""
    about = run.manifest["circuits"]
    for name, title in (("edge_scores", "edges"), ("node_scores", "nodes")):
        if not run.has_table(name):
            continue
        frame = run.table(name).sort_values("rank", kind="stable")
        made = table(title[:-1], ">score [95 %]")
        for row in frame.head(top).to_dict("records"):
            through = f".{row['through']}" if row.get("through") else ""
            shown = f"{row['source']} -> {row['target']}{through}" if title == "edges" else str(row["node"])
            made.add_row(shown, estimate(row["score"], row["low"], row["high"], sign=True))
        show_table(session, f"The {min(top, len(frame))} largest of {len(frame):,} {title} ({about['method']})", made)
    if run.has_table("contributions"):
        frame = run.table("contributions")
        made = table("part", ">towards the answer [95 %]", ">q")
        for row in frame.loc[frame["value"].abs().nlargest(top).index].to_dict("records"):
            made.add_row(
                str(row["node"]), estimate(row["value"], row["low"], row["high"], sign=True), probability(row["q"])
            )
        show_table(session, f"The {min(top, len(frame))} largest of {len(frame)} parts", made)
    if about.get("circuit"):
        found = about["circuit"]
        session.say(f"Kept: {found['edges']:,} of {found['of']:,} edges ({100 * found['edges'] / found['of']:.2g} %).")
    for note in about.get("notes", ()):
        session.say(f"Note: {note}")


def show_evaluation(session: Session, run: Run) -> None:
    """Faithfulness by size beside random circuits, the measures, and what they do not show."""
    from workbench.reports.circuit_sentences import few_pairs, known_circuit

    curve = run.table("faithfulness")
    random = run.table("random_circuits") if run.has_table("random_circuits") else None
    for (method, ranking), rows in curve.groupby(["method", "ranking"], sort=False):
        made = table(">edges kept", ">share", ">faithfulness [95 %]", ">random circuits [range]")
        for row in rows.sort_values("fraction").to_dict("records"):
            beside = "-"
            if random is not None:
                same = random[(random["method"] == method) & (random["ranking"] == ranking)]
                found = same[same["fraction"] == row["fraction"]].to_dict("records")
                beside = estimate(found[0]["value"], found[0]["low"], found[0]["high"]) if found else "-"
            made.add_row(
                f"{row['edges']:,}", f"{100 * row['fraction']:.3g} %", estimate(row["value"], row["low"], row["high"]),
                beside,
            )  # fmt: skip
        ranked = {"absolute": "ranked by size", "signed": "ranked by sign", "given": "as it was found"}[str(ranking)]
        show_table(session, f"{method}, {ranked}", made)
    made = table("method", "measure", ">value [95 %]", "beside")
    for row in run.table("measures").to_dict("records"):
        name = str(row["measure"]).replace("_", " ")
        made.add_row(row["method"], name, estimate(row["value"], row["low"], row["high"]), printable(row["note"]))
    show_table(session, "Measures (CPR: higher is better, CMD: lower)", made)
    about = run.manifest["circuits"]
    known = known_circuit(about, run.has_table("roc"))
    for sentence in (few_pairs(about.get("n")), chosen_sentence(about.get("circuit"), curve), known):
        if sentence:
            session.say(ascii_signs(sentence))


def chosen_sentence(kept: Mapping[str, Any] | None, curve: pd.DataFrame) -> str:
    """The circuit that was kept; that none is faithful enough, where none is."""
    from workbench.figures.text import number
    from workbench.reports.circuit_sentences import WHOLE, best_below
    from workbench.reports.circuit_summary import FAITHFUL

    value = None if not kept else kept["faithfulness"]
    if not kept or value is None or value != value:
        return ""
    if value < FAITHFUL and kept["ranking"] != "given":
        same = (curve["method"] == kept["method"]) & (curve["ranking"] == kept["ranking"])
        return best_below(kept["method"], curve[same & (curve["fraction"] == kept["fraction"])].iloc[0].to_dict())
    return (
        f"Kept: {kept['edges']:,} of {kept['of']:,} edges of {kept['method']}, faithfulness "
        f"{number(value, beside=WHOLE)}" + (", which is below 80 %." if value < FAITHFUL else ".")
    )


def show_circuits(session: Session, run: Run) -> None:
    """Whatever a run about circuits found."""
    tell_pairs(session, run)
    if run.has_table("effects"):
        show_effects(session, run)
    if run.has_table("faithfulness"):
        show_evaluation(session, run)
    else:
        show_scores(session, run)
