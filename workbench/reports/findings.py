"""The summary of a run, computed from its tables: which heads lead, by how much, and what ablating them did.

No sentence here is about a model in particular; each is a frame that numbers of the run fill. A negative
result has its own frame, so that it is told as plainly as a positive one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from workbench.figures.controls import beyond_mean, counted_sets, few_sets, whence
from workbench.figures.text import BY_HAND, form, interval, number, probability, readable, signed
from workbench.figures.verdict import Verdict, verdict
from workbench.reports.catalogue import Catalogue, DetectorInfo, like_null
from workbench.reports.prompts import too_few
from workbench.reports.source import RunLike, ablations, frame, head_name, model_named


@dataclass(frozen=True)
class Causal:
    """One ablation in words."""

    brief: str
    open_claim: str
    text: str
    control: str
    verdict: Verdict


@dataclass(frozen=True)
class Finding:
    """The leading head of one detector; of the `passing` heads, `weak` are not distinguished from the null."""

    detector: DetectorInfo
    head: str
    value: float
    low: float
    high: float
    null: float
    equals: int
    q: float
    passing: int | None
    weak: int
    few: str
    heads: int
    causal: Causal | None

    @property
    def value_text(self) -> str:
        return number(self.value)

    @property
    def interval_text(self) -> str:
        return interval(self.low, self.high)

    @property
    def null_text(self) -> str:
        return number(self.null, beside=(self.value,))

    @property
    def like_null(self) -> bool:
        """Whether even the leading head is not distinguished from the null."""
        return bool(like_null(self.q))

    @property
    def weak_text(self) -> str:
        """How many of the heads that reach the threshold are no findings; empty where all of them are."""
        if not self.weak:
            return ""
        none = "it is not" if self.passing == 1 else "none of them is"
        some = f"{self.weak} of them {'is' if self.weak == 1 else 'are'} not"
        why = f": {self.few}" if self.few else ""
        return f"{none if self.weak == self.passing else some} distinguished from the null{why}"


def findings(run: RunLike, known: Catalogue) -> list[Finding]:
    """One finding for each leading detector that has scores."""
    scores = frame(run, "head_scores")
    if scores is None:
        return []
    verification = ablations(run)
    return [_finding(scores, verification, detector) for detector in known.leading()]


def _finding(scores: pd.DataFrame, verification: pd.DataFrame | None, detector: DetectorInfo) -> Finding:
    rows = scores[(scores["detector"] == detector.name) & scores["value"].notna()]
    strength = detector.strength(rows["value"].to_numpy(float))
    best: dict[str, Any] = rows.iloc[int(np.argmax(strength))].to_dict()
    reaching = detector.passes(rows["value"].to_numpy(float))
    weak = reaching & like_null(rows["q"].to_numpy(float))
    return Finding(
        detector,
        head=head_name(best["layer"], best["head"]),
        value=float(best["value"]),
        low=float(best["low"]),
        high=float(best["high"]),
        null=float(best["null"]),
        equals=int((strength == strength.max()).sum()) - 1,
        q=float(best["q"]),
        passing=int(reaching.sum()) if detector.has_threshold else None,
        weak=int(weak.sum()) if detector.has_threshold else 0,
        few=too_few(rows[reaching], detector) if reaching.any() and weak.sum() == reaching.sum() else "",
        heads=len(rows),
        causal=_causal(verification, detector.name),
    )


def remarks(run: RunLike, known: Catalogue) -> dict[str, str]:
    """A sentence for each detector whose threshold is reached, but by no head that the null could not explain."""
    scores = frame(run, "head_scores")
    if scores is None:
        return {}
    found = {}
    for detector in known:
        rows = scores[(scores["detector"] == detector.name) & scores["value"].notna()]
        reaching = detector.passes(rows["value"].to_numpy(float)) & detector.has_threshold
        if reaching.any() and like_null(rows["q"].to_numpy(float))[reaching].all():
            few = too_few(rows[reaching], detector)
            found[detector.name] = (
                f"{reaching.sum()} of {len(rows)} heads reach the threshold; none is distinguished from the null"
                f"{f': {few}' if few else ''}."
            )
    return found


def _causal(verification: pd.DataFrame | None, detector: str) -> Causal | None:
    """The detector's first metric with most heads ablated: chosen by place in the table, not by outcome."""
    if verification is None:
        return None
    rows = verification[verification["detector"] == detector]
    if rows.empty:
        return None
    first = rows[rows["metric"] == rows.iloc[0]["metric"]]
    return causal(first.sort_values("k", ascending=False, kind="stable").iloc[0].to_dict())


