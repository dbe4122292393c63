"""The note on a head's card. What another reader saved in between is shown, and nobody's words are written over."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html, no_update

from workbench.apps.context import Context
from workbench.apps.library import NoteChanged
from workbench.apps.shell import refusal
from workbench.errors import WorkbenchError
from workbench.models import Head


def section(context: Context, run: str, head: Head) -> Any:
    """The note as it is stored now, which is kept beside the box as what its reader has seen."""
    try:
        text = context.library.notes(run).get(str(head), "")
    except WorkbenchError as error:
        return refusal(str(error))
    return html.Section(
        [
            dmc.Textarea(id="head-note", value=text, label=f"Note on {head}, saved with the run", autosize=True,
                         minRows=2, maxRows=12),
            dmc.Group([dmc.Button("Save", id="head-note-save", size="compact-sm"),
                       dmc.Text(id="head-note-said", size="sm", c="dimmed")], mt="xs"),
            html.Div(id="head-note-other", role="alert"),
            dcc.Store(id="head-note-read", data=text),
        ],
        className="block",
    )  # fmt: skip


def _other(text: str) -> Any:
    """What stands in the run in place of what this reader has seen."""
    words = (
        "Not saved: this note was changed elsewhere since you opened the page. Your text is still in the box above; "
        "the stored one is below. Take over what you want to keep of it: saving again replaces it."
    )
    stored = dmc.Code(text, block=True, mt="xs", id="head-note-stored") if text else html.P("(It was removed.)")
    return dmc.Alert([dmc.Text(words, size="sm"), stored], title="Another note is stored", color="orange", mt="xs")


def register(app: Dash, context: Context) -> None:
    """Saving."""

    @app.callback(
        Output("head-note-said", "children"),
        Output("head-note-other", "children"),
        Output("head-note-read", "data"),
        Input("head-note-save", "n_clicks"),
        State("head-note", "value"),
        State("head-note-read", "data"),
        State("head-run", "value"),
        State("head-name", "value"),
        prevent_initial_call=True,
    )
    def save(wanted: int | None, text: str | None, read: str | None, run: str | None, head: str | None) -> Any:
        if not wanted or not run or not head:
            return no_update, no_update, no_update
        try:
            context.library.write_note(run, str(Head.parse(head)), text or "", read=read or "")
        except NoteChanged as changed:
            return "", _other(changed.stored), changed.stored
        except (WorkbenchError, OSError) as error:
            return str(error), no_update, no_update
        return f"Saved with {run}." if text else f"Removed from {run}.", [], text or ""
