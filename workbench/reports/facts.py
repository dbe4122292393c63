"""Certificate and provenance as texts: what ran, on which weights, and how far checks were from failing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from numbers import Real
from typing import Any

from workbench.figures.text import number
from workbench.reports.source import RunLike

_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Check:
    """One check of the certificate."""

    name: str
    measured: str
    tolerance: str
    passed: bool
    detail: str
    margin: str


def checks(run: RunLike) -> list[Check]:
    """The checks of the certificate in their order; empty where the run has none."""
    return [_check(row) for row in run.manifest.get("certificate", {}).get("checks", [])]


def _check(row: Mapping[str, Any]) -> Check:
    measured, tolerance = row.get("measured"), row.get("tolerance")
    return Check(
        name=str(row.get("name", "")),
        measured=_scientific(measured),
        tolerance=_scientific(tolerance),
        passed=bool(row.get("passed")),
        detail=str(row.get("detail") or ""),
        margin=_margin(measured, tolerance),
    )


def _scientific(value: object) -> str:
    if not isinstance(value, Real):
        return "–" if value is None else str(value)
    plain = float(value)
    return f"{plain:.1e}".replace("-", "−") if 0 < abs(plain) < 0.01 else number(plain)


def _margin(measured: object, tolerance: object) -> str:
    """How the measured value compares with the tolerance, as a factor."""
    if not isinstance(measured, Real) or not isinstance(tolerance, Real):
        return ""
    here, bound = float(measured), float(tolerance)
    if bound <= 0 or not math.isfinite(here):
        return ""
    if here == 0:
        return "exact"
    ratio = bound / here
    return f"{number(ratio, 1)} × below" if ratio >= 1 else f"{number(1 / ratio, 1)} × above"


def model_facts(run: RunLike) -> list[tuple[str, str, bool]]:
    """(label, value, is a hash or name to be set in monospace) about the model."""
    model = run.manifest.get("model", {})
    shape = f"{model.get('layers', '?')} layers, {model.get('heads', '?')} query heads"
    if model.get("kv_heads"):
        shape += f", {model['kv_heads']} key-value heads of width {model.get('head_dim', '?')}"
    rows = [
        ("Model", model.get("name"), False),
        ("Architecture", model.get("architecture"), True),
        ("Revision", model.get("revision"), True),
        ("Weights, SHA-256", model.get("weights_sha256"), True),
        ("Licence", model.get("license"), False),
        ("Shape", shape, False),
        ("Parameters", _count(model.get("parameters")), False),
        ("Precision and device", _joined(model.get("dtype"), model.get("device")), False),
        ("Special tokens", model.get("special_tokens"), False),
    ]
    return [(label, _shown(value), mono) for label, value, mono in rows]


def run_facts(run: RunLike) -> list[tuple[str, str, bool]]:
    """(label, value, monospace) about the run itself: command, seed, time, versions."""
    manifest = run.manifest
    environment, settings = manifest.get("environment", {}), manifest.get("settings", {})
    rows = [
        ("Run", manifest.get("id"), True),
        ("Command", manifest.get("command"), True),
        ("Started", moment(manifest.get("created")), False),
        ("Finished", moment(manifest.get("finished")), False),
        *_settings(settings),
        ("Versions and machine", _pairs(environment), True),
    ]
    return [(label, _shown(value), mono) for label, value, mono in rows]


def steps(run: RunLike) -> list[tuple[str, str, float]]:
    """(step, seconds as text, share of the longest step in percent)."""
    seconds = {str(k): float(v) for k, v in run.manifest.get("seconds", {}).items() if isinstance(v, Real)}
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(name, f"{number(value, 1)} s", round(100 * value / longest, 1)) for name, value in seconds.items()]


def duration(run: RunLike) -> str:
    """All steps together, as text; empty where no time was recorded."""
    total = sum(float(v) for v in run.manifest.get("seconds", {}).values() if isinstance(v, Real))
    if total <= 0:
        return ""
    return f"{total:.0f} s" if total < 120 else f"{int(total // 60)} min {int(total % 60)} s"


def moment(text: object) -> str:
    """An ISO time as `15 January 2025, 09:30 UTC`; other texts as they are."""
    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return str(text or "")
    zone = when.tzname() or ""
    return f"{when.day} {when:%B %Y, %H:%M} {zone}".strip()


def _count(value: object) -> str | None:
    return f"{float(value):,.0f}" if isinstance(value, Real) else None


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """One row for the plain settings, one more for each group of them."""
    groups = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in settings.items() if key not in groups}
    rows = [("Settings", _pairs(plain), True)]
    return rows + [(f"Settings, {name}", _pairs(group), True) for name, group in groups.items()]


def _pairs(mapping: Mapping[str, Any]) -> str:
    told = {key: _listed(value) for key, value in mapping.items()}
    return " · ".join(f"{key} {value}" for key, value in told.items() if value)


def _listed(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _joined(*values: object) -> str:
    return ", ".join(str(value) for value in values if value)


def _shown(value: object) -> str:
    return str(value) if value not in (None, "") else _UNKNOWN
