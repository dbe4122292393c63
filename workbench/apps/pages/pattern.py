"""Heads' patterns, of runs and of prompts typed here: token by token where these are short, else as a zoomable map."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from workbench.apps.address import Query, link, read_heads, read_query, to_query
from workbench.apps.context import Context, Page
from workbench.apps.library import shortened
from workbench.apps.shell import refusal
from workbench.apps.tokens import prompts, short
from workbench.apps.zoom.picture import VIEW
from workbench.runs.patterns import stored_patterns

_MAP_HELP = (
    "Drag to move, wheel or + and - to zoom, arrows to move, Home for the whole pattern, N for the next high entry. "
    "Rows are queries (destinations), columns are keys (sources)."
)
_TOKEN_HELP = (
    "Point at a token to see what it looks at and what looks at it. Click or Enter locks it, again or Escape lets it "
    "go; with one locked, pointing at another tells the exact weight between the two. Arrows move between tokens, and "
    "between the small maps. In maps, rows are queries (destinations) and columns are keys (sources)."
)
_POLL = 500
_OPEN = ("waiting", "running")
# A longer prompt is not handed on in an address.
_MOST_LINKED = 2000


def _layout(context: Context, query: Query) -> Any:
    name = query.get("run", "")
    if query.get("job"):
        return _typed(context, query["job"])
    if not name:
        return html.Div([_heading("Patterns"), *_live(context, ""), html.Div(_choose(context), id="pattern-stored")])
    known = stored_patterns(context.library.run(name))
    examples = not query.get("pattern") and short.has_examples(context.library, name)
    if examples and (query.get("example") or not known):
        return _example(context, name, query.get("example", ""))
    if known:
        return _stored(context, name, _asked(query, known), known, query.get("view", "")) or _lacking(query, known)
    return refusal(
        f"The run {name} stores no pattern.", "workbench trace MODEL --file TEXT --patterns L18H6  # stores one"
    )


def _stored(context: Context, run: str, pattern: str, known: Mapping[str, Mapping[str, Any]], view: str) -> Any:
    """A stored pattern: token by token where it can be read so, unless its address asks for the map; none where the
    address asks for a head that is not stored."""
    if not pattern:
        return None
    # Refuses names that the run does not have.
    tokens = context.library.pattern(run, pattern).tokens
    about, both = known[pattern], tokens <= short.MOST_TOKENS
    of = [str(about[key])[:80] for key in ("model", "prompt") if about.get(key)]
    if view == "tokens" or (both and view != "map"):
        other = dcc.Link("Zoomable map", href=link("/pattern", run=run, pattern=pattern, view="map"), className="chip")
        words = ", ".join([*of, f"{tokens:,} tokens", f"run {run}"])
        return html.Div([_heading("Token by token", words, other), _tokens(run=run, pattern=pattern)])
    links = [
        dcc.Link(f"L{one['layer']}H{one['head']}", href=link("/pattern", run=run, pattern=key, view=view),
                 className="chip here" if key == pattern else "chip")
        for key, one in known.items()
    ]  # fmt: skip
    if both:
        links.append(dcc.Link("Token by token", href=link("/pattern", run=run, pattern=pattern), className="chip"))
    heading = _heading(f"Pattern of L{about['layer']}H{about['head']}", ", ".join([*of, f"run {run}"]), *links)
    return html.Div([heading, _map(run, pattern)])


def _asked(query: Query, known: Mapping[str, Mapping[str, Any]]) -> str:
    """Which of a run's patterns an address asks for, by its name or its head; empty for a head that is not stored."""
    head, pattern = query.get("head", ""), query.get("pattern", "")
    if not head:
        return pattern or next(iter(known), "")
    stored = next((key for key, one in known.items() if f"L{one['layer']}H{one['head']}" == head), "")
    return stored if pattern in ("", stored) else ""


def _lacking(query: Query, known: Mapping[str, Mapping[str, Any]]) -> Any:
    """What stands in the place of a head that is not stored: links to those that are."""
    run, head = query["run"], shortened(query["head"])
    if query.get("pattern") in known:
        words = f"The address asks for the head {head} and for another one's pattern ({query['pattern']})."
    else:
        words = f"The run {run} stores no pattern of the head {head}."
    links = [
        dcc.Link(f"L{one['layer']}H{one['head']}", href=link("/pattern", run=run, pattern=key), className="chip")
        for key, one in known.items()
    ]
    advice = f"workbench trace MODEL --file TEXT --patterns {head}" if read_heads(query, "head") else ""
    stored = html.Div([html.Span("Stored with it: "), *links], className="chips")
    return html.Div([_heading("Patterns"), refusal(words, advice), stored])


