"""From a run to the page's content: texts, figures and script data, before anything is rendered."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from workbench.figures import DARK, LIGHT, Palette, template
from workbench.figures.controls import whence
from workbench.figures.text import in_order
from workbench.reports.atlas import atlas_view
from workbench.reports.cards import Card, cards
from workbench.reports.catalogue import Catalogue, catalogue
from workbench.reports.charts import charts
from workbench.reports.circuit_summary import circuits_summary
from workbench.reports.circuits import circuits_view
from workbench.reports.commands import heads_command, verify_command
from workbench.reports.difference import difference
from workbench.reports.examples import Pattern, patterns, reach
from workbench.reports.facts import checks, duration, model_facts, moment, run_facts, steps
from workbench.reports.findings import Finding, findings, probes, remarks, summary, switching_heads, verification_rows
from workbench.reports.notes import notes_of
from workbench.reports.payload import size_of
from workbench.reports.singles import redundancy, single_rows
from workbench.reports.source import RunLike, ablations, frame, shown_title
from workbench.reports.statistics import Statistics, statistics, statistics_summary
from workbench.reports.table import head_table
from workbench.reports.trial import trial_summary, trial_view
from workbench.reports.view import PatternView
from workbench.runs import Run

# What may be left out, the least important first, and how the report names it. What stays in any case: the summary, all
# texts and tables of findings, cards, ablations, differences and circuits, the certificate and the provenance.
_NAMES = {
    "losses": "losses token by token",
    "patterns": "pattern maps",
    "tokens": "token views",
    "curves": "position curves",
    "contrast": "domain contrast",
    "details": "intervals and q-values in the head table (they stay in the run's table)",
    "differences": "maps of differences (their table stays)",
    "maps": "layer x head maps",
    "multiples": "all maps on one scale",
    "headmap": "map of heads",
    "agreement": "agreement matrix (its strongest pairs stay)",
    "ablation": "ablation chart (its table stays)",
    "patches": "maps of patches (their table stays)",
    "scores": "maps of scores (their table stays)",
    "graph": "picture of the circuit (its strongest edges stay)",
    "faithfulness": "faithfulness curve (its table stays)",
    "roc": "recovery of the known circuit",
    "view": "picture of the pattern (its highest entries stay)",
}
_ORDER = (
    "roc contrast curves multiples agreement headmap scores tokens patterns details maps differences patches "
    "faithfulness ablation graph losses view"
)
OPTIONAL = {name: _NAMES[name] for name in _ORDER.split()}


@dataclass(frozen=True)
class Content:
    """Everything a report shows. `figures` is by part, then by figure id."""

    manifest: Mapping[str, Any]
    texts: dict[str, Any]
    known: Catalogue
    statistics: Statistics | None
    cards: list[Card]
    patterns: list[Pattern]
    figures: dict[str, dict[str, dict[str, Any]]]
    table: dict[str, Any] | None
    slim_table: dict[str, Any] | None
    view: PatternView | None = None

    @property
    def reading(self) -> dict[str, Any] | None:
        """What the token view of a trace reads."""
        return self.statistics.view if self.statistics is not None else None

    def sizes(self) -> dict[str, int]:
        """Bytes that each optional part takes in the file."""
        sizes = {part: size_of(figures) for part, figures in self.figures.items()}
        sizes["tokens"] = size_of([p.payload() for p in self.patterns]) + size_of(self.reading)
        if self.table is not None:
            sizes["details"] = size_of(self.table) - size_of(self.slim_table)
        if self.view is not None:
            sizes["view"] = self.view.size
        return {part: size for part, size in sizes.items() if size > 0}

    def figure_ids(self, omit: frozenset[str]) -> dict[str, dict[str, Any]]:
        """The figures that stay, by id."""
        kept = [figures for part, figures in self.figures.items() if part not in omit]
        return {name: figure for figures in kept for name, figure in figures.items()}

    def script_data(self, omit: frozenset[str]) -> dict[str, Any]:
        """What the page's scripts read."""
        views = [] if "tokens" in omit else self.patterns
        figures = self.figure_ids(omit)
        return {
            "palettes": {palette.name: _for_scripts(palette) for palette in (LIGHT, DARK)},
            "templates": {p.name: template(p is DARK).to_plotly_json() for p in (LIGHT, DARK)} if figures else {},
            "figures": figures,
            "table": self.slim_table if "details" in omit else self.table,
            "tokens": {p.example: list(p.tokens) for p in views},
            "patterns": {p.key: p.payload() for p in views},
            "reading": None if "tokens" in omit else self.reading,
            "model": {name: self.manifest.get("model", {}).get(name) for name in ("layers", "heads")},
        }


