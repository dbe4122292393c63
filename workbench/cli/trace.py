"""`workbench trace`: statistics of every head over one text, streamed, written as a run."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import options
from workbench.cli.attached import attached, default_run
from workbench.cli.heads import tell_run
from workbench.cli.progress import display
from workbench.cli.session import Command, Session, current_session
from workbench.cli.tables import plain, show_table, table
from workbench.errors import RequestError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Batch, Head
    from workbench.runs import Run, RunWriter
    from workbench.tracing import Model, Statistic, Trace

PLAIN_STATISTICS = (
    *("entropy", "lse", "max_logit", "mean_logit", "first_logit", "max_prob", "argmax", "distance", "spread"),
    *("sink_mass", "output_norm", "result_norm"),
    *("value_norm", "column_sum", "column_mean", "column_max", "diagonal"),
)
# With a number behind the name; offsets are counted backwards.
SIZED_STATISTICS = (
    *("first", "recent", "offset", "column_last", "top_k", "diagonal_last"),
    *("block_sum", "block_max"),
)
# With a probability behind the name.
BOUND_STATISTICS = ("above", "column_above")
DEFAULT_STATISTICS = "entropy,max_prob,first_1,offset_-1,distance,column_mean"


Patterns = Annotated[
    str | None,
    typer.Option(metavar="L18H6,L3H0", help="Heads whose whole pattern is stored for the dashboard's zoomable map."),
]
Chunk = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Read the text in chunks of so many tokens: less memory, the same numbers."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="trace", cls=Command)(trace)


def trace(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text.")] = None,
    file: Annotated[str | None, typer.Option(metavar="F", help="A file of UTF-8 text; - for standard input.")] = None,
    statistics: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help=f"Statistics: {', '.join(PLAIN_STATISTICS)}, first_N, recent_N, offset_-N, column_last_N, "
            "top_k_N, diagonal_last_N, block_sum_N, block_max_N, above_P, column_above_P.",
        ),
    ] = DEFAULT_STATISTICS,
    patterns: Patterns = None,
    ablate: options.Ablate = None,
    how: options.AblateHow = options.StandingName.zero,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="How many heads to name.")] = 5,
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="The statistic that ranks them. [default: the first]")
    ] = None,
    chunk: Chunk = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Measure statistics of every head on one text, in one forward pass; with --ablate, without some heads."""
    session = current_session()
    options.one_of("--prompt 'some text'", prompt, "--file notes.txt", file, "what to read")
    text = _text(prompt, file)
    stored = options.names("--patterns", patterns, "L18H6,L3H0") or ()
    removed = options.removed(ablate, how)
    if removed and stored:
        raise RequestError("--patterns keeps patterns of the model as it is; leave it out with --ablate.")
    path = out or default_run("trace", model, text, statistics, dtype, device, *stored, *removed)
    session.writes(path, overwrite=overwrite)
    with session.err.status("importing"):
        from workbench.models import Head
        from workbench.studies.without import without

        wanted = parse_statistics(statistics)
    ranked = ranking(wanted, by)
    with attached(session, model, dtype, device) as loaded:
        heads = [loaded.spec.check(Head.parse(name)) for name in stored]
        loaded = without(loaded, removed[:-1], removed[-1]) if removed else loaded
        batch = loaded.batch(text)
        _tell_prediction(session, loaded, batch, wanted, chunk)
        run = _trace(session, loaded, batch, wanted, heads, path, overwrite, chunk)
    means = run.table("statistic_means")
    if ranked is not None:
        _show_layers(session, means)
        _show_top(session, means, ranked, top)
    tell_run(session, path)
    if heads:
        session.say(f"To zoom into the stored patterns: {shlex.join(['workbench', 'serve', str(path.parent)])}")


