"""A survey: detectors over all heads, causal checks of their top heads, and the evidence a report shows.

Steps, each of which is kept when the next is interrupted:

1. `detect:<kind>`: one pass over the prompts of a kind, scores of its detectors, curves of the top heads.
2. `verify:<detector>`: the top k heads ablated together, against matched random heads.
3. `examples`: explicit patterns of the top heads on two short prompts, for the token view.

A `tolerant` survey notes what the model cannot be asked (text without a tokenizer, sinks that it has not) in its table
`skipped` and goes on; any other stops there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.heads import (
    DETECTORS,
    KINDS,
    Ablator,
    Claim,
    HeadScores,
    Probe,
    ProbeSettings,
    Settings,
    Verification,
    build_probe,
    involved,
    verify_sets,
)
from workbench.heads.detection import choose
from workbench.heads.detector import Array, Detector, Kind
from workbench.heads.verification import POOLS, Pool, dose_sizes
from workbench.models import Head
from workbench.runs import Run, RunWriter, environment
from workbench.runs.samples import write_samples
from workbench.studies.examples import example_tables
from workbench.studies.measuring import measure
from workbench.studies.reference import reference_ablator
from workbench.studies.without import recorded
from workbench.tasks import Task
from workbench.tracing import Model
from workbench.tracing.edits import HOWS, How, check_strength

# Detectors whose course over positions is kept of all heads; of the others, that of their top heads.
CURVES = ("first_token", "entropy", "previous_token", "induction")
VERIFIED = ("sink", "previous_token", "induction", "retrieval")


@runtime_checkable
class Reporter(Protocol):
    """Who is told how far a survey is; the command line shows bars."""

    def step(self, name: str, title: str, kept: bool) -> None:
        """A step begins, or is `kept` from an interrupted run."""

    def advance(self, done: int, total: int) -> None:
        """So far within the step."""


class Silent:
    """Tells nobody."""

    def step(self, name: str, title: str, kept: bool) -> None:
        return None

    def advance(self, done: int, total: int) -> None:
        return None


@dataclass(frozen=True)
class Step:
    """One more step of a survey: it reads what the writer holds and writes more."""

    name: str
    title: str
    run: Callable[[RunWriter], None]


@dataclass(frozen=True)
class SurveySettings:
    """What a survey does; `verify` names the detectors whose top `k` heads are ablated (none: no causal check).

    What suffers is measured by the probe that the detector's claim is about (`Detector.probe`), or by `probe` for all.
    `dose` are sizes of nested sets within the k, `single` tests each of the k alone, and the pool "score_free" keeps
    heads that the detector itself scores high out of the controls. `strength` is how much of a head is replaced.
    `examples` is the largest number of heads whose patterns are kept. A `tolerant` survey leaves out detectors that
    cannot run on the model, with their reasons. `method` is how an atlas draws its map.
    """

    detectors: tuple[str, ...] | None = None
    verify: tuple[str, ...] = VERIFIED
    k: int = 8
    how: How = "mean"
    probe: str | None = None
    draws: int = 10
    top: int = 4
    examples: int | None = None
    tolerant: bool = False
    method: str | None = None
    dose: tuple[int, ...] = ()
    single: bool = False
    pool: Pool = "all"
    strength: float = 1.0
    detection: Settings = field(default_factory=Settings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"seed": self.detection.seed}
        # Left out where it is whole, so that runs from before it was a setting go on.
        return {name: value for name, value in found.items() if name != "strength" or value != 1}

    def probe_of(self, name: str) -> str:
        """The probe that tests a detector's claim."""
        found = self.probe or DETECTORS[name].probe
        if found is None:
            able = ", ".join(other for other, detector in DETECTORS.items() if detector.probe)
            raise RequestError(
                f"Detector {name!r} only describes heads, so that nothing tests it; name a probe, or one of {able}."
            )
        return found

    def check(self, heads: int) -> list[Detector]:
        """The detectors, once everything fits a model with so many heads; nothing has to run for that."""
        chosen = choose(self.detectors)
        names = {detector.name for detector in chosen}
        for name in self.verify:
            if name not in names:
                known = ", ".join(sorted(names))
                raise RequestError(f"verify names {name!r}, which is not among the detectors {known}.")
            self.probe_of(name)
        if self.how not in HOWS:
            raise RequestError(f"how={self.how!r} is no ablation; choose one of {', '.join(HOWS)}.")
        if self.k < 1 or self.top < 1:
            raise RequestError(f"k={self.k}, top={self.top}: name at least one head.")
        check_strength(self.strength)
        if self.pool not in POOLS:
            raise RequestError(f"pool={self.pool!r}: controls come from one of {', '.join(POOLS)}.")
        dose_sizes(self.k, self.dose)
        if self.verify and 2 * self.k > heads:
            raise RequestError(f"k={self.k} of {heads} heads leave too few others to compare with; ask for fewer.")
        return chosen


