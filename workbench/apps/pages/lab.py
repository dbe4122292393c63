"""The ablation lab: take heads away from the model at hand and see what changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update

from workbench.apps import export
from workbench.apps.address import Query, link, read_choice, read_heads, read_number, to_query
from workbench.apps.context import Context, Page
from workbench.apps.heads import scored_runs, scores_of
from workbench.apps.shell import refusal
from workbench.apps.trial_view import OPEN, label_of, outcome
from workbench.apps.trials import HOWS, MOST_DRAWS, MOST_HEADS, MOST_NEW, PROBES, Trial, read_trial
from workbench.errors import RequestError, WorkbenchError

_POLL = 700
_FIELDS = ("prompt", "how", "strength", "new_tokens", "probe", "draws", "seed")
# A longer prompt is kept with the trial alone: addresses have an end.
_MOST_IN_ADDRESS = 1500
_MARKS = [{"value": share, "label": f"{share:g}"} for share in (0, 0.5, 1)]


def _layout(context: Context, query: Query) -> Any:
    live = context.live
    if live.name is None:
        return refusal(
            "The lab works with a model, and this dashboard was started without one.",
            "workbench serve RUNS --model smollm2-135m",
        )
    name, state, told = query.get("trial", ""), dict[str, Any](), None
    if name:
        try:
            state = live.state(name)
        except WorkbenchError as error:
            # What the address says of the trial is still there to be run again.
            told, name = refusal(str(error)), ""
    asked = {**query, **state.get("asked", {})}
    heads = asked["heads"] if isinstance(asked.get("heads"), list) else read_heads(query)
    return html.Div(
        [
            dmc.Group([dmc.Title("Ablation lab", order=2), dmc.Text(live.name, size="sm", c="dimmed")], mb="sm"),
            _form(context, query.beside({key: str(value) for key, value in asked.items()}), heads),
            dcc.Interval(id="lab-poll", interval=_POLL, disabled=not name or state.get("status") not in OPEN),
            dcc.Store(id="lab-trial", data=name),
            html.Div(
                id="lab-outcome",
                children=outcome(name, state, live.name, query.dark) if name else told or _hint(),
            ),
            html.Section(
                [html.H3("Trials in this browser"), html.Div(id="lab-history-list", children=_history([]))],
                className="block",
            ),
            dcc.Store(id="lab-history", storage_type="local", data=[]),
        ]
    )


def _hint() -> Any:
    words = (
        "Choose heads and a form, write a prompt or choose a probe, and run. Probes are repeated with matched random "
        "heads, so that an effect can be told from that of removing any heads. At strength 0 the model is as it "
        "is, at 1 the heads are wholly replaced."
    )
    return html.P(words, className="caption")


def _form(context: Context, asked: Mapping[str, str], heads: Sequence[str]) -> Any:
    def field(name: str, label: str, low: int, high: int, default: int, width: int) -> Any:
        value = int(read_number(asked, name, low, high, default))
        return dmc.NumberInput(id=f"lab-{name}", label=label, value=value, min=low, max=high, w=width, size="xs")

    how, probe = read_choice(asked, "how", HOWS, "mean"), read_choice(asked, "probe", PROBES)
    strength = dmc.Slider(
        id="lab-strength", value=read_number(asked, "strength", 0, 1, 1), min=0, max=1, step=0.05, precision=2, w=170,
        size="sm", marks=_MARKS, thumbLabel="Strength",
    )  # fmt: skip
    return html.Div(
        [
            dmc.Textarea(id="lab-prompt", label="Prompt", value=asked.get("prompt", ""), autosize=True, minRows=2,
                         maxRows=10),
            dmc.Group(
                [
                    dmc.TagsInput(id="lab-heads", label="Heads", value=list(heads), placeholder="L18H6", w=360,
                                  size="xs", clearable=True, splitChars=[",", " "]),
                    dmc.Button("My set", id="lab-take", size="compact-sm", variant="default", mt=22),
                    dmc.Select(id="lab-how", label="Form", data=list(HOWS), value=how, w=130, size="xs",
                               allowDeselect=False),
                    html.Div([dmc.Text("Strength", size="xs", fw=500, mb=6), strength], className="strength"),
                    field("new_tokens", "New tokens", 1, MOST_NEW, 40, 100),
                    dmc.Select(id="lab-probe", label="Probe", data=list(PROBES), value=probe or None, w=150, size="xs",
                               clearable=True),
                    field("draws", "Random draws", 10, MOST_DRAWS, 10, 110),
                    field("seed", "Seed", 0, 1_000_000, 0, 90),
                    dmc.Button("Run", id="lab-run", size="compact-sm", mt=22),
                    dmc.Button("Cancel", id="lab-cancel", size="compact-sm", variant="default", mt=22),
                ],
                gap="xs",
                align="flex-start",
                mt="xs",
            ),
            _by_detector(context),
        ],
        className="panel block",
    )  # fmt: skip


def _by_detector(context: Context) -> Any:
    """Heads that a run's detector ranks first."""
    runs = scored_runs(context) if context.library.folder.is_dir() else []
    if not runs:
        return html.P("Runs with head scores would offer their detectors' heads here.", className="caption")
    fields = dmc.Group(
        [
            dmc.Select(id="lab-run-of", label="Run", data=runs, value=runs[0], w=220, size="xs", searchable=True,
                       allowDeselect=False),
            dmc.Select(id="lab-detector", label="Detector", data=[], w=240, size="xs", searchable=True),
            dmc.NumberInput(id="lab-top", label="How many", value=8, min=1, max=MOST_HEADS, w=100, size="xs"),
            dmc.Button("Take these heads", id="lab-take-top", size="compact-sm", variant="default", mt=22),
        ],
        gap="xs",
        align="flex-start",
    )  # fmt: skip
    return html.Details([html.Summary("Heads by detector"), fields], className="more")


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
        Input({"lab": ALL}, "n_clicks"),
        State("lab-trial", "data"),
        State("lab-history", "data"),
        State("scheme", "data"),
        *form,
        prevent_initial_call=True,
    )
    def run(
        wanted: int | None, again: list[int | None], now: str | None, history: list[Any] | None, scheme: str | None,
        *given: Any,
    ) -> Any:  # fmt: skip
        if ctx.triggered_id == "lab-run" and wanted:
            heads, *values = given
            trial = read_trial({"heads": heads or [], **dict(zip(_FIELDS, values, strict=True))})
        elif ctx.triggered_id != "lab-run" and any(again) and now:
            # As it was asked, whatever the form says by now.
            trial = read_trial(live.state(now).get("asked", {}))
        else:
            return (no_update,) * 6
        name, query, kept = _submitted(context, trial, history)
        shown = outcome(name, live.state(name), str(live.name), scheme == "dark")
        return query, "/lab" + query, name, False, shown, kept

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
        return outcome(name, state, str(live.name), scheme == "dark"), state.get("status") not in OPEN

    _register_rest(app, context)


