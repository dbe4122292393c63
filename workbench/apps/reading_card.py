"""The part of a head's card that reads its weights: stored directions, or a reading on the model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from workbench.apps.address import Query, to_query
from workbench.apps.context import Context
from workbench.apps.readings import JOB, asked_of, at_hand, kept_reading
from workbench.apps.shell import refusal
from workbench.errors import RequestError, WorkbenchError
from workbench.figures.text import number, probability
from workbench.models import Head
from workbench.runs import Run
from workbench.runs.readings import TABLE, stored_directions

_POLL = 700
_OPEN = ("waiting", "running")
_ABOUT = (
    "From the weights alone, norms folded in; biases and the division by a token's length are left out, so that "
    "orders of tokens count and sizes do not. The embedding is the raw one, while heads of later layers read what "
    "earlier ones wrote. QK is taken without rotation, its position-free part. Directions come in pairs of signs: "
    "what is read at one end is written at the same end."
)
_CIRCUITS = {
    "ov": ("OV: what it writes where it reads a token", "reads", "writes"),
    "qk": ("QK: which keys a query looks for", "query", "keys"),
}
_MEASURES = {
    ("ov", "eigenvalues"): "OV copying: eigenvalues' sum over the sum of their sizes (1 raises what it reads)",
    ("ov", "rank"): "OV effective rank (directions)",
    ("qk", "eigenvalues"): "QK same-token matching, position-free (1: a query prefers its own token)",
    ("qk", "rank"): "QK effective rank, position-free (directions)",
}


def section(context: Context, run: str, head: Head, query: Query) -> Any:
    """Everything about the weights; says what to run where they are not at hand."""
    opened = context.library.run(run)
    text = query.get("tokens", "")
    able = at_hand(context.live.name, opened)
    job, state = query.get("reading", ""), None
    if job:
        try:
            state = context.live.state(job)
        except WorkbenchError:
            # Cleared away since; what it found may still be kept.
            job = ""
    try:
        asked = asked_of(opened, head, text)
        outcome = _outcome(context, opened, head, asked, state, able)
    except RequestError as error:
        outcome = refusal(str(error))
    controls: list[Any] = []
    if able:
        controls = [
            dmc.Group(
                [
                    dmc.TextInput(id="head-tokens", value=text, label="Tokens to read (optional)",
                                  placeholder=" river Monday", size="xs", w=320),
                    dmc.Button("Read the weights", id="head-read", size="compact-sm", mt=22),
                ],
                gap="xs",
            ),
            dcc.Interval(id="head-read-poll", interval=_POLL,
                         disabled=state is None or state.get("status") not in _OPEN),
            dcc.Store(id="head-reading", data=job),
        ]  # fmt: skip
    return html.Section(
        [
            html.H3("What its weights read and write"),
            html.P(_ABOUT, className="caption"),
            *controls,
            html.Div(outcome, id="head-reading-outcome"),
        ],
        className="block",
        id="head-readings",
    )


def _outcome(
    context: Context, run: Run, head: Head, asked: Mapping[str, str], state: Mapping[str, Any] | None, able: bool
) -> Any:
    if state is not None:
        return _told(state)
    kept = kept_reading(context.live.folder, asked)
    if kept is not None:
        return _reading(kept)
    if run.has_table(TABLE):
        rows = stored_directions(run.table(TABLE), *head)
        more = [] if able else [_advice(run, "To read chosen tokens too, serve the runs with the model: ")]
        return html.Div([_directions(rows), *more])
    if able:
        return html.P("Nothing was read yet; it takes seconds, and is kept.", className="caption")
    return _advice(run, "The run keeps no readings, and the server has not its model. Serve the runs with it: ")


def _advice(run: Run, words: str) -> Any:
    name = str(run.manifest.get("model", {}).get("name") or "MODEL")
    commands = html.Code(f"workbench serve RUNS --model {name}"), html.Code(f"workbench atlas {name}")
    return html.P([words, commands[0], "; ", commands[1], " stores directions for all heads."], className="caption")


def _told(state: Mapping[str, Any]) -> Any:
    status = state.get("status")
    if status in _OPEN:
        total, done = int(state.get("total") or 0), int(state.get("done") or 0)
        text = f"{state.get('step')}: {done} of {total}" if total else str(state.get("step"))
        bar = dmc.Progress(value=100 * done / total if total else 3, animated=True, **{"aria-label": text})
        return html.Div([bar, dmc.Text(text, size="sm", c="dimmed")], role="status")
    if status == "done":
        return _reading(state.get("result", {}))
    reason = "This reading was cancelled." if status == "cancelled" else str(state.get("error", ""))
    return refusal(reason, "Read again with the button above.")


def _reading(found: Mapping[str, Any]) -> Any:
    notes = []
    if int(found.get("group", 1)) > 1:
        notes.append(f"{found['group']} query heads share its keys and values.")
    if found.get("left_out"):
        notes.append(f"Left out: {', '.join(map(str, found['left_out']))}.")
    if not found.get("rotary"):
        notes.append("This model does not rotate; its QK circuit is the same at all distances.")
    parts = [_summary(found.get("summary", [])), _directions(found.get("directions", []))]
    if found.get("tokens"):
        parts.insert(1, _tokens(found["tokens"], int(found.get("vocabulary", 0))))
    return html.Div([*parts, html.P(" ".join(notes), className="caption") if notes else None])


def _summary(rows: Sequence[Mapping[str, Any]]) -> Any:
    cells = [
        [
            _MEASURES.get((str(row["circuit"]), str(row["measure"])), ""),
            number(row["value"], 3),
            f"{number(row['null_low'], 3)} to {number(row['null_high'], 3)}",
            probability(row["p"]),
        ]
        for row in rows
    ]
    return _table(["Measure", "Value", "Random matrices (95 %)", "p"], cells)


def _tokens(rows: Sequence[Mapping[str, Any]], vocabulary: int) -> Any:
    parts: list[Any] = []
    for circuit, (title, _, _) in _CIRCUITS.items():
        names = ("Raises most", "Lowers most") if circuit == "ov" else ("Keys sought", "Keys avoided")
        cells = [
            [
                _words([row["token"]]),
                _words(row["raised"], row["raised_by"]),
                _words(row["lowered"], row["lowered_by"]),
                f"{row['own_place']} of {vocabulary} (p {probability(row['own_p'])})",
            ]
            for row in rows
            if row["circuit"] == circuit
        ]
        parts += [html.H4(title), _table(["Token", *names, "Its own place (random matrices)"], cells)]
    words = "Ordered by logit; hover for its distance from the vocabulary's mean in standard deviations."
    return html.Div([*parts, html.P(words, className="caption")])


def _directions(rows: Sequence[Mapping[str, Any]]) -> Any:
    parts: list[Any] = []
    for circuit, (_, first, second) in _CIRCUITS.items():
        cells = [
            [
                f"{int(row['direction']) + 1}{'+' if int(row['sign']) > 0 else '−'}",
                f"{100 * float(row['share']):.1f} %",
                _words(row["reads"]),
                _words(row["writes"]),
            ]
            for row in rows
            if row["circuit"] == circuit
        ]
        title = f"Strongest directions of {circuit.upper()}"
        parts += [html.H4(title), _table(["", "Share of its power", first.capitalize(), second.capitalize()], cells)]
    return html.Div(parts)


def _words(tokens: Sequence[Any], sizes: Sequence[Any] = ()) -> Any:
    told: list[str | None] = [f"{float(size):+.1f} sd" for size in sizes] or [None] * len(tokens)
    shown: list[Any] = []
    for token, size in zip(tokens, told, strict=False):
        shown += [html.Span(repr(str(token))[:44], className="token reading", title=size), " "]
    return html.Span(shown)


def _table(names: Sequence[str], cells: Sequence[Sequence[Any]]) -> Any:
    head = html.Thead(html.Tr([html.Th(name, scope="col") for name in names]))
    body = html.Tbody([html.Tr([html.Td(cell) for cell in row]) for row in cells])
    # Wide tables scroll, with the keyboard too.
    return html.Div(html.Table([head, body], className="readings"), className="scrolls", tabIndex=0)


def register(app: Dash, context: Context) -> None:
    """Reading on demand, and how far it is."""

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("head-reading", "data"),
        Output("head-read-poll", "disabled"),
        Output("head-reading-outcome", "children"),
        Input("head-read", "n_clicks"),
        Input("head-tokens", "n_submit"),
        State("head-tokens", "value"),
        State("head-run", "value"),
        State("head-name", "value"),
        prevent_initial_call=True,
    )
    def read(clicked: int | None, entered: int | None, text: str | None, run: str | None, name: str | None) -> Any:
        if not (clicked or entered) or not run or not name:
            return (no_update,) * 5
        opened = context.library.run(run)
        if not at_hand(context.live.name, opened):
            raise RequestError(f"The server has not the model of {run}; start it with that one.")
        asked = asked_of(opened, Head.parse(name), text or "")
        query = to_query({"run": run, "head": name, "tokens": text})
        kept = kept_reading(context.live.folder, asked)
        if kept is not None:
            return query, "/head" + query, "", True, _reading(kept)
        job = context.live.submit(asked, JOB)
        query = to_query({"run": run, "head": name, "tokens": text, "reading": job})
        return query, "/head" + query, job, False, _told(context.live.state(job))

    @app.callback(
        Output("head-reading-outcome", "children", allow_duplicate=True),
        Output("head-read-poll", "disabled", allow_duplicate=True),
        Input("head-read-poll", "n_intervals"),
        State("head-reading", "data"),
        prevent_initial_call=True,
    )
    def poll(ticks: int | None, job: str | None) -> Any:
        if not ticks or not job:
            return no_update, no_update
        state = context.live.state(job)
        return _told(state), state.get("status") not in _OPEN