def _example(context: Context, run: str, name: str) -> Any:
    """The patterns that a run keeps beside its scores, of one prompt."""
    known = short.examples(context.library, run)
    if not known:
        return refusal(f"The run {run} keeps patterns of prompts longer than {short.MOST_TOKENS} tokens only.")
    name = name or next(iter(known))
    short.example(context.library, run, name)
    links = [
        dcc.Link(shortened(patterns[0].title), href=link("/pattern", run=run, example=key),
                 className="chip here" if key == name else "chip")
        for key, patterns in known.items()
    ]  # fmt: skip
    first = known[name][0]
    words = f"{len(first.tokens)} tokens, run {run}"
    told = html.P(shortened(first.caption, 400), className="caption")
    return html.Div([_heading("Token by token", words, *links), told, _tokens(run=run, example=name)])


def _typed(context: Context, job: str) -> Any:
    """A prompt that was written on the page."""
    state = context.live.state(job)
    prompt = str(state.get("asked", {}).get("prompt", ""))
    return html.Div([_heading("Patterns"), *_live(context, prompt, job, state), html.Div(id="pattern-stored")])


def _heading(title: str, words: str = "", *links: Any) -> Any:
    parts = [dmc.Title(title, order=2), dmc.Text(words, size="sm", c="dimmed", className="isolated")]
    return dmc.Group([*parts, html.Div(list(links), className="chips")], mb="xs")


def _map(run: str, pattern: str) -> Any:
    """An empty place that `assets/zoom.js` fills."""
    return html.Div(
        [
            html.Div(className="zoom-controls"),
            html.Div(className="zoom-stage", tabIndex="0", role="img", **{"aria-label": f"Attention map. {_MAP_HELP}"}),
            html.Div(className="zoom-told token", role="status"),
            html.P(_MAP_HELP, className="caption"),
        ],
        className="zoom",
        id="zoom",
        **{"data-run": run, "data-pattern": pattern},
    )


def _tokens(prompt: str = "", **source: str) -> Any:
    """An empty place that `assets/tokens.js` and `assets/token_card.js` fill."""
    run, lab = source.get("run", ""), link("/lab", prompt=prompt if len(prompt) <= _MOST_LINKED else "")
    head = link("/head", run=run) if run else ""
    return html.Div(
        [
            html.Div(className="tok-controls zoom-controls"),
            html.Div(className="tok-gallery"),
            html.Div(className="tok-told", role="status"),
            html.Div(className="tok-cards"),
            html.P(_TOKEN_HELP, className="caption"),
        ],
        className="tokens-view",
        **{"data-source": to_query(source), "data-head": head, "data-lab": "" if run else lab},
    )


def _live(context: Context, prompt: str, job: str = "", state: Mapping[str, Any] | None = None) -> list[Any]:
    """A prompt's form, and what became of the one that was sent."""
    live, state = context.live, state or {}
    poll = dcc.Interval(id="pattern-poll", interval=_POLL, disabled=state.get("status") not in _OPEN)
    outcome = html.Div(id="pattern-outcome", children=_outcome(job, state) if job else None)
    rest = [poll, dcc.Store(id="pattern-job", data=job), outcome]
    if live.name is None:
        hint = "To see every head on a prompt of your own, start with a model: workbench serve RUNS --model MODEL."
        return [html.P(hint, className="caption"), *rest]
    label = f"Prompt for {live.name} (up to {short.MOST_TOKENS} tokens)"
    buttons = [
        dmc.Button("Show its heads", id="pattern-show", size="compact-sm"),
        dmc.Button("Cancel", id="pattern-cancel", size="compact-sm", variant="default"),
    ]
    form = [
        dmc.Textarea(id="pattern-prompt", label=label, value=prompt, autosize=True, minRows=2, maxRows=8),
        dmc.Group(buttons, gap="xs", mt="xs"),
    ]
    return [html.Div(form, className="panel block"), *rest]


