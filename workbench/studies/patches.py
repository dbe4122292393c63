"""Activation and path patching of a task as a run: one step a site and direction, each kept when the next is cut off.

1. `baseline`: every pair as it is (table `pairs`; `positions` where all pairs have one shape).
2. `patch:<site>:<direction>`, or `paths:<direction>`: table `effects` (one row a place and direction, with interval, p
   and q) and `prompt_effects` (the metric of every prompt under every patch).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from workbench.circuits import PATCH_SITES, Effects, Options, Spot, patch_activations, patch_paths, spot
from workbench.circuits.effects import DIRECTIONS, Direction
from workbench.circuits.patching import longest
from workbench.circuits.paths import Form
from workbench.circuits.spots import BYS, RESIDUAL
from workbench.errors import HeadError, RequestError
from workbench.models import Head, Spec
from workbench.runs import Run, RunWriter
from workbench.studies.pairs import baseline, describe
from workbench.studies.survey import Reporter, Silent, model_facts
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

KIND = "patch"
_RECEIVER = re.compile(r"(L\d+(?:H\d+|KV\d+))\.([qkv])")
_POSITIONED = ("position", "head_position", "key")
Receivers = Literal["logits"] | tuple[Spot, ...]


@dataclass(frozen=True)
class PatchSettings:
    """What is patched.

    `sites` and `by` are those of `patch_activations`; `positions` are numbers or roles of the task (None: its roles
    where prompts differ in shape, all tokens elsewhere). With `receivers` ("logits", or L9H6.q, L5KV1.v, L5.mlp) paths
    are patched instead, from every head and MLP that comes before, in the given `form`, to all of them or to each
    `apart`.
    """

    sites: tuple[str, ...] = ("z",)
    by: str = "head"
    direction: Direction | Literal["both"] = "both"
    metric: str | None = None
    positions: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    receivers: tuple[str, ...] = ()
    form: Form = "wang"
    apart: bool = False
    memory_limit: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what no model can be asked."""
        if self.direction not in ("both", *DIRECTIONS):
            raise RequestError(f"direction={self.direction!r}: choose both, denoising or noising.")
        if self.receivers:
            receivers(self.receivers)
            if self.form not in get_args(Form):
                raise RequestError(f"form={self.form!r} is no form of path patching; choose 'strict' or 'wang'.")
            return
        if self.by not in BYS:
            raise RequestError(f"by={self.by!r} is no axis of a scan; choose from {', '.join(BYS)}.")
        if not self.sites:
            raise RequestError(f"Name at least one site: {', '.join(PATCH_SITES)}.")
        for site in self.sites:
            if site not in PATCH_SITES:
                raise RequestError(f"{site!r} cannot be patched; choose from {', '.join(PATCH_SITES)}.")
            if site in RESIDUAL and self.by not in ("layer", "position"):
                raise RequestError(f"by={self.by!r} at {site}: the residual stream has no heads; choose position.")
        if self.by == "key" and self.sites != ("pattern",):
            raise RequestError("by='key' scans entries of patterns; choose the site pattern alone.")
        if self.positions is not None:
            self._check_positions()

    def _check_positions(self) -> None:
        """Refuse positions where none are scanned, and roles where only numbers will do."""
        assert self.positions is not None
        if self.by not in _POSITIONED:
            other = "position" if RESIDUAL & set(self.sites) else "head_position"
            raise RequestError(
                f"--positions {','.join(self.positions)} has no meaning with --by {self.by}, which patches all tokens "
                f"together; add --by {other}."
            )
        roles = [one for one in self.positions if not one.isdecimal()]
        if self.by == "key" and roles and self.positions != ("all",):
            raise RequestError(f"--by key takes positions as numbers, and {roles[0]!r} is none.")

    def check_fit(self, heads: Sequence[int]) -> None:
        """Refuse layers and heads that a model lacks; `heads` is how many query heads each layer has."""
        named = receivers(self.receivers) if self.receivers else ()
        spots = () if isinstance(named, str) else named
        for layer in (*(self.layers or ()), *(one.layer for one in spots)):
            if layer >= len(heads):
                raise RequestError(f"Layer {layer} does not exist: layers run from 0 to {len(heads) - 1}.")
        for one in spots:
            if one.site == "q" and one.head is not None and one.head >= heads[one.layer]:
                raise HeadError(
                    f"{one.node} does not exist: heads of layer {one.layer} run from 0 to {heads[one.layer] - 1}."
                )

    def check_model(self, spec: Spec) -> None:
        """The same of an attached model, key/value heads as well."""
        self.check_fit([layer.heads for layer in spec.layers])
        named = receivers(self.receivers) if self.receivers else ()
        for one in () if isinstance(named, str) else named:
            one.check(spec)

    def check_places(self, task: PairTask) -> None:
        """Refuse positions that no prompt has, and roles that the task does not have."""
        if self.receivers or self.positions in (None, ("all",)):
            return
        assert self.positions is not None
        last = longest(task) - 1
        for one in self.positions:
            if one.isdecimal() and int(one) > last:
                raise RequestError(
                    f"No prompt has position {one}: positions of the longest prompt run from 0 to {last}, the token "
                    "that is read."
                )
            if not one.isdecimal() and one not in task.roles:
                listed = ", ".join(task.roles) or "none"
                raise RequestError(
                    f"{task.name} has no role {one!r}; its roles are {listed}. Positions are also numbers, from 0 to "
                    f"{last}, or all."
                )

    def stated(self, task: PairTask) -> dict[str, Any]:
        """The settings for a manifest: JSON values, and the prompts' seed."""
        idle = ("sites", "by", "positions") if self.receivers else ("form", "apart")
        told = {name: value for name, value in asdict(self).items() if value not in (None, ()) and name not in idle}
        return told | {
            "task": task.name,
            "pairs": len(task),
        }

    @property
    def directions(self) -> tuple[Direction, ...]:
        return DIRECTIONS if self.direction == "both" else (self.direction,)