def causal(row: dict[str, Any]) -> Causal:
    """An ablation in a sentence, its control in another, and the verdict."""
    count = int(row["k"])
    heads = "the top head" if count == 1 else f"the top {count} heads"
    unit = f" {row['unit']}" if str(row.get("unit", "")).startswith(_SPOKEN_UNITS) else ""
    name = readable(row["metric"])
    before, after = _ends(row)
    spread = interval(row["control_low"], row["control_high"])
    control = f"{signed(row['control_effect'], beside=_scale(row))}{unit}"
    return Causal(
        brief=f"without its top {f'{count} heads' if count > 1 else 'head'}, {name} goes from "
        f"{before} to {after}{unit} (matched random heads: {control.removesuffix(unit)})",
        text=f"Ablating {heads} takes {name} from {before} to {after}: {_effect(row)}{unit} "
        f"({interval(row['low'], row['high'])}).",
        control=f"{_sets(row)}: {control.removesuffix(unit)}" + (f" ({spread})." if spread else "."),
        open_claim=f"ablating its top heads takes {name} from {before} to {after}{unit} ({_effect(row)}), more than "
        f"random heads do on average ({control.removesuffix(unit)}) but within their range ({spread}), so the claim "
        "stays open"
        if beyond_mean(row)
        else "",
        verdict=verdict(row),
    )


def _scale(row: dict[str, Any]) -> tuple[float, float]:
    """The numbers that an effect is between."""
    return float(row["baseline"]), float(row["ablated"])


def _ends(row: dict[str, Any], digits: int = 2) -> tuple[str, str]:
    """The metric before and after."""
    return number(row["baseline"], digits, beside=_scale(row)), number(row["ablated"], digits, beside=_scale(row))


def _effect(row: dict[str, Any], digits: int = 2) -> str:
    return signed(row["effect"], digits, _scale(row))


def _sets(row: dict[str, Any]) -> str:
    return f"Random heads, {counted_sets(row['different_draws'])}" if few_sets(row) else "Random heads"


# shares and recalls read better without their unit
_SPOKEN_UNITS = ("nats", "bits")


def summary(run: RunLike, known: Catalogue, found: list[Finding]) -> Markup:
    """One paragraph: the model, its leading heads, what ablations showed and did not show."""
    table = ablations(run)
    by_hand = [] if table is None else _by_hand(run, table[table["detector"] == BY_HAND])
    parts = [] if by_hand and not known else [_opening(run, len(known))]
    parts += [_leading(finding) for finding in found]
    parts += by_hand
    parts += _balance(table) if found else []
    return Markup(" ").join(parts)


def _opening(run: RunLike, detectors: int) -> Markup:
    name = model_named(run)
    if not detectors:
        return Markup("{} was read; no head has been scored in this run.").format(name)
    read = "one detector" if detectors == 1 else f"{detectors} detectors"
    return Markup("All heads of {} were scored by {}.").format(name, read)


def _by_hand(run: RunLike, rows: pd.DataFrame) -> list[Markup]:
    """What ablating the heads that a user named did to each metric."""
    parts = []
    for heads, tests in rows.groupby("heads", sort=False):
        names = str(heads).split()
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        one = len(names) == 1
        parts.append(
            Markup("In {}, {} chosen by hand, {}, {} ({} ablation).").format(
                model_named(run),
                "one head" if one else f"{len(names)} heads",
                listed,
                "was ablated" if one else "were ablated together",
                ", ".join(dict.fromkeys(map(form, tests.to_dict("records")))),
            )
        )
        parts += [_by_hand_effect(row) for row in tests.to_dict("records")]
    return parts


def _by_hand_effect(row: dict[str, Any]) -> Markup:
    name = readable(row["metric"])
    unit = f" {row['unit']}" if str(row.get("unit", "")).startswith(_SPOKEN_UNITS) else ""
    spread = interval(row["low"], row["high"])
    return Markup("{} goes from {} to {}{}: {}{}, and {} without random heads{}. {}").format(
        name[:1].upper() + name[1:],
        *_ends(row),
        unit,
        _effect(row),
        f" (95 % interval {spread})" if spread else "",
        signed(row["control_effect"], beside=_scale(row)),
        whence([row]),
        verdict(row).sentence,
    )