def _outcome(job: str, state: Mapping[str, Any]) -> Any:
    status = state.get("status")
    if status in _OPEN:
        done, total = int(state.get("done") or 0), int(state.get("total") or 0)
        text = f"{state.get('step')}: {done} of {total}" if total else str(state.get("step"))
        bar = dmc.Progress(value=100 * done / total if total else 3, animated=True)
        return html.Div([bar, dmc.Text(text, size="sm", c="dimmed")], role="status")
    if status == "cancelled":
        return refusal("This was cancelled.", "Show its heads again with the button above.")
    if status == "failed":
        return refusal(str(state.get("error", "")))
    result = state.get("result", {})
    if "patterns" not in result:
        return refusal("This is a trial of the lab, which keeps no patterns.", link("/lab", trial=job))
    prompt = str(state.get("asked", {}).get("prompt", ""))
    words = f"{result['model']}, {len(result['tokens'])} tokens, {sum(one['heads'] for one in result['layers'])} heads"
    return html.Div([html.P(words, className="caption isolated"), _tokens(prompt, job=job), _as_run(result, prompt)])


def _as_run(result: Mapping[str, Any], prompt: str) -> Any:
    """The command that stores such a pattern for good."""
    words = ["workbench", "trace", str(result["model"]), "--prompt", prompt, "--patterns", str(result["start"])]
    code = dmc.Code(shlex.join(words), block=True)
    return html.Details([html.Summary("As a run"), html.P("This keeps it for good:"), code], className="panel block")


def _choose(context: Context) -> Any:
    """Links to all patterns of all runs."""
    table = context.library.table()
    found = []
    for name in map(str, table.loc[table["status"] == "complete", "name"]):
        for key, about in stored_patterns(context.library.run(name)).items():
            text = f"L{about['layer']}H{about['head']} in {name}"
            found.append(html.Li(dcc.Link(text, href=link("/pattern", run=name, pattern=key))))
        if short.has_examples(context.library, name):
            found.append(html.Li(dcc.Link(f"Examples of heads in {name}", href=link("/pattern", run=name))))
    if not found:
        return refusal("No run here stores a pattern.", "workbench trace MODEL --file TEXT --patterns L18H6")
    return html.Section([html.H3("Stored with runs"), html.Ul(found)], className="block")


def _register(app: Dash, context: Context) -> None:
    """A prompt is sent, asked after, and given up. The viewers work by themselves, in the browser."""
    live = context.live

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Output("shown-query", "data", allow_duplicate=True),
        Output("pattern-job", "data"),
        Output("pattern-poll", "disabled"),
        Output("pattern-outcome", "children"),
        Output("pattern-stored", "children"),
        Input("pattern-show", "n_clicks"),
        State("pattern-prompt", "value"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def show(wanted: int | None, text: str | None, search: str | None) -> Any:
        if not wanted:
            return (no_update,) * 6
        prompt = prompts.read_prompt(text, context.settings.most_prompt_characters)
        job = live.submit({"prompt": prompt}, "patterns")
        here = read_query(search)
        # Heads that another page asked for; once a prompt is shown, the browser knows which heads are.
        heads = [] if here.get("job") else read_heads(here)
        query = to_query({"job": job, "heads": ",".join(heads)})
        return query, "/pattern" + query, job, False, _outcome(job, live.state(job)), None

    @app.callback(
        Output("pattern-outcome", "children", allow_duplicate=True),
        Output("pattern-poll", "disabled", allow_duplicate=True),
        Input("pattern-poll", "n_intervals"),
        State("pattern-job", "data"),
        prevent_initial_call=True,
    )
    def poll(ticks: int | None, job: str | None) -> Any:
        if not job or not ticks:
            return no_update, no_update
        state = live.state(job)
        return _outcome(job, state), state.get("status") not in _OPEN

    @app.callback(
        Output("pattern-cancel", "n_clicks"),
        Input("pattern-cancel", "n_clicks"),
        State("pattern-job", "data"),
        prevent_initial_call=True,
    )
    def cancel(wanted: int | None, job: str | None) -> Any:
        if wanted and job:
            live.cancel(job)
        return no_update


def _shown(context: Context, query: Query) -> dict[str, str]:
    """The view of a stored pattern that the address names."""
    known = stored_patterns(context.library.run(query["run"])) if query.get("run") else {}
    pattern = _asked(query, known)
    if pattern not in known:
        return {}
    return {"pattern": pattern, **{name: query[name] for name in VIEW if name in query}}


_HINT = "Heads' attention, token by token or at any length"
PAGE = Page("/pattern", "Pattern", _HINT, _layout, _register, shown=_shown)
