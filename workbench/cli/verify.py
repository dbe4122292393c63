"""`workbench verify`: ablate heads and compare with matched random heads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.attached import attached, default_run
from workbench.cli.heads import surveyed, tell_run
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.cli.tables import show_findings
from workbench.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.heads import Probe
    from workbench.models import Head
    from workbench.runs import Run
    from workbench.studies import SurveySettings
    from workbench.tracing import Model

# Prompts of probes are never those that found the heads.
PROBE_SEED = 1000


class ProbeName(StrEnum):
    """What is measured before and after."""

    induction = "induction"
    needle = "needle"
    answer = "answer"
    json = "json"
    held_out = "held_out"
    perplexity = "perplexity"


class PhaseName(StrEnum):
    """When heads are ablated, where a probe asks for an answer."""

    both = "both"
    prefill = "prefill"
    decode = "decode"


class PoolName(StrEnum):
    """Which heads the random controls are drawn from."""

    all = "all"
    score_free = "score_free"


class HowName(StrEnum):
    """What takes the place of a head's output."""

    mean = "mean"
    zero = "zero"
    resample = "resample"
    uniform = "uniform"
    to_sink = "to_sink"
    q_mean = "q_mean"
    frozen_zero = "frozen_zero"
    streaming = "streaming"


Strength = Annotated[
    float, typer.Option(metavar="S", min=0, max=1, help="How much of a head's output is replaced, from 0 to 1.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="verify", cls=Command)(verify)


def verify(
    model: options.Model,
    heads: Annotated[str | None, typer.Option(metavar="L18H6,L17H3", help="The heads to ablate together.")] = None,
    detector: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Ablate the top heads of a detector: {', '.join(options.DETECTOR_NAMES)}."),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many heads, with --detector. [default: 8, or the largest dose]"),
    ] = None,
    probe: Annotated[
        ProbeName | None,
        typer.Option(help="What to measure. [default: what the detector's claim is about, or induction]"),
    ] = None,
    how: Annotated[HowName, typer.Option(help="What takes the place of a head's output.")] = HowName.mean,
    strength: Strength = 1.0,
    draws: Annotated[int, typer.Option(metavar="N", min=10, help="Random sets of heads to compare with.")] = 10,
    dose: Annotated[
        str | None,
        typer.Option(metavar="1,2,4,8", help="Also the first so many of the heads, each set with its own controls."),
    ] = None,
    single: Annotated[bool, typer.Option("--single", help="Also each head alone.")] = False,
    phase: Annotated[
        PhaseName, typer.Option(help="Ablate while the prompt is read, while the answer is written, or in both.")
    ] = PhaseName.both,
    pool: Annotated[
        PoolName, typer.Option(help="Draw controls from all other heads, or from those that the detector scores low.")
    ] = PoolName.all,
    seed: options.Seed = 0,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Ablate heads and measure a task, against matched random heads."""
    session = current_session()
    options.one_of("--heads L18H6,L17H3", heads, "--detector induction", detector, "what to ablate")
    named = options.names("--heads", heads, "L18H6,L17H3") or ()
    asking = Asking(_sizes(dose), single, phase.value, pool.value, strength)
    k = (max(asking.dose, default=0) or 8) if k is None else k
    more = () if asking == Asking() else (asking,)
    path = out or default_run("verify", model, heads, detector, k, probe, how.value, draws, seed, dtype, device, *more)
    session.writes(path, overwrite=overwrite)
    with session.err.status("importing"):
        session.silence_transformers()
        chosen = _parsed(named)
        settings = None if detector is None else _settings(detector, k, probe, how, draws, seed, asking)
        _check_fit(model, chosen, settings, asking)
    with attached(session, model, dtype, device) as loaded:
        if settings is not None:
            run = surveyed(session, loaded, path, settings, "verify", overwrite)
        else:
            asked = {
                "heads": [str(head) for head in chosen], "probe": (probe or ProbeName.induction).value,
                "how": how.value, "draws": draws, "seed": seed, **asking.stated(),
            }  # fmt: skip
            run = _verify_heads(session, loaded, path, asked, overwrite)
    show_findings(session, run)
    tell_run(session, path)


@dataclass(frozen=True)
class Asking:
    """The questions beyond the effect of one set; the defaults ask none."""

    dose: tuple[int, ...] = ()
    single: bool = False
    phase: str = "both"
    pool: str = "all"
    strength: float = 1.0

    def check(self, heads: int) -> None:
        """Refuse what heads chosen by hand cannot answer."""
        from workbench.heads.verification import dose_sizes

        if self.pool != "all":
            raise RequestError(
                f"--pool {self.pool} keeps out heads that a detector scores high; name it with --detector, or leave "
                "--pool out."
            )
        dose_sizes(heads, self.dose)

    def stated(self) -> dict[str, Any]:
        """What is asked, for the run's settings; nothing where nothing is."""
        told: dict[str, Any] = {"dose": list(self.dose), "single": self.single, "phase": self.phase}
        return {} if self == Asking() else told | ({} if self.strength == 1 else {"strength": self.strength})


def _sizes(dose: str | None) -> tuple[int, ...]:
    named = options.names("--dose", dose, "1,2,4,8") or ()
    wrong = [text for text in named if not text.isdecimal() or int(text) < 1]
    if wrong:
        raise RequestError(f"--dose {dose!r}: {wrong[0]!r} is no number of heads; write it as in 1,2,4,8.")
    return tuple(sorted({int(text) for text in named}))


def _parsed(named: Sequence[str]) -> list[Head]:
    from workbench.models import Head

    return list(dict.fromkeys(Head.parse(text) for text in named))


def _check_fit(model: str, chosen: Sequence[Head], settings: SurveySettings | None, asking: Asking) -> None:
    """Refuse questions that given heads cannot answer, and, before weights are read, heads that the model lacks (where
    its config.json is at hand)."""
    from workbench.heads.verification import check_heads
    from workbench.models.loading import stated_heads

    if settings is None:
        asking.check(len(chosen))
    layers = stated_heads(model)
    if layers is None:
        return
    if settings is not None:
        settings.check(sum(layers))
    else:
        check_heads(layers, chosen)


def _settings(
    detector: str, k: int, probe: ProbeName | None, how: HowName, draws: int, seed: int, asking: Asking
) -> SurveySettings:
    """A survey of one detector and the test of its claim."""
    from workbench.heads import ProbeSettings, Settings
    from workbench.heads.detection import choose
    from workbench.heads.probes import check_phase
    from workbench.heads.verification import dose_sizes
    from workbench.studies import SurveySettings

    choose([detector])
    found = SurveySettings(
        detectors=(detector,),
        verify=(detector,),
        k=k,
        how=how.value,
        draws=draws,
        detection=Settings(seed=seed),
        probes=ProbeSettings(seed=PROBE_SEED + seed, phase=PhaseName(asking.phase).value),
        probe=None if probe is None else probe.value,
        dose=asking.dose,
        single=asking.single,
        pool=PoolName(asking.pool).value,
        strength=asking.strength,
    )
    dose_sizes(k, asking.dose)
    check_phase(found.probe_of(detector), found.probes.phase)
    return found


def _verify_heads(session: Session, model: Model, path: Path, asked: dict[str, Any], overwrite: bool) -> Run:
    """Test a given set of heads; the run holds the table and the random draws."""
    from workbench.heads import ProbeSettings, build_probe
    from workbench.heads import verify as verify_heads
    from workbench.heads.verification import check_heads
    from workbench.models import Head
    from workbench.runs import RunWriter, environment
    from workbench.studies.survey import model_facts

    chosen = [Head.parse(text) for text in asked["heads"]]
    check_heads([layer.heads for layer in model.spec.layers], chosen)
    with display(session.err, 2) as shown:
        shown.step("prompts", f"of the probe {asked['probe']}", kept=False)
        phase = asked.get("phase", "both")
        probe = build_probe(asked["probe"], model, ProbeSettings(seed=PROBE_SEED + asked["seed"], phase=phase))
        facts = model_facts(model)
        with RunWriter.open(
            path,
            kind="verify",
            title=f"Ablation of {', '.join(asked['heads'])} in {model.source.name}",
            fingerprint={"model": facts, "settings": asked, "kind": "verify"},
            overwrite=overwrite,
            command=session.command,
        ) as writer:
            writer.manifest |= {
                "model": facts | {"special_tokens": probe.tasks[0].specials},
                "certificate": model.certificate.as_dict(),
                "environment": environment(),
                "settings": asked,
                "prompts": _prompts(probe),
            }
            shown.step("verify", f"{len(chosen)} heads against {asked['draws']} matched random sets", kept=False)
            began = time.monotonic()
            found = verify_heads(
                model, chosen, probe=probe, how=asked["how"], strength=asked.get("strength", 1.0),
                draws=asked["draws"], seed=asked["seed"], dose=asked.get("dose", ()),
                single=asked.get("single", False), progress=shown.advance,
            )  # fmt: skip
            writer.table("verification", found.table)
            writer.table("verification_draws", found.draws)
            if len(found.single):
                writer.table("verification_single", found.single)
                writer.table("verification_single_draws", found.single_draws)
            writer.done("verify", seconds=time.monotonic() - began)
            return writer.finish()


def _prompts(probe: Probe) -> list[dict[str, Any]]:
    return [
        {
            "name": task.name,
            "n": len(task),
            "tokens": int(task.batch.mask.sum()),
            "sha256": task.hash,
            "caption": task.caption,
            "specials": task.specials,
        }
        for task in probe.tasks
    ]
