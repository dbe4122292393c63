"""The figure of a study: from its run and its `[figure]` table to plotly, HTML or PNG.

A PNG is a picture that a headless Chromium takes of the HTML, so that no other renderer is needed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench.errors import RequestError
from workbench.figures import (
    ablation_chart,
    agreement_matrix,
    domain_scatter,
    dose_curve,
    dose_lines,
    head_maps,
    palette,
    point_chart,
)
from workbench.figures.studies import need
from workbench.figures.text import safe
from workbench.reports.source import RunLike
from workbench.studies.spec import Draw, Figure

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH = 900
_TITLE_PIXELS = 44

Drawing = Callable[[RunLike, pd.DataFrame, dict[str, Any]], go.Figure]


def _draws(run: RunLike) -> pd.DataFrame | None:
    return run.table("verification_draws") if run.has_table("verification_draws") else None


def _ablation(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    # Draws are matched by detector, k and metric: with several forms of one set they would all stand in each row.
    once = not rows.duplicated(["detector", "k", "metric"]).any()
    return ablation_chart(rows, _draws(run) if once else None, **options)


def _dose(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    return dose_curve(rows, _draws(run), **options)


def _maps(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    return head_maps(rows, run.table("detectors") if run.has_table("detectors") else None, **options)


def _points(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    return point_chart(rows, **options)


def _lines(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    return dose_lines(rows, **options)


def _agreement(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    return agreement_matrix(rows, **options)


def _contrast(run: RunLike, rows: pd.DataFrame, options: dict[str, Any]) -> go.Figure:
    return domain_scatter(rows, **options)


DRAWINGS: dict[Draw, Drawing] = {
    "ablation": _ablation,
    "dose": _dose,
    "agreement": _agreement,
    "contrast": _contrast,
    "maps": _maps,
    "points": _points,
    "lines": _lines,
}


# What draws in the end: its keyword arguments are the options that a study may give.
_FIGURES: dict[Draw, Callable[..., go.Figure]] = {
    "ablation": ablation_chart,
    "dose": dose_curve,
    "agreement": agreement_matrix,
    "contrast": domain_scatter,
    "maps": head_maps,
    "points": point_chart,
    "lines": dose_lines,
}


def study_figure(run: RunLike, figure: Figure) -> go.Figure:
    """The study's figure, drawn from its run."""
    if not run.has_table(figure.table):
        raise RequestError(
            f"The run has no table {figure.table!r} to draw; `workbench study run` the cells that make it."
        )
    rows = run.table(figure.table)
    need(rows, list(figure.where))
    for name, wanted in figure.where.items():
        rows = rows[rows[name].isin(wanted if isinstance(wanted, list) else [wanted])]
    need(rows, [])
    made = _FIGURES[figure.draw]
    known = [name for name, one in signature(made).parameters.items() if one.kind is Parameter.KEYWORD_ONLY]
    for name in figure.options:
        if name not in known:
            raise RequestError(
                f"figure.options has no {name!r} for draw = {figure.draw!r}; there are {', '.join(known)}."
            )
    return DRAWINGS[figure.draw](run, rows.reset_index(drop=True), dict(figure.options))


def write_figure(drawn: go.Figure, title: str, path: str | Path) -> Path:
    """Write a figure as an HTML page of its own (.html), or as a picture of it (.png)."""
    target = Path(path)
    if target.suffix not in (".html", ".png"):
        raise RequestError(f"{target}: a figure is written as .html or .png; name the file so.")
    page = _page(drawn, title)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".html":
        target.write_text(page, encoding="utf-8")
    else:
        _picture(page, int(drawn.layout.height or 450) + _TITLE_PIXELS, target)
    return target


def _page(drawn: go.Figure, title: str) -> str:
    colours = palette()
    chart = (
        go.Figure(drawn)
        .update_layout(width=WIDTH)
        .to_html(full_html=False, include_plotlyjs=True, config={"displayModeBar": False})
    )
    style = f"margin:0;background:{colours.page};color:{colours.ink};font:15px 'Segoe UI',Inter,Roboto,sans-serif"
    return (
        f"<!doctype html><meta charset='utf-8'><title>{safe(title)}</title><body style=\"{style}\">"
        f"<div style='padding:14px 16px 4px;font-weight:600'>{safe(title)}</div>{chart}</body>"
    )


def _picture(page: str, height: int, target: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RequestError(
            f"A picture needs one of {', '.join(BROWSERS)} on the path; write {target.stem}.html instead."
        )
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "figure.html", Path(folder) / "figure.png"
        source.write_text(page, encoding="utf-8")
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-background-networking",
                f"--user-data-dir={folder}/profile", "--force-device-scale-factor=1", f"--window-size={WIDTH},{height}",
                "--virtual-time-budget=8000", f"--screenshot={made}", source.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if not made.is_file():
            told = " ".join(done.stderr.split())[-300:]
            raise RequestError(f"{browser} took no picture ({told}); write {target.stem}.html instead.")
        shutil.move(made, target)
