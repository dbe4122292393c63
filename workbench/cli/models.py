"""`workbench models`: what can be attached, and the proof for one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import options
from workbench.cli.attached import attached
from workbench.cli.session import Command, Session, current_session
from workbench.cli.tables import show_certificate, show_facts, show_table, table

if TYPE_CHECKING:
    from workbench.tracing import Model

LENGTHS = (512, 2048, 8192, 32768, 131072)

app = typer.Typer(no_args_is_help=True, help="What can be attached, and the certificate of a model.")


@app.command(name="check", cls=Command)
def check(
    model: options.Model,
    dtype: options.Dtype = None,
    device: options.Device = None,
    tokens: Annotated[
        str, typer.Option(metavar="N,M", help="Lengths to predict the memory of a trace for.")
    ] = ",".join(map(str, LENGTHS)),
) -> None:
    """Attach a model and print its certificate (exit code 2: refused)."""
    session = current_session()
    lengths = _lengths(tokens)
    with attached(session, model, dtype, device) as loaded:
        _show_spec(session, loaded)
        show_certificate(session, loaded.certificate.as_dict())
        _show_memory(session, loaded, lengths)


@app.command(name="list", cls=Command)
def show_list() -> None:
    """Print the supported architectures and the built-in models."""
    session = current_session()
    with session.err.status("importing"):
        from workbench.models.architectures import ARCHITECTURES
        from workbench.models.loading import BUILTIN
    made = table("type", "window", "softcap", "learned sinks", "positions")
    for name, row in sorted(ARCHITECTURES.items()):
        made.add_row(
            name,
            *("yes" if value else "" for value in (row.window, row.softcap, row.sinks)),
            "rotary" if row.rotary else "learned",
        )
    show_table(session, "Architectures (model_type in config.json)", made)
    built_in = table("name", "licence")
    for name, (_, licence) in BUILTIN.items():
        built_in.add_row(name, licence)
    show_table(session, "Built-in models", built_in)
    session.say("A configuration field that changes attention and is not known is refused by name.")


def _lengths(text: str) -> list[int]:
    from workbench.errors import RequestError

    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise RequestError(f"--tokens {text!r}: give lengths as in 512,2048.")
    return lengths


def _show_spec(session: Session, model: Model) -> None:
    from workbench.studies.survey import model_facts

    spec, source, known = model.spec, model.source, model_facts(model)
    windows = sorted({layer.window for layer in spec.layers if layer.window is not None})
    windowed = sum(layer.window is not None for layer in spec.layers)
    caps = sorted({layer.softcap for layer in spec.layers if layer.softcap is not None})
    rows = [
        ("name", source.name),
        ("from", f"{source.kind} {source.path or ''}".strip()),
        ("architecture", spec.architecture),
        ("layers x heads", f"{spec.n_layers} x {_span(layer.heads for layer in spec.layers)}"),
        ("key/value heads", _span(layer.kv_heads for layer in spec.layers)),
        ("head width", _span(layer.head_dim for layer in spec.layers)),
        ("residual width", spec.d_model),
        ("window", f"{', '.join(map(str, windows))} in {windowed} layers" if windows else "none"),
        ("softcap", ", ".join(f"{cap:g}" for cap in caps) or "none"),
        ("learned sinks", "yes" if any(layer.sinks for layer in spec.layers) else "none"),
        ("positions", f"{'rotary' if spec.rotary else 'learned'}, up to {spec.max_positions}"),
        ("vocabulary", spec.vocab_size),
        ("parameters", f"{known['parameters']:,}"),
        ("held as", f"{known['dtype']} on {known['device']}"),
        ("tokenizer", "yes" if model.tokenizer is not None else "none"),
        ("revision", source.revision),
        ("licence", source.license),
        ("weights, SHA-256", source.weights_sha256),
    ]
    show_facts(session, "Model", rows)


def _span(values: object) -> str:
    found = sorted(set(values))  # type: ignore[call-overload]
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _show_memory(session: Session, model: Model, lengths: list[int]) -> None:
    """What one prompt of each length would take; nothing of the sort is run."""
    from workbench.cli.trace import DEFAULT_STATISTICS, parse_statistics
    from workbench.models.memory import free_memory, size

    statistics = parse_statistics(DEFAULT_STATISTICS)
    free = free_memory(model.device)
    made = table(">tokens", ">forward pass", ">trace", "fits")
    most = None if model.spec.rotary else model.spec.max_positions
    for length in lengths:
        if most is not None and length > most:
            made.add_row(str(length), "-", "-", f"no: the model has {most} learned positions")
            continue
        prompt = [[0] * length]
        plain = model.predict_memory(prompt).peak
        traced = model.predict_memory(prompt, statistics=statistics).peak
        fits = "not known" if free is None else "yes" if traced <= free else "no"
        made.add_row(str(length), size(plain), size(traced), fits)
    show_table(session, "Predicted memory beyond the weights, one prompt", made)
    available = "" if free is None else f" Free now: {size(free)}."
    session.say(f"Trace: the default statistics of `workbench trace`, of every head.{available}")
