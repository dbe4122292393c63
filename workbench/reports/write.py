"""`write_report`: a run as one HTML file that needs no network.

1. The run's tables and arrays become texts, figures and script data (`build`).
2. Templates, style sheet and scripts of this package are put into one page, autoescaped; plotly.js is
   inlined once.
3. If the page is over its budget, plotly.js is packed (gzip, unpacked by the browser); then optional parts are
   left out, by importance (`build.OPTIONAL`, the least important first): a part goes only where it does not fit
   beside all that are more important. The page says what is missing and with which budget it is there.
4. The file is written under a temporary name in the same folder, synced and renamed.

A content security policy in the page forbids every connection, so a report cannot fetch anything even by
mistake. Cost: a few seconds and about 5 MB for a demo run (2 MB with `gallery=True`).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
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
from workbench.reports.view import PatternView

BUDGET_BYTES = 8_000_000
_SCRIPTS = ("core.js", "theme.js", "charts.js", "tokens.js", "statistics.js", "table.js", "links.js")


@dataclass(frozen=True)
class Budget:
    """A size that a page was held to, and what all of it would take, in bytes."""

    bytes: int
    whole: int

    @property
    def megabytes(self) -> str:
        return f"{self.bytes / 1e6:.3g}"

    @property
    def needed(self) -> int:
        """A budget, in whole megabytes, in which everything fits."""
        return -(-self.whole // 1_000_000)


def write_report(
    run: RunLike,
    path: str | Path,
    *,
    against: RunLike | None = None,
    view: PatternView | None = None,
    gallery: bool = False,
    budget_bytes: int = BUDGET_BYTES,
) -> Path:
    """Writes the report of `run` to `path` and returns the path.

    With `against`, another run on disk, a section tells how its head scores differ; with `view`, one shows that part of
    a stored pattern.
    `gallery=True` packs plotly.js, which makes the file 3 MB smaller and asks for a browser of 2023 or later.
    Raises `RequestError` where not even the page without charts fits into `budget_bytes`.
    """
    target = Path(path)
    if target.is_dir():
        raise RequestError(f"{target} is a folder; name the HTML file to write, e.g. {target / 'report.html'}.")
    page = render(run, against=against, view=view, gallery=gallery, budget_bytes=budget_bytes).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, page)
    return target


def render(
    run: RunLike,
    *,
    against: RunLike | None = None,
    view: PatternView | None = None,
    gallery: bool = False,
    budget_bytes: int = BUDGET_BYTES,
) -> str:
    """The report as text, within the budget."""
    content = build(run, against, view)
    page = _page(content, frozenset(), gallery)
    if _bytes(page) > budget_bytes and not gallery:
        page = _page(content, frozenset(), True)
    if _bytes(page) > budget_bytes:
        page = _fitting(content, page, budget_bytes)
    if _bytes(page) > budget_bytes:
        raise RequestError(
            f"The report takes {_bytes(page):,} bytes even without its optional parts, more than "
            f"budget_bytes={budget_bytes:,}; allow more bytes or report a run with fewer heads."
        )
    return page


def _fitting(content: Content, page: str, budget_bytes: int) -> str:
    """The page without what is least important of what does not fit; without everything optional at the least."""
    sizes, whole = content.sizes(), _bytes(page)
    # Without figures there is no plotly.js either, so what is left is known once it is made.
    bare = _page(content, frozenset(sizes), True, (budget_bytes, whole))
    room = budget_bytes - _bytes(bare)
    plotly = len(packed_bundle()) if content.figures else 0
    kept: set[str] = set()
    for part in reversed([name for name in OPTIONAL if name in sizes]):
        need = sizes[part] + (plotly if part in content.figures and not kept & set(content.figures) else 0)
        if need <= room:
            kept.add(part)
            room -= need
    while kept:
        found = _page(content, frozenset(sizes) - kept, True, (budget_bytes, whole))
        if _bytes(found) <= budget_bytes:
            return found
        # Sizes are those of the data; what stands around it may be what is too much.
        kept.remove(next(name for name in OPTIONAL if name in kept))
    return bare


def _bytes(page: str) -> int:
    return len(page.encode())


def _page(content: Content, omit: frozenset[str], pack: bool, limit: tuple[int, int] | None = None) -> str:
    """`limit` is the budget and what the whole page takes, where that is more."""
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
            has_view="view" not in omit,
            omitted=[OPTIONAL[part] for part in OPTIONAL if part in omit],
            budget=None if limit is None else Budget(*limit),
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