def parse_statistics(text: str) -> list[Statistic]:
    """Statistics by name, as in `entropy,first_4,offset_-1`."""
    from workbench.tracing import statistics as library

    found: list[Statistic] = []
    for name in (part.strip() for part in text.split(",")):
        kind, _, number = name.rpartition("_")
        if name in PLAIN_STATISTICS:
            made = getattr(library, name)()
        elif kind in SIZED_STATISTICS and number.removeprefix("-").isdigit():
            made = _sized(library, name, kind, int(number))
        elif kind in BOUND_STATISTICS and re.fullmatch(r"0?\.\d+", number):
            made = getattr(library, kind)(float(number))
        else:
            sized = [f"{kind}_1" for kind in SIZED_STATISTICS]
            every = [*PLAIN_STATISTICS, *sized, *(f"{kind}_0.1" for kind in BOUND_STATISTICS)]
            near = get_close_matches(name, every, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(
                f"No statistic {name!r}.{hint} There are {', '.join(PLAIN_STATISTICS)}, and with a number "
                f"{', '.join((*SIZED_STATISTICS, *BOUND_STATISTICS))} (first_4, offset_-1, above_0.1)."
            )
        found += made if isinstance(made, tuple) else [made]
    called = [statistic.name for statistic in found]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise RequestError(f"--statistics {text}: {twice[0]!r} is asked for twice; once is enough.")
    return found


def ranking(wanted: Sequence[Statistic], by: str | None) -> str | None:
    """The statistic that heads are ranked by, the first that can if none is named; None where none can."""
    able = [statistic.name for statistic in wanted if _has_mean(statistic)]
    if by is None or by in able:
        return by or next(iter(able), None)
    first = f"one of {', '.join(able)}" if len(able) > 1 else "".join(able)
    advice = f"rank by {first}" if able else "ask for one that can, such as entropy"
    asked = {statistic.name: statistic for statistic in wanted}
    found = asked[by] if by in asked else parse_statistics(by)[0]
    if not _has_mean(found):
        held = "several numbers for each position" if found.columns is not None else f"one number a {found.axis}"
        held = "keys (which token, not how much)" if found.integer else held
        raise RequestError(f"--by {by}: this statistic holds {held}, so it cannot rank heads; {advice}.")
    raise RequestError(f"--by {by} is not among the statistics asked for; {advice}, or add {by} to --statistics.")


def _has_mean(statistic: Statistic) -> bool:
    """Whether it is one number for each position, which is not a position itself."""
    return not statistic.integer and statistic.columns is None and statistic.axis in ("query", "key")


def _sized(library: Any, name: str, kind: str, size: int) -> Any:
    if (size > 0) if kind == "offset" else (size < 1):
        raise RequestError(
            f"Statistic {name!r}: offsets go backwards, as in offset_-1 (0 is the token itself)."
            if kind == "offset"
            else f"Statistic {name!r}: the number must be 1 or more."
        )
    return getattr(library, kind)(size)


def _text(prompt: str | None, file: str | None) -> str:
    text = prompt if prompt is not None else _read(file or "")
    if not text:
        given = "--prompt ''" if file is None else f"--file {file}"
        raise RequestError(f"{given}: the text is empty, so there is nothing to trace; give at least a word.")
    return text


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"--file {file}: byte {error.start} is not UTF-8; convert it to UTF-8 first.") from error
    except OSError as error:
        raise RequestError(f"--file {file}: {error.strerror}; give a readable text file.") from error


def _tell_prediction(session: Session, model: Model, batch: Batch, wanted: list[Statistic], chunk: int | None) -> None:
    session.say(f"Tokens: {int(batch.lengths.sum())}")
    session.say(f"Memory: {model.predict_memory(batch, statistics=wanted, chunk=chunk)}")


def _trace(
    session: Session,
    model: Model,
    batch: Batch,
    wanted: list[Statistic],
    heads: Sequence[Head],
    path: Path,
    overwrite: bool,
    chunk: int | None,
) -> Run:
    from workbench.runs import RunWriter, environment
    from workbench.studies.survey import model_facts
    from workbench.studies.without import recorded

    known = model_facts(model)
    settings: dict[str, Any] = {"statistics": [statistic.name for statistic in wanted], **recorded(model)}
    if heads:
        settings["patterns"] = [str(head) for head in heads]
    policy = "tokenizer default"
    prompt = {
        "name": "text", "n": len(batch), "tokens": int(batch.mask.sum()), "sha256": batch.hash, "specials": policy,
        "caption": "One text, given on the command line.",
    }  # fmt: skip
    with RunWriter.open(
        path,
        kind="trace",
        title=f"Attention of {model.source.name} over {prompt['tokens']} tokens",
        fingerprint={"model": known, "settings": settings, "prompts": [prompt["sha256"]], "kind": "trace"},
        overwrite=overwrite,
        command=session.command,
    ) as writer:
        writer.manifest |= {
            "model": known | {"special_tokens": policy},
            "certificate": model.certificate.as_dict(),
            "environment": environment(),
            "settings": settings,
            "prompts": [prompt],
        }
        if not writer.has("trace"):
            began = time.monotonic()
            with display(session.err) as shown:
                shown.step("trace", f"{len(wanted)} statistics of {len(model.spec.heads())} heads", kept=False)
                with _progress(model, batch, chunk, shown.advance) as told:
                    found = model.trace(batch, statistics=wanted, chunk=chunk, progress=told)
            writer.array("statistics", found.dataset())
            writer.table("tokens", _tokens(model, batch))
            writer.table("statistic_means", _means(found))
            writer.done("trace", seconds=time.monotonic() - began)
        _store_patterns(session, writer, model, batch, heads, chunk)
        return writer.finish()


