"""What pages are given, and what a page is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.apps.address import Query
from workbench.apps.library import RunLibrary
from workbench.apps.live import Live
from workbench.apps.settings import AppSettings


@dataclass(frozen=True)
class Context:
    """Shared by all users: what is on disk, the model at hand, the settings. Nothing of a user is kept here."""

    settings: AppSettings
    library: RunLibrary
    live: Live


def run_named(context: Context, query: Query) -> Sequence[str]:
    """The run that an address names, where it names one."""
    del context
    return [query["run"]] if query.get("run") else []


def nothing_more(context: Context, query: Query) -> Mapping[str, str]:
    """A page whose runs say all that an export of it shows."""
    del context, query
    return {}


@dataclass(frozen=True)
class Page:
    """A page: its address, its name, what it shows for a query, and its callbacks.

    `layout` takes the query of the address (`?run=...`), any there is: what it cannot honour it says on the page.
    `register` adds the callbacks, once, when the app is made. `subject` names the runs that the page then shows (none,
    one, or two that it compares): those that are exported, with what else is `shown` (a trial, the view of a pattern).
    """

    path: str
    name: str
    hint: str
    layout: Callable[[Context, Query], Any]
    register: Callable[[Any, Context], None]
    subject: Callable[[Context, Query], Sequence[str]] = run_named
    shown: Callable[[Context, Query], Mapping[str, str]] = nothing_more
