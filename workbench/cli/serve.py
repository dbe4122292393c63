"""`workbench serve`: the dashboard over a folder of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import options
from workbench.cli.session import Command, current_session
from workbench.errors import MissingExtra, RequestError, RunNotFound


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="serve", cls=Command)(serve)


def serve(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="Folder that holds runs.")] = Path("runs"),
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="A model to work with live, named as in other commands.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="P", min=0, max=65535, help="Port; 0 takes any free one.")] = 8050,
    dtype: options.Dtype = None,
    device: options.Device = None,
    celery: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="WORKBENCH_CELERY",
            help="A queue, as in redis://localhost, whose workers hold the model instead of this process.",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Show it in the browser.")] = False,
) -> None:
    """Look at runs, and work with a model, in the browser.

    Listens on this machine alone (127.0.0.1) until Ctrl-C. Nothing is loaded from elsewhere.
    """
    session = current_session()
    if not runs.is_dir():
        raise RunNotFound(
            f"there is no folder {runs}; make a run first, as in `workbench demo`, or name another folder"
        )
    with session.err.status("importing"):
        try:
            from workbench.apps.server import create_app, open_port
            from workbench.apps.settings import AppSettings
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"The dashboard needs {error.name}, which is not installed: pip install 'attention-workbench[app]'"
            ) from error
        settings = AppSettings(runs, model, device, None if dtype is None else dtype.value, celery=celery)
        app = create_app(settings)
    try:
        server = open_port(app, port)
    except OSError as error:
        raise RequestError(
            f"--port {port}: {error.strerror or error}; choose another, or 0 for any free one."
        ) from error
    address = f"http://127.0.0.1:{server.effective_port}"
    session.say(f"{address}  (Ctrl-C ends it)")
    if show:
        typer.launch(address)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
        # A trial that runs ends at its next step, and its page is told.
        app.server.extensions["workbench-live"].close()