def receivers(names: tuple[str, ...]) -> Receivers:
    """`("logits",)`, or spots: `L9H6.q`, `L5KV1.k`, `L5KV1.v`, `L5.mlp`."""
    if names == ("logits",):
        return "logits"
    found = []
    for name in names:
        match = _RECEIVER.fullmatch(name.strip())
        if match is not None:
            found.append(spot(match[1], match[2]))  # type: ignore[arg-type]
        elif name.strip().endswith(".mlp"):
            found.append(spot(name))
        else:
            raise RequestError(
                f"{name!r} is no receiver; write logits, or inputs as in L9H6.q, L5KV1.k, L5KV1.v, L5.mlp."
            )
    return tuple(found)


def count_steps(settings: PatchSettings) -> int:
    """Steps that a run will tell its reporter of."""
    return 1 + len(settings.directions) * (1 if settings.receivers else len(settings.sites))


def patch_run(
    model: Model,
    task: PairTask,
    path: str | Path,
    *,
    settings: PatchSettings | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
) -> Run:
    """Patch a task in a model into a run of kind `patch` at `path`; continues one that was interrupted."""
    settings = settings or PatchSettings()
    settings.check()
    settings.check_model(model.spec)
    settings.check_places(task)
    work = _Patches(model, task, settings, reporter or Silent())
    stated = settings.stated(task)
    with RunWriter.open(
        path, kind=KIND, title=work.title, overwrite=overwrite, command=command,
        fingerprint={"model": model_facts(model), "settings": stated, "pairs": task.hash, "kind": KIND},
    ) as writer:  # fmt: skip
        describe(writer, model, task, stated)
        writer.manifest["circuits"] |= work.about()
        baseline(model, task, writer, work.reporter, settings.metric)
        for name, title, made in work.steps():
            work.step(writer, name, title, made)
        return writer.finish()