def _submitted(context: Context, trial: Trial, history: list[Any] | None) -> tuple[str, str, list[Any]]:
    """Queue a trial: its identifier, its address, the history with it."""
    most = context.settings.most_prompt_characters
    if len(trial.prompt) > most:
        raise RequestError(f"The prompt has {len(trial.prompt)} characters; {most} are allowed. Shorten it.")
    name = context.live.submit(trial.as_dict(), "trial")
    fields = {key: value for key, value in trial.as_dict().items() if len(str(value)) <= _MOST_IN_ADDRESS}
    query = to_query({**fields, "heads": ",".join(trial.heads[:128]), "trial": name})
    return name, query, [{"trial": name, "label": label_of(trial), "query": query}, *(history or [])][:50]


def _register_rest(app: Dash, context: Context) -> None:
    """Cancelling, the chosen set, heads by detector, the history."""

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

    @app.callback(Output("lab-detector", "data"), Output("lab-detector", "value"), Input("lab-run-of", "value"))
    def detectors(run: str | None) -> Any:
        if not run:
            return [], None
        scores = scores_of(context, run)
        return [{"value": name, "label": scores.titles[name]} for name in scores.names], next(iter(scores.names), None)

    @app.callback(
        Output("lab-heads", "value", allow_duplicate=True),
        Input("lab-take-top", "n_clicks"),
        State("lab-run-of", "value"),
        State("lab-detector", "value"),
        State("lab-top", "value"),
        prevent_initial_call=True,
    )
    def take_top(wanted: int | None, run: str | None, detector: str | None, count: Any) -> Any:
        if not wanted or not run or not detector:
            return no_update
        return top_heads(context, run, detector, int(read_number({"k": str(count)}, "k", 1, MOST_HEADS, 8)))

    @app.callback(Output("lab-history-list", "children"), Input("lab-history", "data"))
    def show(history: list[Any] | None) -> Any:
        return _history(history or [])


def top_heads(context: Context, run: str, detector: str, count: int) -> list[str]:
    """The heads that a run's detector ranks first."""
    long = scores_of(context, run).long
    rows = long[(long["detector"] == detector) & long["value"].notna()].sort_values("rank", kind="stable")
    if rows.empty:
        raise RequestError(f"The run {run[:60]} has no scores of {detector[:60]!r}; choose another detector.")
    return [f"L{layer}H{head}" for layer, head in zip(rows["layer"][:count], rows["head"][:count], strict=True)]


def _history(history: Sequence[Any]) -> Any:
    rows = []
    for one in history:
        if not isinstance(one, dict):
            continue
        name = str(one.get("trial", ""))
        # Those of an older browser store have no query.
        query = one.get("query")
        address = f"/lab{query}" if isinstance(query, str) and query.startswith("?") else link("/lab", trial=name)
        study = html.A("study.toml", href=export.study_of(name), className="chip")
        rows.append(html.Li([dcc.Link(str(one.get("label", ""))[:120], href=address), " ", study]))
    return html.Ul(rows) if rows else html.P("None yet.", className="caption")


def _shown(context: Context, query: Query) -> Mapping[str, str]:
    del context
    return {"trial": query["trial"]} if query.get("trial") else {}


PAGE = Page("/lab", "Ablation lab", "Take heads away and see what changes", _layout, _register, shown=_shown)