@contextmanager
def _progress(
    model: Model, batch: Batch, chunk: int | None, advance: Callable[[int, int], None]
) -> Iterator[Callable[[int, int], None] | None]:
    """Count chunks, or layers as they finish: a text in one piece is one forward pass, which reports nothing itself."""
    from workbench.models.architectures import locate

    if chunk is not None and int(batch.lengths.max()) > chunk:
        yield advance
        return
    layers = locate(model.attachment.hf_model)
    hooks = [
        layer.block.register_forward_hook(lambda module, args, output, done=layer.index + 1: advance(done, len(layers)))
        for layer in layers
    ]
    try:
        yield None
    finally:
        for hook in hooks:
            hook.remove()


def _store_patterns(
    session: Session, writer: RunWriter, model: Model, batch: Batch, heads: Sequence[Head], chunk: int | None
) -> None:
    """The patterns of some heads, each a step of its own."""
    from workbench.runs.patterns import pattern_name, pattern_sources, pattern_tensors, write_pattern

    missing = [head for head in heads if not writer.has(pattern_name(head))]
    if not missing:
        return
    with display(session.err) as shown:
        shown.step("patterns", "q, k and their log-sum-exp", kept=False)
        with _progress(model, batch, chunk, shown.advance) as told:
            sources = pattern_sources(model, batch, missing, chunk, told)
        for head, source in zip(missing, sources, strict=True):
            shown.step(f"pattern of {head}", "pooled blocks", kept=False)
            tensors = pattern_tensors(*source, progress=shown.advance)
            write_pattern(writer, head, tensors, source.masking, model=model.source.name)
            writer.done(pattern_name(head))


def _tokens(model: Model, batch: Batch) -> pd.DataFrame:
    import pandas as pd

    ids = batch.ids[0].tolist()
    assert model.tokenizer is not None
    texts = [model.tokenizer.decode([token]) for token in ids]
    return pd.DataFrame({"position": range(len(ids)), "token_id": ids, "text": texts})


def _means(found: Trace) -> pd.DataFrame:
    """The mean over positions of every statistic that is a number for each position and head."""
    import pandas as pd

    frames = []
    for name in found.values:
        if not _has_mean(found.statistics[name]):
            continue
        mean = found.mean(name)[0]
        rows = [(name, head.layer, head.head, float(mean[head.layer, head.head])) for head in found.spec.heads()]
        frames.append(pd.DataFrame(rows, columns=["statistic", "layer", "head", "mean"]))
    columns = ["statistic", "layer", "head", "mean"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _show_layers(session: Session, means: pd.DataFrame) -> None:
    wide = means.pivot_table(index="layer", columns="statistic", values="mean", sort=False)
    made = table(">layer", *(f">{name}" for name in wide.columns))
    for layer, row in wide.iterrows():
        made.add_row(str(layer), *(plain(value) for value in row))
    show_table(session, "Mean over positions and heads", made)


def _show_top(session: Session, means: pd.DataFrame, by: str, top: int) -> None:
    rows = means[means["statistic"] == by].sort_values("mean", ascending=False, kind="stable").head(top)
    if rows.empty:
        return
    made = table("head", f">{by}")
    for row in rows.to_dict("records"):
        made.add_row(f"L{row['layer']}H{row['head']}", plain(row["mean"]))
    show_table(session, f"Highest {by}, mean over positions", made)