@dataclass
class _Patches:
    """The steps of one patching run."""

    model: Model
    task: PairTask
    settings: PatchSettings
    reporter: Reporter

    @property
    def title(self) -> str:
        what = f"paths to {', '.join(self.settings.receivers)}" if self.settings.receivers else (
            f"{', '.join(self.settings.sites)} by {self.settings.by.replace('_', ' and ')}"
        )  # fmt: skip
        return f"Patching {self.task.name} in {self.model.source.name}: {what}"

    def about(self) -> dict[str, Any]:
        known: dict[str, Any] = {"what": "patch", "directions": list(self.settings.directions)}
        if self.settings.receivers:
            form = {"form": self.settings.form, "receivers": list(self.settings.receivers)}
            return known | form | {"apart": self.settings.apart, "ablation": "the other run of the pair"}
        return known | {
            "sites": list(self.settings.sites), "by": self.settings.by, "ablation": "the other run of the pair",
        }  # fmt: skip

    def steps(self) -> list[tuple[str, str, Callable[[], Effects]]]:
        """Name, title and what makes the effects."""
        found: list[tuple[str, str, Callable[[], Effects]]] = []
        for direction in self.settings.directions:
            if self.settings.receivers:
                found.append((f"paths:{direction}", self._paths_title(), partial(self._paths, direction)))
                continue
            for site in self.settings.sites:
                title = f"{site} by {self.settings.by.replace('_', ' and ')}"
                found.append((f"patch:{site}:{direction}", title, partial(self._patches, site, direction)))
        return found

    def step(self, writer: RunWriter, name: str, title: str, made: Callable[[], Effects]) -> None:
        kept = writer.has(name)
        self.reporter.step(name, title, kept)
        if kept:
            return
        began = time.monotonic()
        effects = made()
        part = name.replace(":", "-")
        writer.table(f"effects/{part}", self._placed(effects.table()))
        writer.table(f"prompt_effects/{part}", self._placed(effects.per_prompt()))
        about = writer.manifest["circuits"]
        about.setdefault("route", {})[name] = effects.route
        work = about.setdefault("work", {"rows": 0, "naive_rows": 0, "runs": 0, "unchanged": 0})
        for count in work:
            work[count] += getattr(effects.work, count)
        if effects.refusal:
            about["refusal"] = effects.refusal
        writer.done(name, seconds=time.monotonic() - began)

    def _patches(self, site: str, direction: Direction) -> Effects:
        return patch_activations(
            self.model, self.task, site, self.settings.by, direction=direction, metric=self.settings.metric,  # type: ignore[arg-type]
            layers=self.settings.layers, positions=self.positions(), options=self._options(),
            progress=self.reporter.advance,
        )  # fmt: skip

    def positions(self) -> list[int | str] | None:
        """Which positions are scanned: those named, the task's roles where its prompts differ in shape, else all."""
        if self.settings.by not in _POSITIONED:
            return None
        given = self.settings.positions
        if given is not None and given != ("all",):
            return [int(one) if one.isdecimal() else one for one in given]
        several = len(set(self.task.groups.tolist())) > 1
        return list(self.task.roles) if given is None and several and self.settings.by != "key" else None

    def _paths(self, direction: Direction) -> Effects:
        return patch_paths(
            self.model, self.task, self.senders(), receivers(self.settings.receivers), form=self.settings.form,
            apart=self.settings.apart, direction=direction, metric=self.settings.metric, options=self._options(),
            progress=self.reporter.advance,
        )  # fmt: skip

    def senders(self) -> list[str]:
        """Heads and MLPs that come before the last receiver, layer by layer."""
        spec, found = self.model.spec, receivers(self.settings.receivers)
        names: list[str] = []
        for layer in range(spec.n_layers):
            if not isinstance(found, str) and layer > max(one.layer for one in found):
                break
            if self.settings.layers is not None and layer not in self.settings.layers:
                continue
            names += [str(Head(layer, head)) for head in range(spec.layers[layer].heads)]
            if self.model.attachment.layers[layer].mlp_write is not None:
                names.append(f"L{layer}.mlp")
        if not names:
            raise RequestError(f"No head or MLP comes before {', '.join(self.settings.receivers)}.")
        return names

    def _paths_title(self) -> str:
        return f"{self.settings.form} paths from {len(self.senders())} senders to {', '.join(self.settings.receivers)}"

    def _options(self) -> Options:
        return Options(seed=self.settings.seed, memory_limit=self.settings.memory_limit)

    def _placed(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The table with text positions; of paths, places are those of the sender."""
        frame = frame.assign(position=frame["position"].astype("string"), key=frame["key"].astype("string"))
        if not self.settings.receivers:
            return frame
        ends = frame["node"].str.split(" -> ", n=1, expand=True)
        places = {name: spot(name) for name in ends[0].unique()}
        return frame.assign(
            node=ends[0],
            receiver=ends[1],
            site=[places[name].site for name in ends[0]],
            layer=pd.array([places[name].layer for name in ends[0]], dtype="Int64"),
            head=pd.array([places[name].head for name in ends[0]], dtype="Int64"),
        )
