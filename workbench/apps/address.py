"""The address of a view: everything that a page shows follows from it, so that a link restores it exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import parse_qsl, urlencode

from workbench.models import Head, Spec

# A query longer than this is cut: browsers and servers refuse it anyway.
MOST_QUERY = 8_000
MOST_FIELDS = 64


class Query(Mapping[str, str]):
    """The fields of an address, and whether the page is shown in dark colours (which no address says)."""

    def __init__(self, fields: Mapping[str, str], dark: bool = False) -> None:
        self._fields, self.dark = dict(fields), dark

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def read_query(search: str | None) -> dict[str, str]:
    """`?run=demo&head=L18H6` as a dictionary; of a field that comes twice, the last one counts."""
    text = (search or "").removeprefix("?")[:MOST_QUERY]
    try:
        pairs = parse_qsl(text, keep_blank_values=False, max_num_fields=MOST_FIELDS)
    except ValueError:
        return {}
    return {key: value for key, value in pairs if "\0" not in key + value}


def to_query(fields: Mapping[str, object]) -> str:
    """The query of some fields; those that are None or empty are left out."""
    kept = {key: str(value) for key, value in fields.items() if value not in (None, "", [], ())}
    return f"?{urlencode(kept)}" if kept else ""


def link(path: str, **fields: object) -> str:
    """An address within the app."""
    return path + to_query(fields)


def read_choice(query: Mapping[str, str], name: str, choices: Iterable[str], default: str = "") -> str:
    """A field that takes one of some values; anything else is the default."""
    given = query.get(name, default)
    return given if given in set(choices) else default


def read_list(query: Mapping[str, str], name: str, choices: Iterable[str] | None = None) -> list[str]:
    """A field of values parted by commas, each once; those that do not exist are left out."""
    given = dict.fromkeys(part.strip() for part in query.get(name, "").split(",") if part.strip())
    allowed = None if choices is None else set(choices)
    return [one for one in given if allowed is None or one in allowed]


def read_number(query: Mapping[str, str], name: str, low: float, high: float, default: float) -> float:
    """A field that takes a number of a range; anything else is the default."""
    try:
        found = float(query.get(name, ""))
    except ValueError:
        return default
    return found if low <= found <= high else default


def read_heads(query: Mapping[str, str], name: str = "heads", spec: Spec | None = None) -> list[str]:
    """Heads by name; what names none, or none of this model, is left out."""
    found = []
    for text in read_list(query, name):
        try:
            head = Head.parse(text)
            found.append(str(head if spec is None else spec.check(head)))
        except ValueError:
            continue
    return found