def survey(
    model: Model,
    path: str | Path,
    *,
    settings: SurveySettings | None = None,
    kind: str = "heads",
    title: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
    then: Sequence[Step] = (),
) -> Run:
    """Run detectors and causal checks on a model into a run at `path`; continues one that was interrupted.

    Steps that `then` adds come last, and see what the others have written. Raises `RunError` if `path` holds a run
    already (unless `overwrite`) or part of one with other settings.
    """
    settings = settings or SurveySettings()
    chosen = settings.check(len(model.spec.heads()))
    asked = settings.as_dict() | recorded(model)
    fingerprint = {"model": model_facts(model), "settings": asked, "kind": kind}
    title = title or f"Attention heads of {model.source.name}"
    with RunWriter.open(
        path, kind=kind, title=title, fingerprint=fingerprint, overwrite=overwrite, command=command
    ) as writer:
        work = _Survey(model, settings, chosen, writer, reporter or Silent())
        work.describe()
        for of_kind in KINDS.values():
            work.detect(of_kind)
        work.check_any()
        for name in settings.verify:
            work.verify(name)
        work.examples()
        for step in then:
            work.add(step)
        return work.finish()


def model_facts(model: Model) -> dict[str, Any]:
    """What a manifest says of the model: enough to know its weights again."""
    spec, host = model.spec, model.attachment.host
    first = spec.layers[0]
    facts = {
        "name": model.source.name,
        "architecture": spec.architecture,
        "revision": model.source.revision,
        "weights_sha256": model.source.weights_sha256,
        "license": model.source.license,
        "dtype": str(model.attachment.dtype).removeprefix("torch."),
        "device": model.device.type,
        "layers": spec.n_layers,
        "heads": max(layer.heads for layer in spec.layers),
        "kv_heads": first.kv_heads,
        "head_dim": first.head_dim,
        "d_model": spec.d_model,
        "vocab_size": spec.vocab_size,
        "parameters": sum(parameter.numel() for _, parameter in host.parameters()),
    }
    return facts if model.adapter == "native" else facts | {"adapter": model.adapter}


