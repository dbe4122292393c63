"""What commands print of a model or a run, as tables; from its manifest and tables alone.

Numbers are written as in reports (`workbench.figures.text`), but with the plain minus, so that they can be
copied into a calculation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from workbench.cli.session import Session, printable

if TYPE_CHECKING:
    import pandas as pd

    from workbench.runs import Run

# What a first look at a model is about.
LEADING = ("sink", "previous_token", "induction", "duplicate_token", "retrieval")
TOP = 3


def table(*columns: str) -> Table:
    """An empty table in the one style; a column that begins with `>` is set flush right."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return made


def show_table(session: Session, title: str, made: Table) -> None:
    """A table under its title, which is not broken to the width of a narrow table."""
    session.out.print(printable(title), style="bold", soft_wrap=True)
    session.out.print(made)


def show_facts(session: Session, title: str, rows: Sequence[tuple[str, object]]) -> None:
    """Names and values."""
    made = table("", "")
    made.show_header = False
    for name, value in rows:
        made.add_row(name, printable("-" if value is None else str(value)))
    show_table(session, title, made)


def show_certificate(session: Session, certificate: Mapping[str, Any]) -> None:
    """Each check with its measured error and tolerance."""
    made = table("check", ">measured", ">tolerance", "passed", "what")
    for check in certificate.get("checks", ()):
        # One check asks for a change, so that its bound is from below.
        bound = ">" if check["name"] == "edit" else "<="
        made.add_row(
            check["name"],
            _scientific(check["measured"]),
            f"{bound} {_scientific(check['tolerance'])}",
            "yes" if check["passed"] else "NO",
            printable(str(check["detail"])),
        )
    show_table(session, "Certificate", made)


def show_findings(session: Session, run: Run, detectors: Sequence[str] | None = None) -> None:
    """The top heads of detectors (all by default), and what ablating them did."""
    if run.has_table("head_scores"):
        scores, about = run.table("head_scores"), run.table("detectors")
        if detectors is not None:
            about = about[about["detector"].isin(detectors)].sort_values(
                "detector", key=lambda column: column.map(list(detectors).index)
            )
        _show_heads(session, scores, about)
    if run.has_table("verification"):
        show_verification(session, run.table("verification"))
        if run.has_table("verification_single"):
            _show_singles(session, run.table("verification_single"))
    elif run.has_table("head_scores"):
        session.say(
            "No ablation was run: the scores say what heads attend to, not what depends on them (`workbench verify`)."
        )


def _show_heads(session: Session, scores: pd.DataFrame, about: pd.DataFrame) -> None:
    made = table("detector", "head", "score [95 % interval]", ">null", ">q", "reach the bar", "unit")
    for detector in about.to_dict("records"):
        rows = scores[scores["detector"] == detector["detector"]]
        known = rows[rows["value"].notna()].sort_values("rank")
        title = printable(str(detector["title"]))
        if known.empty:
            made.add_row(title, "-", "nothing to score", "", "", "", "")
        for place, row in enumerate(known.head(TOP).to_dict("records")):
            made.add_row(
                title if place == 0 else "",
                f"L{row['layer']}H{row['head']}",
                estimate(row["value"], row["low"], row["high"]),
                plain(row["null"]),
                probability(row["q"]),
                _reaching(known, detector) if place == 0 else "",
                printable(str(detector["unit"])) if place == 0 else "",
            )
        made.add_section()
    show_table(session, "Top heads", made)
    sinks = scores[scores["detector"] == "sink"]["value"].dropna()
    if len(sinks):
        session.say(
            f"Position 0 draws more than 0.3 of the attention in {100 * sinks.mean():.1f} % of all pairs of "
            f"head and prompt (Sink, averaged over {len(sinks)} heads); {int((sinks > 0.5).sum())} heads do "
            "so in most prompts."
        )


def _reaching(known: pd.DataFrame, detector: Mapping[str, Any]) -> str:
    """How many heads reach the detector's threshold."""
    threshold, better = detector["threshold"], detector["better"]
    if threshold != threshold:
        return "no bar"
    values = known["value"].abs() if better == "either" else known["value"]
    reached = (values <= threshold) if better == "lower" else (values >= threshold)
    sign = "<=" if better == "lower" else ">="
    return f"{int(reached.sum())} of {len(known)} {sign} {plain(threshold)}"


def show_verification(session: Session, rows: pd.DataFrame) -> None:
    """Each ablation beside its controls, and a sentence on what that shows."""
    from workbench.figures import verdict
    from workbench.figures.text import form

    made = table(
        *("detector", ">k", "metric", "intact -> ablated", "effect [95 %]"),
        *("random heads [range]", ">p", ">q", "outcome"),
    )
    sentences = []
    for row in rows.to_dict("records"):
        found = verdict(row)
        metric = str(row["metric"]).replace("_", " ")
        made.add_row(
            printable(str(row["detector"])),
            str(row["k"]),
            printable(metric),
            f"{plain(row['baseline'])} -> {plain(row['ablated'])}",
            estimate(row["effect"], row["low"], row["high"], sign=True),
            estimate(row["control_effect"], row["control_low"], row["control_high"], sign=True),
            probability(row["p"]),
            probability(row["q"]),
            found.label,
        )
        sentences.append(
            f"{row['detector']}, {metric} ({row['unit']}, {row['better']} is better; {row['n']} prompts): "
            f"{ascii_signs(found.sentence)}"
        )
    forms = ", ".join(dict.fromkeys(map(form, rows.to_dict("records"))))
    show_table(session, f"Ablation ({forms}) of the k heads together, against matched random heads", made)
    for sentence in sentences:
        session.say(sentence)


def _show_singles(session: Session, rows: pd.DataFrame) -> None:
    """Each head alone beside single random heads."""
    from workbench.figures import verdict

    made = table("detector", "head", "metric", "effect [95 %]", "random heads [range]", ">q", "outcome")
    for row in rows.to_dict("records"):
        made.add_row(
            printable(str(row["detector"])),
            str(row["heads"]),
            str(row["metric"]).replace("_", " "),
            estimate(row["effect"], row["low"], row["high"], sign=True),
            estimate(row["control_effect"], row["control_low"], row["control_high"], sign=True),
            probability(row["q"]),
            verdict(row).label,
        )
    show_table(session, "Each head alone (heads that stand in for one another hide here)", made)


def plain(value: object, *, sign: bool = False) -> str:
    """A number for people."""
    from workbench.figures.text import number, signed

    return ascii_signs(signed(value) if sign else number(value))


def estimate(value: object, low: object, high: object, *, sign: bool = False) -> str:
    """`0.93 [0.91, 0.95]`; a value that is rounding beside its bounds is zero."""
    from workbench.figures.text import interval, number, signed

    bounds = ascii_signs(interval(low, high)).replace(" to ", ", ")
    if not bounds:
        return plain(value, sign=sign)
    written = (signed if sign else number)(value, beside=(float(low), float(high)))  # type: ignore[arg-type]
    return f"{ascii_signs(written)} [{bounds}]"


def probability(value: object) -> str:
    """A p or q value for people."""
    from workbench.figures.text import probability as written

    return ascii_signs(written(value))


def ascii_signs(text: str) -> str:
    """With the plain minus and dash."""
    return text.replace("−", "-").replace("–", "-")


def _scientific(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, int | float) else "-"
