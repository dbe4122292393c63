"""The address of a view: everything that a page shows follows from it, so that a link restores it exactly."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from urllib.parse import parse_qsl, urlencode

from workbench.models import Head, Spec

# A query longer than this is cut: browsers and servers refuse it anyway.
MOST_QUERY = 8_000
MOST_FIELDS = 64
# Of a wrong value no more is repeated on the page.
_MOST_TOLD = 40


class Query(Mapping[str, str]):
    """The fields of an address, and whether the page is shown in dark colours (which no address says).

    `told` is what could not be honoured, with what is shown instead: readers of fields add to it, pages tell it.
    """

    def __init__(self, fields: Mapping[str, str], dark: bool = False) -> None:
        self._fields, self.dark = dict(fields), dark
        self.told: dict[str, None] = {}

    def tell(self, field: str, given: str, words: str) -> None:
        """Note that a field's value is not honoured, and why."""
        short = given if len(given) <= _MOST_TOLD else given[:_MOST_TOLD] + "…"
        self.told[f"{field}={short}: {words}."] = None

    def beside(self, fields: Mapping[str, str]) -> Query:
        """Other fields for the same page, which tells of both."""
        other = Query(fields, self.dark)
        other.told = self.told
        return other

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
    given, known = query.get(name, default), set(choices)
    if given in known:
        return given
    if name in query:
        _tell(query, name, given, f"there is no such choice here; {_instead(default)}")
    return default


def read_list(query: Mapping[str, str], name: str, choices: Iterable[str] | None = None) -> list[str]:
    """A field of values parted by commas, each once; those that do not exist are left out."""
    given = dict.fromkeys(part.strip() for part in query.get(name, "").split(",") if part.strip())
    allowed = None if choices is None else set(choices)
    for one in given:
        if allowed is not None and one not in allowed:
            _tell(query, name, one, "there is no such choice here; it is left out")
    return [one for one in given if allowed is None or one in allowed]


def read_number(query: Mapping[str, str], name: str, low: float, high: float, default: float) -> float:
    """A field that takes a number of a range; anything else is the default."""
    if name not in query:
        return default
    words = f"a number from {low:g} to {high:g} is needed; {_instead(f'{default:g}')}"
    try:
        found = float(query[name])
    except ValueError:
        found = float("nan")
    if low <= found <= high:
        return found
    _tell(query, name, query[name], words)
    return default


def _instead(default: str) -> str:
    return f"{default} is taken" if default else "none is taken"


def _tell(query: Mapping[str, str], name: str, given: str, words: str) -> None:
    if isinstance(query, Query):
        query.tell(name, given, words)


def read_heads(
    query: Mapping[str, str],
    name: str = "heads",
    spec: Spec | None = None,
    *,
    known: Collection[str] | None = None,
    instead: str = "it is left out",
) -> list[str]:
    """Heads by name; what names none, none of this model, or none of those that are `known`, is left out."""
    found = []
    for text in read_list(query, name):
        try:
            head = Head.parse(text)
            checked = str(head if spec is None else spec.check(head))
        except ValueError:
            _tell(query, name, text, f"this names no head, as L18H6 does; {instead}")
            continue
        if known is not None and checked not in known:
            _tell(query, name, text, f"the run has no such head; {instead}")
            continue
        found.append(checked)
    return found