@dataclass
class _Survey:
    """The steps of one survey; what a resumed run no longer holds in memory is read back from its parts."""

    model: Model
    settings: SurveySettings
    detectors: list[Detector]
    writer: RunWriter
    reporter: Reporter
    _probes: dict[str, tuple[Probe, dict[str, Array]]] = field(default_factory=dict)
    _ablator: Ablator | None = None

    def describe(self) -> None:
        manifest = self.writer.manifest
        # What is known of the prompts' special tokens stays when a run is taken up again.
        manifest["model"] = {**manifest.get("model", {}), **model_facts(self.model)}
        manifest["certificate"] = self.model.certificate.as_dict()
        manifest["environment"] = environment()
        manifest["settings"] = self.settings.as_dict() | recorded(self.model)
        manifest.setdefault("tops", {})
        manifest.setdefault("skipped", [])
        manifest.setdefault("involved", {})
        manifest.setdefault("verified_single", [])
        manifest.setdefault("verified", [])

    def detect(self, kind: Kind) -> None:
        detectors = [detector for detector in self.detectors if detector.kind == kind.name]
        if not detectors:
            return
        name = f"detect:{kind.name}"
        titles = ", ".join(detector.title.lower() for detector in detectors)
        if not self._begin(name, titles):
            return
        began = time.monotonic()
        found = measure(
            self.model, kind, detectors, self.settings.detection, tolerant=self.settings.tolerant,
            progress=self.reporter.advance,
        )  # fmt: skip
        self.writer.manifest["skipped"] += found.skipped
        if found.detectors:
            self._record_prompts(found.tasks)
            joined = HeadScores.join(found.scores)
            self._write_scores(kind.name, joined, found.detectors)
            write_samples(self.writer, kind.name, joined.samples, found.tasks)
        self.writer.done(name, seconds=time.monotonic() - began)

    def check_any(self) -> None:
        """Refuse to go on with nothing."""
        if not self.writer.manifest["tops"]:
            reasons = dict.fromkeys(row["reason"] for row in self.writer.manifest["skipped"])
            raise RequestError(f"No detector can run on {self.model.source.name}: {' '.join(reasons)}")

    def add(self, step: Step) -> None:
        if self._begin(step.name, step.title):
            began = time.monotonic()
            step.run(self.writer)
            self.writer.done(step.name, seconds=time.monotonic() - began)

    def _write_scores(self, kind: str, found: HeadScores, detectors: list[Detector]) -> None:
        self.writer.table(f"head_scores/{kind}", found.table)
        self.writer.table(f"detectors/{kind}", found.detectors)
        for detector in detectors:
            best = found.top(detector.name, max(self.settings.k, self.settings.top))
            self.writer.manifest["tops"][detector.name] = [str(head) for head in best]
            if self.settings.pool == "score_free" and detector.name in self.settings.verify:
                self.writer.manifest["involved"][detector.name] = sorted(map(str, involved(found, detector.name)))
        shown = {head for d in detectors for head in self._top(d.name, self.settings.top)}
        if len(found.curves):
            keep = np.array(
                [Head(row.layer, row.head) in shown for row in found.curves[["layer", "head"]].itertuples(index=False)]
            )
            self.writer.table(f"position_curves/{kind}", found.curves[keep])
            rest = found.curves[~keep & found.curves["detector"].isin(CURVES).to_numpy()]
            if len(rest):
                self.writer.table(f"other_curves/{kind}", rest.astype({"value": "float32"}))
        if len(found.domains):
            once = found.domains.drop_duplicates(["layer", "head", "domain"])
            self.writer.table(f"domain_contrast/{kind}", once)

    def verify(self, name: str) -> None:
        step = f"verify:{name}"
        heads = self._top(name, self.settings.k)
        if not self._begin(step, f"{len(heads)} heads against {self.settings.draws} matched random sets"):
            return
        began = time.monotonic()
        probe, baseline = self._probe(self.settings.probe_of(name))
        found = verify_sets(
            self.model, Claim(name, tuple(heads), probe), self._ablate(probe), dose=self.settings.dose,
            single=self.settings.single, draws=self.settings.draws, seed=self.settings.probes.seed, baseline=baseline,
            excluded=[Head.parse(text) for text in self.writer.manifest["involved"].get(name, ())],
            progress=self.reporter.advance,
        )  # fmt: skip
        self._write_verification(name, found)
        self.writer.done(step, seconds=time.monotonic() - began)

    def _write_verification(self, name: str, found: Verification) -> None:
        # The table itself is written at the end: its q-values are over the whole family of tests.
        self.writer.manifest["verified"] += found.table.to_dict("records")
        self.writer.table(f"verification_draws/{name}", found.draws)
        if len(found.single):
            self.writer.manifest["verified_single"] += found.single.to_dict("records")
            self.writer.table(f"verification_single_draws/{name}", found.single_draws)

    def examples(self) -> None:
        if not self._begin("examples", "patterns of the top heads on short prompts"):
            return
        began = time.monotonic()
        tokens, info, patterns = example_tables(self.model, self._shown())
        self.writer.table("example_tokens", tokens)
        self.writer.table("example_info", info)
        self.writer.array("patterns", patterns)
        self.writer.done("examples", seconds=time.monotonic() - began)

    def _shown(self) -> list[Head]:
        """The top heads; where there are too many, those that are at the top of most detectors."""
        leading = [self._top(d.name, self.settings.top) for d in self.detectors]
        counts = Counter(head for heads in leading for head in heads)
        return sorted(sorted(counts, key=lambda head: (-counts[head], head))[: self.settings.examples])

    def finish(self) -> Run:
        rows = pd.DataFrame(self.writer.manifest.pop("verified"))
        self.writer.manifest.pop("tops")
        skipped = self.writer.manifest.pop("skipped")
        if skipped:
            self.writer.table("skipped", pd.DataFrame(skipped))
        single = pd.DataFrame(self.writer.manifest.pop("verified_single"))
        self.writer.manifest.pop("involved")
        if len(rows):
            found = Verification(rows, rows.head(0), single).family()
            self.writer.table("verification", found.table)
            if len(single):
                self.writer.table("verification_single", found.single)
        return self.writer.finish()

    def _begin(self, name: str, title: str) -> bool:
        """Tell the reporter; False if the step is done already."""
        kept = self.writer.has(name)
        self.reporter.step(name, title, kept)
        return not kept

    def _top(self, name: str, k: int) -> list[Head]:
        return [Head.parse(text) for text in self.writer.manifest["tops"].get(name, ())][:k]

    def _probe(self, name: str) -> tuple[Probe, dict[str, Array]]:
        if name not in self._probes:
            probe = build_probe(name, self.model, self.settings.probes)
            self._record_prompts(probe.tasks)
            self._probes[name] = (probe, probe.measure(self.model))
        return self._probes[name]

    def _ablate(self, probe: Probe) -> Ablator:
        """The form of ablation with its values; only resampled ones depend on the probe."""
        if self.settings.how == "resample":
            return reference_ablator(self.model, "resample", probe, self.settings.detection, self.settings.strength)
        if self._ablator is None:
            asked = self.settings
            self._ablator = reference_ablator(self.model, asked.how, probe, asked.detection, asked.strength)
        return self._ablator

    def _record_prompts(self, tasks: list[Task] | tuple[Task, ...]) -> None:
        known = {prompt["sha256"] for prompt in self.writer.manifest["prompts"]}
        for task in tasks:
            entry: Mapping[str, Any] = {
                "name": task.name, "n": len(task), "tokens": int(task.batch.mask.sum()), "sha256": task.hash,
                "caption": task.caption, "specials": task.specials,
            }  # fmt: skip
            if entry["sha256"] not in known:
                self.writer.manifest["prompts"].append(dict(entry))
                # The tokenizer's own policy stands first (plain text); chat templates bring theirs.
                self.writer.manifest["model"].setdefault("special_tokens", task.specials)
