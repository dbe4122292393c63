"""The summary of a run about circuits: what the model makes of the task, and the strongest findings, either way."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from workbench.figures.text import interval, number, readable, signed
from workbench.figures.verdict import SIGNIFICANT
from workbench.reports.circuit_sentences import WHOLE, best_below, few_pairs, told_apart
from workbench.reports.source import RunLike, frame, model_named

_VERBS = {"denoising": "restores", "noising": "breaks"}
# A circuit that holds this much of the gap is called faithful.
FAITHFUL = 0.8


def circuits_summary(run: RunLike) -> Markup:
    """One paragraph: the task, what the model makes of it, and the strongest findings, negative ones as well."""
    about = run.manifest["circuits"]
    parts = [
        Markup("On {} pairs of <strong>{}</strong>, {} scores {} ({}) on the clean prompts and {} on the corrupt ones.")
        .format(
            about.get("n", "?"), about.get("task", "?"), model_named(run), number(about.get("clean")),
            readable(about.get("metric", "metric")), number(about.get("corrupt")),
        )
    ]  # fmt: skip
    right = about.get("right")
    if right is not None:
        parts.append(Markup("It answers {} % of the clean prompts rightly.").format(f"{100 * right:.0f}"))
        if right < 0.5:
            parts.append(Markup("So it mostly fails the task, and nothing here is a circuit of doing it."))
    if about.get("refusal"):
        parts.append(Markup("{}.").format(str(about["refusal"])[:1].upper() + str(about["refusal"])[1:]))
    for told in (_patched, _scored, _evaluated):
        parts += told(run)
    return Markup(" ").join(parts)


def places(rows: pd.DataFrame) -> pd.Series[str]:
    """What each row's place is called: its node, site where there are several, position and key."""
    named = rows["node"].astype(str)
    for column, sign in (("position", " at "), ("key", " from ")):
        if column in rows:
            named = named + rows[column].map(lambda one, sign=sign: "" if pd.isna(one) else f"{sign}{one}")
    return named


def _patched(run: RunLike) -> list[Markup]:
    effects = frame(run, "effects")
    if effects is None:
        return []
    parts = []
    for direction, rows in effects.groupby("direction", sort=False):
        known = rows.dropna(subset=["recovery"])
        if known.empty:
            continue
        count = int((known["q"] < SIGNIFICANT).sum())
        best, worst = (known.loc[known["recovery"].nlargest(1).index[0]], known.loc[known["recovery"].idxmin()])
        verb = _VERBS[str(direction)]
        parts.append(
            Markup(
                "Of {} places that were patched {}, {} differ from nothing at q &lt; 0.05; "
                "<b>{}</b> {} most, {} of the gap{}."
            ).format(
                len(known), "clean into corrupt" if direction == "denoising" else "corrupt into clean", count or "none",
                places(best.to_frame().T).iloc[0], verb, number(best["recovery"]), _bounds(best),
            )
        )  # fmt: skip
        if worst["recovery"] < -0.02:
            parts.append(
                Markup("<b>{}</b> works against the task ({}{}).").format(
                    places(worst.to_frame().T).iloc[0], signed(worst["recovery"]), _bounds(worst)
                )
            )
    # Once for both directions, which have the same pairs.
    return [*parts, *map(escape, filter(None, [told_apart(effects)]))]


def _bounds(row: Any) -> str:
    bounds = interval(row["low"], row["high"])
    return f" [{bounds}]" if bounds else ""


def _scored(run: RunLike) -> list[Markup]:
    about, parts = run.manifest["circuits"], []
    for table, key in (("edge_scores", "edge"), ("node_scores", "node")):
        scores = frame(run, table)
        if scores is None or scores["score"].notna().sum() == 0 or frame(run, "faithfulness") is not None:
            continue
        best = scores.loc[scores["score"].abs().idxmax()]
        through = f".{best['through']}" if best.get("through") else ""
        name = f"{best['source']} → {best['target']}{through}" if key == "edge" else str(best["node"])
        parts.append(
            Markup("Of {} {}s, {} gives <b>{}</b> the largest score ({}{}).").format(
                f"{len(scores):,}", key, about.get("method", "the method"), name, signed(best["score"]), _bounds(best)
            )
        )
    circuit = frame(run, "circuit_edges")
    if circuit is not None:
        which = "The circuit shown" if about.get("what") == "evaluate" else "Its circuit"
        parts.append(Markup("{} keeps {} edges.").format(which, f"{len(circuit):,}"))
    return parts


def _evaluated(run: RunLike) -> list[Markup]:
    curve = frame(run, "faithfulness")
    if curve is None:
        return []
    parts = []
    random = frame(run, "random_circuits")
    if "ranking" in curve:
        curve = curve[curve["ranking"] != "signed"]
    for method, rows in curve.groupby("method", sort=False):
        if len(rows) == 1:
            parts.append(_alone(str(method), rows.iloc[0]))
            continue
        enough = rows[(rows["value"] >= FAITHFUL) & (rows["fraction"] < 1)].sort_values("fraction")
        if enough.empty:
            below = rows[rows["fraction"] < 1].dropna(subset=["value"])
            if len(below):
                parts.append(escape(best_below(str(method), below.loc[below["value"].idxmax()].to_dict())))
            continue
        first = enough.iloc[0]
        parts.append(
            Markup("The circuit of {} is {} faithful{} with {} of the edges.").format(
                method, number(first["value"]), _bounds(first), _share(first["fraction"])
            )
        )
        parts += _beside(first, random)
    return [*parts, *map(escape, filter(None, [few_pairs(run.manifest["circuits"].get("n"))]))]


def _alone(method: str, row: Any) -> Markup:
    """A circuit that a method chose itself."""
    return Markup("{} keeps {} of the edges and is {} faithful{}.").format(
        method[:1].upper() + method[1:], _share(row["fraction"]), number(row["value"], beside=WHOLE), _bounds(row)
    )


def _beside(row: Any, random: pd.DataFrame | None) -> list[Markup]:
    """A circuit beside random ones of its size."""
    if random is None:
        return []
    same = random[(random["fraction"] - row["fraction"]).abs() < 1e-9]
    for name in ("method", "ranking"):
        if name in same and name in row.index:
            same = same[same[name] == row[name]]
    if same.empty:
        return []
    found = same.iloc[0]
    text = Markup("Random circuits of that size reach {} at most{}.")
    better = "" if found["high"] < row["value"] else ", so that it is no better than chance"
    return [text.format(number(found["high"], beside=WHOLE), better)]


def _share(fraction: float) -> str:
    return f"{100 * float(fraction):.2g} %"