def build(run: RunLike, against: RunLike | None = None, view: PatternView | None = None) -> Content:
    """Reads the run once and computes everything that a report may show.

    `against` is a run to compare it with, `view` what a reader had at hand of a pattern.
    """
    known, measured = catalogue(run), statistics(run)
    # the large view starts with the head that has most to show
    found = sorted(patterns(run), key=lambda pattern: -reach(pattern.values))
    chosen = cards(run, known, found)
    leading = findings(run, known)
    verification = verification_rows(run, known)
    tested = ablations(run)
    by_hand = bool(verification) and all(row["by_hand"] for row in verification)
    circuits = circuits_view(run)
    compared = difference(run, against, known)
    trial = trial_view(run)
    asks_scores = not (known or measured or by_hand or circuits or trial)
    scores = frame(run, "head_scores")
    if scores is None and measured is not None:
        scores = measured.scores()
    columns = list(known) or (measured.columns if measured is not None else [])
    texts: dict[str, Any] = {
        "title": shown_title(run) if compared is None else f"{shown_title(run)}, beside {compared.title}",
        "run_id": str(run.manifest.get("id", "")),
        "kind": str(run.manifest.get("kind", "run")),
        "created": moment(run.manifest.get("created")),
        "duration": duration(run),
        # commands that would fill a section are named only where the run leaves a question open
        "asks_scores": asks_scores,
        "heads_command": heads_command(run),
        "verify_command": verify_command(run, leading),
        "whence": whence(() if tested is None else tested.to_dict("records")),
        "asks_ablation": not verification and (bool(known) or asks_scores),
        "by_hand": by_hand,
        "atlas": atlas_view(run, known),
        "circuits": circuits,
        "difference": compared,
        "trial": trial,
        "view": view,
        "columns": columns,
        "summary": Markup(in_order(str(_summary(run, known, leading, measured)))),
        "findings": leading,
        "verification": verification,
        **_beside(run, known),
        **_provenance(run),
    }
    return Content(
        manifest=run.manifest,
        texts=texts,
        known=known,
        statistics=measured,
        cards=chosen,
        patterns=found,
        figures=charts(run, known, chosen, found, measured)
        | ({} if compared is None else {"differences": compared.figures}),
        table=head_table(scores, columns),
        slim_table=head_table(scores, columns, details=False),
        view=view,
    )


def _beside(run: RunLike, known: Catalogue) -> dict[str, Any]:
    return {
        "notes": notes_of(run),
        "remarks": remarks(run, known),
        "singles": single_rows(run, known),
        "redundancy": redundancy(run, known),
        "probes": probes(run),
        "switching": switching_heads(run),
    }


def _provenance(run: RunLike) -> dict[str, Any]:
    return {
        "model": run.manifest.get("model", {}),
        "checks": checks(run),
        "certified": run.manifest.get("certificate", {}).get("passed"),
        "model_facts": model_facts(run),
        "run_facts": run_facts(run),
        "run_argument": shlex.quote(run.path.name) if isinstance(run, Run) else "RUN",
        "prompts": list(run.manifest.get("prompts", [])),
        "steps": steps(run),
    }


def _summary(run: RunLike, known: Catalogue, leading: list[Finding], measured: Statistics | None) -> Markup:
    if run.manifest.get("trial") and not run.has_table("verification"):
        return trial_summary(run)
    if run.manifest.get("circuits"):
        return circuits_summary(run)
    if measured is not None and not known:
        return statistics_summary(run, measured)
    return summary(run, known, leading)


def style_variables() -> Markup:
    """The palettes as CSS custom properties: light, dark by choice, dark by the system's preference."""
    light, dark = _variables(LIGHT), _variables(DARK)
    return Markup(
        f":root{{color-scheme:light;{light}}}\n:root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme]){{color-scheme:dark;{dark}}}}}\n"
        f"@media print{{:root,:root[data-theme=dark],:root:not([data-theme]){{color-scheme:light;{light}}}}}"
    )


def _variables(palette: Palette) -> str:
    names = "page surface sunken ink muted line accent effect control good bad".split()
    scale = ",".join(palette.sequential)
    return "".join(f"--{name}:{getattr(palette, name)};" for name in names) + f"--scale:{scale};"


def _for_scripts(palette: Palette) -> dict[str, Any]:
    return {"scale": list(palette.sequential), "control": palette.control, "effect": palette.effect}
