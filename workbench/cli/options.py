"""Arguments and options that several commands take, declared once, and what is read out of their texts.

A command names them as annotations: `dtype: options.Dtype = None`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import RequestError

# Stated here as well, so that `--help` need not import them; a test compares.
DETECTOR_NAMES = (
    *("sink", "first_token", "entropy", "active_dormant", "previous_token", "duplicate_token", "induction"),
    *("echo", "retrieval", "copy_mass", "retrieval_greedy"),
)


class DtypeName(StrEnum):
    """Types that weights can be held in."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StandingName(StrEnum):
    """Ablations that need nothing of the prompt at hand."""

    zero = "zero"
    mean = "mean"
    uniform = "uniform"
    to_sink = "to_sink"
    q_mean = "q_mean"
    streaming = "streaming"


class AdapterName(StrEnum):
    """Libraries that a model can run in."""

    transformer_lens = "transformer-lens"
    nnsight = "nnsight"


_MODEL = typer.Argument(
    metavar="MODEL", help="smollm2-135m, a name on the hub (organisation/name), a local folder, or a GGUF file."
)
Model = Annotated[str, _MODEL]
# Of commands that only print a list where they are asked to.
MaybeModel = Annotated[str | None, _MODEL]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Type of the weights. [default: float32, bfloat16 on CUDA]")]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Device of torch, e.g. cpu or cuda:1. [default: CUDA where there is one]"),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Folder of the run. [default: runs/COMMAND-MODEL-DIGITS, by the arguments]"),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished run, drop an interrupted one that differs.")
]
Ablate = Annotated[
    str | None,
    typer.Option(metavar="L18H6,L3H0", help="Heads that the model does without, to see what the others then do."),
]
AblateHow = Annotated[StandingName, typer.Option("--how", help="What takes their place, with --ablate.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of prompts, resampling and random controls.")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Show the report in the browser.")]


def names(option: str, text: str | None, example: str) -> tuple[str, ...] | None:
    """`a,b` as a tuple, each once; None stays, and a text without any name is refused."""
    if text is None:
        return None
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise RequestError(f"{option} {text!r} names nothing; write names with commas between, as in {example}.")
    return found


def removed(ablate: str | None, how: StandingName) -> tuple[str, ...]:
    """The heads that --ablate names, then the form; nothing without --ablate."""
    heads = names("--ablate", ablate, "L18H6,L3H0")
    if heads is None and how != StandingName.zero:
        raise RequestError(
            f"--how {how.value} says what takes the place of heads; name them too, as in --ablate L18H6."
        )
    return () if heads is None else (*heads, how.value)


def one_of(first: str, a: object, second: str, b: object, purpose: str) -> None:
    """Refuse neither and both of two options that exclude each other."""
    if a is None and b is None:
        raise RequestError(f"Say {purpose}: either {first} or {second}.")
    if a is not None and b is not None:
        one, other = first.split()[0], second.split()[0]
        raise RequestError(f"Both {one} ({_short(a)}) and {other} ({_short(b)}) were given; leave one of them out.")


def _short(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
