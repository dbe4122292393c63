"""One head's card: every score with its evidence, patterns, curves, contrast, causal checks, and a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
import numpy as np
import pandas as pd
from dash import Dash, Input, Output, State, dcc, html, no_update

from workbench.apps import head_note, reading_card
from workbench.apps.address import Query, link, read_heads, read_query, to_query
from workbench.apps.context import Context, Page
from workbench.apps.heads import Scores, scored_run, scored_runs, scores_of
from workbench.apps.library import counted
from workbench.apps.parts import data_grid, figure_panel
from workbench.apps.readings import at_hand
from workbench.apps.shell import refusal
from workbench.figures import domain_scatter, palette, pattern_map, position_curves
from workbench.figures.text import interval, number, probability
from workbench.models import Head
from workbench.reports.examples import Pattern, patterns
from workbench.runs.patterns import stored_patterns

_TOP_TOKENS = 12
_MOST_CURVES = 6
# Kinds of runs that ablate heads, and how many of them are looked through.
_CHECKING, _MOST_RUNS = ("verify", "demo"), 20
_COLUMNS = (
    {"field": "title", "headerName": "Detector", "flex": 2, "minWidth": 200, "tooltipField": "measures"},
    {"field": "value", "headerName": "Score", "width": 100},
    {"field": "bounds", "headerName": "95 % interval", "width": 150},
    {"field": "null", "headerName": "Null", "width": 100},
    {"field": "q", "headerName": "q", "width": 100},
    {"field": "rank", "headerName": "Rank", "width": 90},
    {"field": "threshold", "headerName": "Threshold", "width": 110},
    {"field": "unit", "headerName": "Unit", "width": 160},
)


def _layout(context: Context, query: Query) -> Any:
    runs = scored_runs(context)
    if not runs:
        return refusal("No run here has head scores.", "workbench atlas smollm2-135m")
    run = query.get("run", "") or runs[0]
    scores = scores_of(context, run)
    heads = [Head(int(a), int(b)) for a, b in scores.wide[["layer", "head"]].to_numpy()]
    asked = read_heads(query, "head", instead=f"{heads[0]} is shown")
    head = Head.parse(asked[0]) if asked else heads[0]
    if head not in heads:
        return refusal(f"The run {run} has no scores of {head}; its heads go from {heads[0]} to {heads[-1]}.")
    choose = dmc.Group(
        [
            dmc.Title(f"Head {head}", order=2),
            dmc.Select(id="head-run", data=runs, value=run, size="xs", w=220, searchable=True, allowDeselect=False,
                       **{"aria-label": "Run"}),
            dmc.Select(id="head-name", data=[str(one) for one in heads], value=str(head), size="xs", w=120,
                       searchable=True, allowDeselect=False, **{"aria-label": "Head"}),
            *[dcc.Link(text, href=href) for text, href in _elsewhere(context, run, head)],
        ],
        mb="sm",
    )  # fmt: skip
    parts = [
        choose,
        _scores(scores, head),
        *_patterns(context, run, head, query.dark),
        *_curves(context, run, head, scores, query.dark),
        *_contrast(context, run, head, query.dark),
        reading_card.section(context, run, head, query),
        _causal(context, run, head, scores),
        head_note.section(context, run, head),
    ]
    return html.Div(parts, id="head-card")


def _elsewhere(context: Context, run: str, head: Head) -> list[tuple[str, str]]:
    found = [("in the atlas", link("/atlas", run=run, heads=head))]
    stored = stored_patterns(context.library.run(run))
    own = [one for one in _kept_patterns(context, run) if (one.layer, one.index) == head]
    if own:
        found.append(("token by token", link("/pattern", run=run, example=own[0].example, heads=head)))
    elif at_hand(context.live.name, context.library.run(run)):
        found.append(("on a prompt of yours", link("/pattern", heads=head)))
    return found + [
        ("zoomable pattern", link("/pattern", run=run, pattern=name))
        for name, about in stored.items()
        if (about["layer"], about["head"]) == head
    ]


def _scores(scores: Scores, head: Head) -> Any:
    long = scores.long
    own = long[(long["layer"] == head.layer) & (long["head"] == head.head) & long["value"].notna()]
    counts = long[long["value"].notna()].groupby("detector").size()
    rows = []
    for row in own.to_dict("records"):
        info = scores.known.get(str(row["detector"]))
        rows.append(
            {
                "title": info.title,
                "measures": info.measures,
                "value": number(row["value"], 3),
                "bounds": interval(row["low"], row["high"], 3),
                "null": number(row["null"], 3),
                "q": probability(row["q"]),
                "rank": f"{int(row['rank'])} of {counts[row['detector']]}" if row["rank"] == row["rank"] else "",
                "threshold": number(info.threshold, 3) if info.has_threshold else "",
                "unit": info.unit,
                "order": (row["rank"] if row["rank"] == row["rank"] else np.inf),
            }
        )
    rows.sort(key=lambda one: one.pop("order"))
    silent = len(scores.names) - len(rows)
    words = "Best ranks first. Intervals are bootstraps over prompts; q is the false-discovery rate against the null."
    words += f" {counted(silent, 'detector')} without a value for this head." if silent else ""
    grid = data_grid("head-scores", rows, _COLUMNS, height=360, tooltipShowDelay=200)
    return html.Section([grid, html.P(words, className="caption")], className="block")


def _patterns(context: Context, run: str, head: Head, dark: bool) -> list[Any]:
    own = [one for one in _kept_patterns(context, run) if (one.layer, one.index) == head]
    if not own:
        advice = f"workbench trace {_model(context, run)} --file TEXT --patterns {head}"
        words = "No pattern of this head is in the run; examples are kept of the heads that stand out. "
        return [html.P([words, html.Code(advice), " stores one."], className="caption")]
    panels = []
    for at, one in enumerate(own):
        figure = pattern_map(one.values, one.tokens, head=head, dark=dark)
        panels.append(figure_panel(f"head-pattern-{at}", figure, title=f"Pattern of {head}, {one.title}"))
        panels.append(_tops(one))
    return [html.Section(panels, className="block")]


def _kept_patterns(context: Context, run: str) -> list[Pattern]:
    """Patterns that the run keeps beside its scores."""
    kept: list[Pattern] = context.library.computed(run, ("patterns",), lambda: patterns(context.library.run(run)))
    return kept


def _model(context: Context, run: str) -> str:
    return str(context.library.run(run).manifest.get("model", {}).get("name") or "MODEL")


def _tops(one: Pattern) -> Any:
    """Keys that are attended to most, and queries that attend most to one key, position 0 left out."""
    count = len(one.tokens)
    values = np.tril(one.values)[:, 1:]
    keys = values.sum(0) / np.arange(count - 1, 0, -1)
    peaks = values.max(1, initial=0.0)
    lists = []
    for text, order, of in (
        ("Keys by mean attention", np.argsort(-keys, kind="stable") + 1, np.concatenate([[0.0], keys])),
        ("Queries by largest attention", np.argsort(-peaks, kind="stable"), peaks),
    ):
        items = [
            html.Li([html.Span(repr(one.tokens[at])[:60], className="token"), f" at {at}: {of[at]:.3f}"])
            for at in order[:_TOP_TOKENS]
        ]
        lists.append(html.Div([html.H4(text), html.Ol(items)]))
    return html.Div(lists, className="columns")


def _curves(context: Context, run: str, head: Head, scores: Scores, dark: bool) -> list[Any]:
    names = [name for name in ("position_curves", "other_curves") if context.library.run(run).has_table(name)]
    tables = [context.library.frame(run, name) for name in names]
    parts = [table[(table["layer"] == head.layer) & (table["head"] == head.head)] for table in tables]
    own = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if own.empty:
        advice = html.Code(f"workbench atlas {_model(context, run)}")
        words = "The run keeps no statistics over position of this head, only of those that stand out; "
        return [html.P([words, advice, " keeps the first-token share and the entropy of all."], className="caption")]
    own = own.drop_duplicates(["statistic", "position"])
    own = own[own["statistic"].isin(list(dict.fromkeys(own["statistic"]))[:_MOST_CURVES])]
    figure = position_curves(own, labels=scores.titles, dark=dark)
    return [figure_panel("head-curves", figure, title=f"Statistics of {head} over position")]


def _contrast(context: Context, run: str, head: Head, dark: bool) -> list[Any]:
    if not context.library.run(run).has_table("domain_contrast"):
        advice = html.Code(f"workbench heads {_model(context, run)} --detectors active_dormant")
        return [html.P(["The run has no contrast of domains; ", advice, " measures it."], className="caption")]
    table = context.library.frame(run, "domain_contrast")
    if not {"prose", "code"} <= set(table["domain"]):
        return []
    figure = domain_scatter(table, dark=dark)
    own = table[(table["layer"] == head.layer) & (table["head"] == head.head)].set_index("domain")
    own = own[own.index.isin(["prose", "code"])]
    told = "; ".join(
        f"{row.Index} {number(row.value, 3)} ({interval(row.low, row.high, 3)})" for row in own.itertuples()
    )
    x, y = (float(own.loc[domain, "value"]) if domain in own.index else np.nan for domain in ("prose", "code"))
    figure.add_scatter(
        x=[x], y=[y], mode="markers", name=str(head), hoverinfo="skip",
        marker={"size": 16, "symbol": "circle-open", "line": {"width": 2.5}, "color": palette(dark).bad},
    )  # fmt: skip
    panel = figure_panel("head-contrast", figure, title=f"First-token mass of {head} by domain")
    return [html.Section([panel, html.P(f"{head}: {told}.", className="caption")], className="block")]


def _causal(context: Context, run: str, head: Head, scores: Scores) -> Any:
    """Verified sets that this head is in, and single ablations of it, where the run has any."""
    rows = [row for name in (run, *_checking(context, run)) for row in _checks(context, name, head)]
    if not rows:
        advice = f"workbench verify {_model(context, run)} --heads {head}"
        words = [
            "No causal check of this model's runs names this head; ",
            html.Code(advice),
            " removes it and measures.",
        ]
        return html.Section([html.H3("Causal evidence"), html.P(words, className="caption")])
    shown = [
        {
            "what": f"{scores.titles.get(str(row.get('detector')), row.get('detector'))}, "
            f"{counted(int(row.get('k', 1)), 'head')}",
            "how": row.get("how"),
            "metric": row.get("metric"),
            "effect": f"{number(row.get('effect'), 3)} ({interval(row.get('low'), row.get('high'), 3)})",
            "control": f"{number(row.get('control_effect'), 3)} "
            f"({interval(row.get('control_low'), row.get('control_high'), 3)})",
            "q": probability(row.get("q")),
            "run": row["run"],
        }
        for row in rows
    ]
    names = {"what": "Removed with it", "how": "How", "metric": "Measured", "effect": "Effect (95 % interval)",
             "control": "Matched random heads (range)", "q": "q",
             "run": "Run"}  # fmt: skip
    widths = {"what": 200, "how": 80, "metric": 140, "effect": 200, "control": 220, "q": 80, "run": 110}
    columns = [{"field": key, "headerName": text, "width": widths[key]} for key, text in names.items()]
    grid = data_grid("head-causal", shown, columns, height=90 + 30 * min(len(shown), 8))
    return html.Section([html.H3("Causal evidence"), grid], className="block")


def _checks(context: Context, run: str, head: Head) -> list[dict[str, Any]]:
    """Ablations of a run that this head was part of."""
    rows: list[dict[str, Any]] = []
    for name in ("verification", "verification_single"):
        if context.library.run(run).has_table(name):
            table = context.library.frame(run, name)
            has = table["heads"].astype(str).str.contains(rf"(?:^|[^0-9A-Za-z]){head}(?:[^0-9]|$)", regex=True)
            rows += [{**row, "run": run} for row in table[has].to_dict("records")]
    return rows


def _checking(context: Context, run: str) -> list[str]:
    """Other runs with the same weights that check heads by ablation, the newest first."""
    weights = context.library.run(run).manifest.get("model", {}).get("weights_sha256")
    table = context.library.table()
    able = table[(table["status"] == "complete") & table["kind"].isin(_CHECKING)]
    names = [str(name) for name in able["name"].head(_MOST_RUNS) if name != run]
    same = [name for name in names if context.library.run(name).manifest.get("model", {}).get("weights_sha256")]
    return [name for name in same if context.library.run(name).manifest["model"]["weights_sha256"] == weights]


def _register(app: Dash, context: Context) -> None:
    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("head-run", "value"),
        Input("head-name", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def go(run: str | None, head: str | None, now: str | None) -> Any:
        shown = read_query(now)
        # Without a new address the page is as it was; with one it is built anew.
        if not run or not head or (run, head) == (shown.get("run"), shown.get("head")):
            return no_update
        return to_query({"run": run, "head": head, "tokens": shown.get("tokens")})

    reading_card.register(app, context)
    head_note.register(app, context)


def _shown(context: Context, query: Query) -> Mapping[str, str]:
    """The head that an export opens at, and the tokens of its reading."""
    del context
    asked = read_heads(query, "head")[:1]
    return {"head": asked[0], "tokens": query.get("tokens", "")} if asked else {}


PAGE = Page("/head", "Head", "One head and all its evidence", _layout, _register, scored_run, _shown)
