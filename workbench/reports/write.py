"""`write_report`: a run as one HTML file that needs no network.

1. The run's tables and arrays become texts, figures and script data (`build`).
2. Templates, style sheet and scripts of this package are put into one page, autoescaped; plotly.js is
   inlined once.
3. If the page is over its budget, plotly.js is packed (gzip, unpacked by the browser), then the heaviest
   optional parts are left out one after the other, at last all plotly charts; the page says what is
   missing.
4. The file is written under a temporary name in the same folder, synced and renamed.

A content security policy in the page forbids every connection, so a report cannot fetch anything even by
mistake. Cost: a few seconds and about 5 MB for a demo run (2 MB with `gallery=True`).
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from workbench.errors import RequestError
from workbench.figures.text import in_order
from workbench.reports.build import OPTIONAL, Content, build, style_variables
from workbench.reports.payload import embed, packed, plotly_bundle
from workbench.reports.source import RunLike

BUDGET_BYTES = 8_000_000
_SCRIPTS = ("core.js", "theme.js", "charts.js", "tokens.js", "statistics.js", "table.js", "links.js")


def write_report(
    run: RunLike,
    path: str | Path,
    *,
    against: RunLike | None = None,
    gallery: bool = False,
    budget_bytes: int = BUDGET_BYTES,
) -> Path:
    """Writes the report of `run` to `path` and returns the path.

    With `against`, another run on disk, a section tells how its head scores differ.
    `gallery=True` packs plotly.js, which makes the file 3 MB smaller and asks for a browser of 2023 or later.
    Raises `RequestError` where not even the page without charts fits into `budget_bytes`.
    """
    target = Path(path)
    if target.is_dir():
        raise RequestError(f"{target} is a folder; name the HTML file to write, e.g. {target / 'report.html'}.")
    page = render(run, against=against, gallery=gallery, budget_bytes=budget_bytes).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, page)
    return target


def render(
    run: RunLike, *, against: RunLike | None = None, gallery: bool = False, budget_bytes: int = BUDGET_BYTES
) -> str:
    """The report as text, within the budget."""
    content = build(run, against)
    page = _page(content, frozenset(), gallery)
    if _bytes(page) > budget_bytes and not gallery:
        page = _page(content, frozenset(), True)
    omit: frozenset[str] = frozenset()
    parts = sorted(content.sizes().items(), key=lambda item: item[1])
    while _bytes(page) > budget_bytes and parts:
        # the heaviest first, as many as are needed by their sizes
        excess = _bytes(page) - budget_bytes
        while parts and excess > 0:
            part, size = parts.pop()
            omit |= {part}
            excess -= size
        page = _page(content, omit, True)
    if _bytes(page) > budget_bytes:
        raise RequestError(
            f"The report takes {_bytes(page):,} bytes even without its optional parts, more than "
            f"budget_bytes={budget_bytes:,}; allow more bytes or report a run with fewer heads."
        )
    return page


def _bytes(page: str) -> int:
    return len(page.encode())


def _page(content: Content, omit: frozenset[str], pack: bool) -> str:
    figures = content.figure_ids(omit)
    bundle = packed_bundle() if pack else plotly_bundle()
    return (
        environment()
        .get_template("report.html")
        .render(
            **content.texts,
            known=content.known,
            statistics=content.statistics,
            has_reading=content.reading is not None and "tokens" not in omit,
            cards=content.cards,
            patterns=[] if "tokens" in omit and "patterns" in omit else content.patterns,
            figures=figures,
            has_table=content.table is not None,
            has_details="details" not in omit,
            has_tokens="tokens" not in omit,
            omitted=[OPTIONAL[part] for part in OPTIONAL if part in omit],
            variables=style_variables(),
            style=Markup(asset("report.css")),
            scripts={"early": Markup(asset("early.js")), "late": [Markup(asset(name)) for name in _SCRIPTS]},
            data=embed(content.script_data(omit)),
            plotly=Markup(bundle) if figures else "",
            packed=pack,
        )
    )


@cache
def packed_bundle() -> str:
    """plotly.js, packed once a process."""
    return packed(plotly_bundle())


@cache
def environment() -> Environment:
    """The templates of this package: escaping on, unknown names an error, no text reorders the page."""
    return Environment(
        loader=FunctionLoader(lambda name: _read("templates", name)),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_in_order,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _in_order(value: object) -> object:
    # what is markup already was put together from texts that came through here or were written by us
    return in_order(value) if type(value) is str else value


def asset(name: str) -> str:
    """A style sheet or script of this package."""
    return _read("assets", name)


def _read(folder: str, name: str) -> str:
    return (files("workbench.reports") / folder / name).read_text(encoding="utf-8")


def _replace(target: Path, page: bytes) -> None:
    """Leaves either the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a report is meant to be shared
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
