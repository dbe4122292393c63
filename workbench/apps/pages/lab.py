"""The ablation lab: take heads away from the model at hand and see what changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import dash_mantine_components as dmc
import numpy as np
import plotly.graph_objects as go
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update

from workbench.apps.address import Query, link, read_heads, to_query
from workbench.apps.context import Context, Page
from workbench.apps.parts import data_grid, figure_panel
from workbench.apps.shell import refusal
from workbench.apps.trials import HOWS, MOST_DRAWS, MOST_NEW, PROBES, read_trial
from workbench.errors import RequestError, WorkbenchError
from workbench.figures import palette, template
from workbench.figures.text import interval, number, probability, safe, with_caption

_POLL = 700
_FIELDS = ("prompt", "how", "new_tokens", "probe", "draws")
_PROBE_COLUMNS = (
    {"field": "metric", "headerName": "Measured", "flex": 1, "minWidth": 150},
    {"field": "baseline", "headerName": "Intact", "width": 110},
    {"field": "ablated", "headerName": "Ablated", "width": 110},
    {"field": "effect", "headerName": "Effect (95 % interval)", "width": 210},
    {"field": "control", "headerName": "Random heads (range of draws)", "width": 230},
    {"field": "q", "headerName": "q", "width": 90},
)


def _layout(context: Context, query: Query) -> Any:
    live = context.live
    if live.name is None:
        return refusal(
            "The lab works with a model, and this dashboard was started without one.",
            "workbench serve RUNS --model smollm2-135m",
        )
    name = query.get("trial", "")
    state: dict[str, Any] = {}
    if name:
        state = live.state(name)
    asked = {**query, **state.get("asked", {})}
    heads = asked["heads"] if isinstance(asked.get("heads"), list) else read_heads(query)
    return html.Div(
        [
            dmc.Group([dmc.Title("Ablation lab", order=2), dmc.Text(live.name, size="sm", c="dimmed")], mb="sm"),
            _form(asked, heads),
            dcc.Interval(id="lab-poll", interval=_POLL, disabled=not name or state.get("status") not in _OPEN),
            dcc.Store(id="lab-trial", data=name),
            html.Div(id="lab-outcome", children=_outcome(state, live.name, query.dark) if name else _hint()),
            html.Section(
                [html.H3("Trials in this browser"), html.Div(id="lab-history-list", children=_history([]))],
                className="block",
            ),
            dcc.Store(id="lab-history", storage_type="local", data=[]),
        ]
    )


_OPEN = ("waiting", "running")


def _hint() -> Any:
    words = (
        "Choose heads and a form, write a prompt or choose a probe, and run. Probes are repeated with matched random "
    )
    return html.P(words + "heads, so that an effect can be told from that of removing any heads.", className="caption")


def _form(asked: Mapping[str, Any], heads: Sequence[str]) -> Any:
    options = [{"value": one, "label": one} for one in PROBES]
    return html.Div(
        [
            dmc.Textarea(id="lab-prompt", label="Prompt", value=str(asked.get("prompt", "")), autosize=True, minRows=2,
                         maxRows=10),
            dmc.Group(
                [
                    dmc.TagsInput(id="lab-heads", label="Heads", value=list(heads), placeholder="L18H6", w=360,
                                  size="xs", clearable=True, splitChars=[",", " "]),
                    dmc.Button("My set", id="lab-take", size="compact-sm", variant="default", mt=22),
                    dmc.Select(id="lab-how", label="Form", data=list(HOWS), value=str(asked.get("how", "mean")), w=130,
                               size="xs", allowDeselect=False),
                    dmc.NumberInput(id="lab-new_tokens", label="New tokens", value=int(asked.get("new_tokens", 40)),
                                    min=1, max=MOST_NEW, w=100, size="xs"),
                    dmc.Select(id="lab-probe", label="Probe", data=options, value=str(asked.get("probe", "")) or None,
                               w=150, size="xs", clearable=True),
                    dmc.NumberInput(id="lab-draws", label="Random draws", value=int(asked.get("draws", 10)), min=10,
                                    max=MOST_DRAWS, w=110, size="xs"),
                    dmc.Button("Run", id="lab-run", size="compact-sm", mt=22),
                    dmc.Button("Cancel", id="lab-cancel", size="compact-sm", variant="default", mt=22),
                ],
                gap="xs",
                align="flex-start",
                mt="xs",
            ),
        ],
        className="panel block",
    )  # fmt: skip


def _outcome(state: Mapping[str, Any], model: str, dark: bool) -> Any:
    status = state.get("status")
    if status in _OPEN:
        total = int(state.get("total") or 0)
        done = int(state.get("done") or 0)
        text = f"{state.get('step')}: {done} of {total}" if total else str(state.get("step"))
        return html.Div(
            [
                dmc.Progress(value=100 * done / total if total else 3, animated=True),
                dmc.Text(text, size="sm", c="dimmed"),
            ],
            role="status",
        )
    if status == "cancelled":
        return refusal("This trial was cancelled.", "Run it again with the button above.")
    if status == "failed":
        return refusal(str(state.get("error", "")))
    result = state.get("result", {})
    parts = []
    if "prompt" in result:
        parts += [_texts(result["prompt"]), _next(result["prompt"]), _losses(result["prompt"], dark)]
    if "probe" in result:
        parts.append(_probe(result["probe"]))
    parts.append(_as_study(state.get("asked", {}), model))
    return html.Div(parts)


def _texts(found: Mapping[str, Any]) -> Any:
    """The two continuations; what differs is marked."""
    before, after = (list(map(str, found[name]["new"])) for name in ("before", "after"))
    pieces: dict[str, list[Any]] = {"before": [], "after": []}
    for what, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = "".join(before[a:b]), "".join(after[c:d])
        pieces["before"].append(old if what == "equal" else html.Del(old))
        pieces["after"].append(new if what == "equal" else html.Ins(new))
    blocks = [
        html.Div([html.H4(title), html.Div(pieces[name], className="token written")])
        for name, title in (("before", "Intact"), ("after", "Ablated"))
    ]
    return html.Section([html.H3("Continuation (greedy)"), html.Div(blocks, className="pair")], className="panel block")


def _next(found: Mapping[str, Any]) -> Any:
    lines = []
    for name, title in (("before", "Intact"), ("after", "Ablated")):
        items = [
            html.Li([html.Span(repr(one["token"])[:60], className="token"), f" {one['p']:.3f}"])
            for one in found[name]["next"]
        ]
        lines.append(html.Div([html.H4(title), html.Ol(items)]))
    return html.Section([html.H3("Next token"), html.Div(lines, className="columns")], className="panel block")


def _losses(found: Mapping[str, Any], dark: bool) -> Any:
    tokens = [safe(repr(token)) for token in found["tokens"]][1:]
    colours = palette(dark)
    figure = go.Figure(layout={"template": template(dark)})
    means = {}
    for name, title, colour in (("before", "intact", colours.control), ("after", "ablated", colours.effect)):
        values = np.array([np.nan if one is None else one for one in found[name]["loss"]], dtype=float)
        means[title] = float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
        figure.add_scatter(
            x=list(range(1, len(values) + 1)), y=values, mode="lines+markers", name=title, text=tokens,
            marker={"size": 4}, line={"color": colour, "width": 1.5},
            hovertemplate="%{text} at %{x}: %{y:.3f} nats<extra>" + title + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        height=280, xaxis={"title": {"text": "position"}}, yaxis={"title": {"text": "loss (nats)"}}, hovermode="x"
    )
    told = ", ".join(f"{title} {value:.3f}" for title, value in means.items())
    figure = with_caption(figure, f"Loss of each token of the prompt, given those before it. Means: {told} nats.")
    return figure_panel("lab-losses", figure, title="Loss by token, intact and ablated")


def _probe(rows: Sequence[Mapping[str, Any]]) -> Any:
    shown = [
        {
            "metric": row.get("metric"),
            "baseline": number(row.get("baseline"), 3),
            "ablated": number(row.get("ablated"), 3),
            "effect": f"{number(row.get('effect'), 3)} ({interval(row.get('low'), row.get('high'), 3)})",
            "control": f"{number(row.get('control_effect'), 3)} "
            f"({interval(row.get('control_low'), row.get('control_high'), 3)})",
            "q": probability(row.get("q")),
        }
        for row in rows
    ]
    caption = str(rows[0].get("caption", "")) if rows else ""
    grid = data_grid("lab-probe-table", shown, _PROBE_COLUMNS, height=60 + 32 * max(1, len(shown)))
    return html.Section(
        [html.H3("Probe, against matched random heads"), grid, html.P(caption, className="caption")], className="block"
    )


def _as_study(asked: Mapping[str, Any], model: str) -> Any:
    try:
        text, command = read_trial(asked).study(model)
    except WorkbenchError:
        return None
    inside = [
        html.P(["Save as ", html.Code("probes/from-the-lab/study.toml"), " and run ", html.Code(command)]),
        dmc.Code(text, block=True, id="lab-study"),
    ]
    return html.Details([html.Summary("As a study"), *inside], className="panel block")


def _register(app: Dash, context: Context) -> None:
    live = context.live
    form = [State("lab-heads", "value"), *[State(f"lab-{name}", "value") for name in _FIELDS]]

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("lab-trial", "data"),
        Output("lab-poll", "disabled"),
        Output("lab-outcome", "children"),
        Output("lab-history", "data"),
        Input("lab-run", "n_clicks"),
        State("lab-history", "data"),
        State("scheme", "data"),
        *form,
        prevent_initial_call=True,
    )
    def run(wanted: int | None, history: list[Any] | None, scheme: str | None, *given: Any) -> Any:
        if not wanted:
            return (no_update,) * 6
        heads, *values = given
        trial = read_trial({"heads": heads or [], **dict(zip(_FIELDS, values, strict=True))})
        if len(trial.prompt) > context.settings.most_prompt_characters:
            most = context.settings.most_prompt_characters
            raise RequestError(f"The prompt has {len(trial.prompt)} characters; {most} are allowed. Shorten it.")
        name = live.submit(trial.as_dict(), "trial")
        label = f"{len(trial.heads)} heads, {trial.how}: {(trial.prompt or trial.probe)[:60]}"
        query = to_query({"trial": name})
        kept = [{"trial": name, "label": label}, *(history or [])][:50]
        return query, "/lab" + query, name, False, _outcome(live.state(name), str(live.name), scheme == "dark"), kept

    @app.callback(
        Output("lab-outcome", "children", allow_duplicate=True),
        Output("lab-poll", "disabled", allow_duplicate=True),
        Input("lab-poll", "n_intervals"),
        State("lab-trial", "data"),
        State("scheme", "data"),
        prevent_initial_call=True,
    )
    def poll(ticks: int | None, name: str | None, scheme: str | None) -> Any:
        if not name or not ticks:
            return no_update, no_update
        state = live.state(name)
        return _outcome(state, str(live.name), scheme == "dark"), state.get("status") not in _OPEN

    _register_rest(app, context)


def _register_rest(app: Dash, context: Context) -> None:
    """Cancelling, the chosen set, the history."""

    @app.callback(
        Output("lab-cancel", "n_clicks"), Input("lab-cancel", "n_clicks"), State("lab-trial", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def cancel(wanted: int | None, name: str | None) -> Any:
        if wanted and name and ctx.triggered_id == "lab-cancel":
            context.live.cancel(name)
        return no_update

    @app.callback(
        Output("lab-heads", "value"),
        Input("lab-take", "n_clicks"),
        State("head-set", "data"),
        prevent_initial_call=True,
    )
    def take(wanted: int | None, chosen: list[str] | None) -> Any:
        return list(chosen or []) if wanted else no_update

    @app.callback(Output("lab-history-list", "children"), Input("lab-history", "data"))
    def show(history: list[Any] | None) -> Any:
        return _history(history or [])


def _history(history: Sequence[Any]) -> Any:
    rows = [
        html.Li(dcc.Link(str(one.get("label", ""))[:100], href=link("/lab", trial=one.get("trial"))))
        for one in history
        if isinstance(one, dict)
    ]
    return html.Ul(rows) if rows else html.P("None yet.", className="caption")


PAGE = Page("/lab", "Ablation lab", "Take heads away and see what changes", _layout, _register)