def _leading(finding: Finding) -> Markup:
    text = Markup('{} is strongest in <a class="head" href="#{}">{}</a> ({}').format(
        finding.detector.title, finding.head, finding.head, finding.value_text
    )
    if finding.equals:
        text += Markup(", as {} other {}").format(finding.equals, "head" if finding.equals == 1 else "heads")
    if finding.passing is not None:
        count = "no head reaches" if finding.passing == 0 else f"{finding.passing} of {finding.heads} heads reach"
        text += Markup("; {} {}").format(count, number(finding.detector.threshold))
    if finding.weak_text:
        text += Markup(", {}").format(finding.weak_text)
    elif finding.like_null:
        text += Markup(", not distinguished from the null")
    text += Markup(")")
    tested = finding.causal
    if tested is not None and tested.verdict.kind == "shown":
        text += Markup("; {}").format(tested.brief)
    elif tested is not None and tested.verdict.kind == "unsure":
        few = " (too few controls)" if tested.verdict.label == "too few controls" else ""
        text += Markup("; {}, which is not settled{}").format(tested.brief, few)
    elif tested is not None and tested.verdict.kind == "inside" and tested.open_claim:
        text += Markup("; {}").format(tested.open_claim)
    elif tested is not None:
        text += Markup("; {}").format(_NOT_SHOWN[tested.verdict.kind])
    return text + Markup(".")


_NOT_SHOWN = {
    "inside": "ablating its top heads does no more than ablating random ones",
    "reverse": "ablating its top heads makes the metric better, not worse",
    "uncontrolled": "its ablation had no control",
}


def _balance(verification: pd.DataFrame | None) -> list[Markup]:
    if verification is None:
        return [Markup("No ablation has been run, so these scores say what heads attend to, not what they do.")]
    kinds = [verdict(row).kind for row in verification.to_dict("records")]
    told = [f"{kinds.count(kind)} {words}" for kind, words in _OUTCOMES.items() if kind in kinds]
    listed = " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)
    count = "the one ablation" if len(kinds) == 1 else f"{len(kinds)} ablations"
    return [Markup("Of {}, {}.").format(count, listed)]


_OUTCOMES = {
    "shown": "had an effect beyond matched random heads",
    "inside": "stayed within the range of random heads",
    "unsure": "went beyond random heads but are not settled (interval, q or too few controls)",
    "reverse": "made the metric better",
    "uncontrolled": "had no control",
}


def verification_rows(run: RunLike, known: Catalogue) -> list[dict[str, Any]]:
    """The ablation table as texts."""
    table = ablations(run)
    if table is None:
        return []
    return [verification_row(row, known) for row in table.to_dict("records")]


def verification_row(row: dict[str, Any], known: Catalogue) -> dict[str, Any]:
    """One ablation as texts."""
    k, by_hand = int(row["k"]), str(row["detector"]) == BY_HAND
    before, after = _ends(row, 3)
    return {
        "set": "Chosen by hand" if by_hand else f"{known.get(str(row['detector'])).title}, top {k}",
        "by_hand": by_hand,
        "heads": str(row["heads"]).split(),
        "how": form(row),
        "metric": readable(row["metric"]),
        "unit": row["unit"],
        "better": row["better"],
        "baseline": before,
        "ablated": after,
        "effect": _effect(row, 3),
        "interval": interval(row["low"], row["high"], 3),
        "control": signed(row["control_effect"], 3, _scale(row)),
        "control_interval": interval(row["control_low"], row["control_high"], 3),
        "draws": number(row["draws"], places=0),
        "p": probability(row["p"]),
        "q": probability(row["q"]),
        "n": number(row["n"], places=0),
        "verdict": verdict(row),
    }


def probes(run: RunLike) -> list[tuple[str, str]]:
    """(metrics, what they were measured on) for each kind of prompts in the ablation table."""
    table = frame(run, "verification")
    if table is None or "caption" not in table:
        return []
    spoken = table[table["caption"].notna()]
    return [
        (", ".join(dict.fromkeys(map(readable, rows["metric"]))), str(caption))
        for caption, rows in spoken.groupby("caption", sort=False)
    ]


def switching_heads(run: RunLike, count: int = 10) -> list[dict[str, str]]:
    """The heads whose first-token mass differs most between prose and code, as texts."""
    table = frame(run, "domain_contrast")
    if table is None or not {"prose", "code"} <= set(table["domain"]):
        return []
    wide = table.pivot_table(index=["layer", "head"], columns="domain", values="value").dropna()
    wide["gap"] = wide["prose"] - wide["code"]
    far = wide.sort_values("gap", key=abs, ascending=False).head(count).reset_index()
    return [
        {
            "head": head_name(int(row["layer"]), int(row["head"])),
            "prose": number(row["prose"], places=2),
            "code": number(row["code"], places=2),
            "difference": signed(row["gap"]),
        }
        for row in far.to_dict("records")
    ]
