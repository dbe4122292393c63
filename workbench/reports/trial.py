"""A trial of the ablation lab in a report: one prompt before and after, beside the ablation section of every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import Any

from markupsafe import Markup

from workbench.figures.losses import loss_lines
from workbench.figures.text import form, number, visible
from workbench.reports.source import RunLike, model_named

NAMES = {"before": "intact", "after": "ablated"}
Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Guess:
    """A token that is likely next, its probability before and after, and the change in words."""

    token: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class TrialView:
    """What the section shows; `texts` are pieces of the two continuations and whether a piece differs."""

    heads: tuple[str, ...]
    form: str
    prompt: str
    texts: dict[str, Pieces]
    guesses: list[Guess]
    study: tuple[str, str]


def trial_view(run: RunLike) -> TrialView | None:
    """The section's content; None where the run is no trial of a prompt."""
    told = run.manifest.get("trial")
    if not told:
        return None
    asked, found = told["asked"], told.get("prompt")
    return TrialView(
        tuple(map(str, asked.get("heads", ()))),
        form({"how": asked.get("how", "mean"), "strength": asked.get("strength", 1.0)}),
        str(asked.get("prompt", "")),
        {} if not found else continuations(found),
        [] if not found else guesses(found),
        (str(told["study"][0]), str(told["study"][1])),
    )


def trial_charts(run: RunLike) -> Iterator[tuple[str, str, Callable[[bool], Any]]]:
    """Losses of the prompt's tokens."""
    found = run.manifest.get("trial", {}).get("prompt")
    if found:
        yield "losses", "losses", partial(prompt_losses, found)


def prompt_losses(found: Mapping[str, Any], dark: bool = False) -> Any:
    """The figure of a trial's losses."""
    losses = {name: found[key]["loss"] for key, name in NAMES.items()}
    return loss_lines([str(token) for token in found["tokens"]], losses, dark=dark)


def continuations(found: Mapping[str, Any]) -> dict[str, Pieces]:
    """What was written before and after, in pieces that are shared or differ."""
    before, after = (list(map(str, found[name]["new"])) for name in NAMES)
    pieces: dict[str, Pieces] = {"before": [], "after": []}
    for what, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for name, tokens in (("before", before[a:b]), ("after", after[c:d])):
            if tokens:
                pieces[name].append(("".join(tokens), what != "equal"))
    return pieces


def guesses(found: Mapping[str, Any]) -> list[Guess]:
    """The likeliest next tokens of the intact model, then those that only the ablated one ranks so high."""
    before, after = found["before"]["next"], found["after"]["next"]
    later = {one["id"]: one["p"] for one in after}
    rows = [_guess(one["token"], one["p"], p) for one, p in zip(before, found["after"]["of_before"], strict=True)]
    known = {one["id"] for one in before}
    # How likely these were before is known to be below the last of the first list alone.
    rows += [
        Guess(visible(str(one["token"]))[:60], f"< {number(before[-1]['p'], 3)}", number(later[one["id"]], 3), "new")
        for one in after
        if one["id"] not in known
    ]
    return rows


def trial_summary(run: RunLike) -> Markup:
    """What happened to the prompt, in a sentence."""
    told = run.manifest["trial"]
    asked, found = told["asked"], told["prompt"]
    heads = tuple(map(str, asked.get("heads", ())))
    means = {key: _mean(found[key]["loss"]) for key in NAMES}
    first = [found[key]["next"][0] for key in NAMES]
    same = first[0]["id"] == first[1]["id"]
    return Markup(
        "In {}, {} ({} ablation): the mean loss of the prompt's tokens went from {} to {} nats, and the likeliest next "
        "token {}. One prompt shows what can happen; a probe with matched random heads tests it."
    ).format(
        model_named(run),
        f"{plain_heads(heads)} {'was' if len(heads) == 1 else 'were'} ablated",
        form({"how": asked.get("how", "mean"), "strength": asked.get("strength", 1.0)}),
        number(means["before"], 3),
        number(means["after"], 3),
        f"stayed {visible(str(first[0]['token']))!r}"
        if same
        else f"changed from {visible(str(first[0]['token']))!r} to {visible(str(first[1]['token']))!r}",
    )


def _mean(losses: Sequence[float | None]) -> float:
    known = [one for one in losses if one is not None]
    return sum(known) / len(known) if known else float("nan")


def _guess(token: object, before: float, after: float) -> Guess:
    change = after - before
    sign = "−" if change < 0 else "+"
    told = "0" if abs(change) < 5e-4 else f"{sign}{abs(change):.3f}"
    return Guess(visible(str(token))[:60], number(before, 3), number(after, 3), told)


def plain_heads(heads: Sequence[str], most: int = 12) -> str:
    """Some heads by name, and how many more there are."""
    shown = ", ".join(heads[:most])
    return shown if len(heads) <= most else f"{shown} and {len(heads) - most} more"
