"""The root command: its groups, its global options, and where each invocation begins."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from workbench.cli import atlas, circuits, demo, export, heads, models, report, runs, serve, study, trace, verify
from workbench.cli.options import AdapterName
from workbench.cli.session import Session

_ARGUMENTS = "workbench.arguments"
_DEBUG = "--debug"


class Root(TyperGroup):
    """The root group; makes the session, and takes `--debug` behind the command as well as before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        end = args.index("--") if "--" in args else len(args)
        if _DEBUG in args[:end]:
            args = [_DEBUG, *(a for a in args[:end] if a != _DEBUG), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        through = ctx.params.get("through")
        through = None if through is None else AdapterName(through).value
        with Session(ctx.meta[_ARGUMENTS], debug=bool(ctx.params.get("debug")), through=through):
            return super().invoke(ctx)


app = typer.Typer(
    name="workbench",
    cls=Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _group in (demo, trace, heads, atlas, verify, report, export, serve):
    _group.register(app)
app.add_typer(circuits.app, name="circuits")
app.add_typer(models.app, name="models")
app.add_typer(runs.app, name="runs")
app.add_typer(study.app, name="study")


def _version(wanted: bool) -> bool:
    if wanted:
        from workbench import __version__

        typer.echo(f"workbench {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show the traceback of an error, and what the library logs.")
    ] = False,
    through: Annotated[
        AdapterName | None, typer.Option(help="Run the model inside this library, and attach to it there.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Find, measure and test the attention heads of language models."""


def main() -> None:
    """The entry point of the command `workbench`."""
    for stream in (sys.stdout, sys.stderr):
        # Texts of models hold any character; a terminal that cannot show one is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app(prog_name="workbench")
