"""What the lab shows of a trial: how far it is, or before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
import pandas as pd
from dash import html

from workbench.apps import export
from workbench.apps.library import counted, shortened
from workbench.apps.parts import data_grid, figure_panel
from workbench.apps.shell import refusal
from workbench.apps.trials import Trial, read_trial
from workbench.errors import WorkbenchError
from workbench.figures import ablation_chart, verdict
from workbench.figures.text import interval, number, probability
from workbench.reports.trial import continuations, guesses, prompt_losses

OPEN = ("waiting", "running")
# Heads of a trial without an outcome that are named.
_MOST_NAMED = 12
_PROBE_COLUMNS = (
    {"field": "metric", "headerName": "Measured", "flex": 1, "minWidth": 150},
    {"field": "baseline", "headerName": "Intact", "width": 100},
    {"field": "ablated", "headerName": "Ablated", "width": 100},
    {"field": "effect", "headerName": "Effect (95 % interval)", "width": 190},
    {"field": "control", "headerName": "Random heads (range of draws)", "width": 220},
    {"field": "q", "headerName": "q", "width": 80},
    {"field": "outcome", "headerName": "Outcome", "width": 150},
)


def outcome(name: str, state: Mapping[str, Any], model: str, dark: bool) -> Any:
    """The state of a trial as the page has it."""
    status = state.get("status")
    if status in OPEN:
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
        return _ended("Cancelled", "This trial was given up before it was done.", state)
    if status == "failed":
        return _ended("Not done", str(state.get("error", "")), state)
    result = state.get("result", {})
    parts = []
    if "prompt" in result:
        found = result["prompt"]
        losses = figure_panel("lab-losses", prompt_losses(found, dark), title="Loss by token, intact and ablated")
        parts += [_texts(found), _next(found), losses]
    if "probe" in result:
        parts.append(_probe(result["probe"], result.get("draws", []), dark))
    parts.append(_as_study(name, state.get("asked", {}), model))
    return html.Div(parts)


def label_of(trial: Trial) -> str:
    """What was asked, in a line."""
    heads = counted(len(trial.heads), "head")
    return f"{heads}, {trial.form}: {shortened(trial.prompt or f'probe {trial.probe}')}"


def _ended(title: str, words: str, state: Mapping[str, Any]) -> Any:
    """A trial without an outcome: what was asked, and a way to ask for it again."""
    parts = [refusal(words, title=title)]
    try:
        trial = read_trial(state.get("asked", {}))
    except WorkbenchError:
        return html.Div(parts)
    heads = ", ".join(trial.heads[:_MOST_NAMED]) + (" ..." if len(trial.heads) > _MOST_NAMED else "")
    parts.append(dmc.Text(["Asked for: ", label_of(trial), f" ({heads})"], size="sm", my="xs"))
    parts.append(dmc.Button("Run it again", id={"lab": "again"}, size="compact-sm"))
    return html.Div(parts, id="lab-ended")


def _texts(found: Mapping[str, Any]) -> Any:
    """The two continuations; what differs is marked."""
    blocks = []
    for (name, pieces), title, mark in zip(
        continuations(found).items(), ("Intact", "Ablated"), (html.Del, html.Ins), strict=True
    ):
        inside = [mark(text) if differs else text for text, differs in pieces]
        blocks.append(html.Div([html.H4(title), html.Div(inside, className="token written", id=f"lab-{name}")]))
    return html.Section([html.H3("Continuation (greedy)"), html.Div(blocks, className="pair")], className="panel block")


def _next(found: Mapping[str, Any]) -> Any:
    """Next tokens with their probabilities before and after."""
    head = html.Tr([html.Th(text, scope="col") for text in ("Token", "Intact", "Ablated", "Change")])
    rows = [
        html.Tr(
            [html.Th(one.token, scope="row", className="token"), *map(html.Td, (one.before, one.after, one.change))]
        )
        for one in guesses(found)
    ]
    table = html.Table([html.Thead(head), html.Tbody(rows)], className="numbers", id="lab-next")
    return html.Section([html.H3("Next token"), html.Div(table, className="scroll")], className="panel block")


def _probe(rows: Sequence[Mapping[str, Any]], draws: Sequence[Mapping[str, Any]], dark: bool) -> Any:
    shown = [
        {
            "metric": str(row.get("metric")).replace("_", " "),
            "baseline": number(row.get("baseline"), 3),
            "ablated": number(row.get("ablated"), 3),
            "effect": f"{number(row.get('effect'), 3)} ({interval(row.get('low'), row.get('high'), 3)})",
            "control": f"{number(row.get('control_effect'), 3)} "
            f"({interval(row.get('control_low'), row.get('control_high'), 3)})",
            "q": probability(row.get("q")),
            "outcome": verdict(dict(row)).label,
        }
        for row in rows
    ]
    told = [f"{row['metric'].replace('_', ' ')}: {verdict(dict(row)).sentence}" for row in rows]
    grid = data_grid("lab-probe-table", shown, _PROBE_COLUMNS, height=60 + 32 * max(1, len(shown)))
    figure = ablation_chart(pd.DataFrame(list(rows)), pd.DataFrame(list(draws)) if draws else None, dark=dark)
    caption = str(rows[0].get("caption", "")) if rows else ""
    return html.Section(
        [
            html.H3("Probe, against matched random heads"),
            grid,
            html.Ul([html.Li(sentence) for sentence in told], id="lab-verdicts"),
            figure_panel("lab-effects", figure, title="Effects of these heads and of random ones"),
            html.P(caption, className="caption"),
        ],
        className="block",
    )


def _as_study(name: str, asked: Mapping[str, Any], model: str) -> Any:
    try:
        text, command = read_trial(asked).study(model)
    except WorkbenchError:
        return None
    saves = html.A("Save study.toml", href=export.study_of(name), className="chip", id="lab-save-study")
    inside = [
        html.P(["Save as ", html.Code("probes/from-the-lab/study.toml"), " and run ", html.Code(command)]),
        dmc.Code(text, block=True, id="lab-study"),
        html.P(saves),
    ]
    return html.Details([html.Summary("As a study"), *inside], className="panel block")
