"""What the commands share: two consoles, the very command that was given, and how errors end.

| outcome | what is printed on stderr | exit code |
| --- | --- | --- |
| an error raised on purpose, a wrong option | one paragraph | 2 |
| some cells of a study failed, the others are kept | a line each | 3 |
| Ctrl-C | what is kept, and the command that goes on from there | 130 |
| anything else | the error in a line, and `--debug` | 1 |
"""

from __future__ import annotations

import logging
import os
import shlex
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from workbench.errors import RunError, WorkbenchError

_LOG_WIDTH = 150
_CURRENT: ContextVar[Session] = ContextVar("session")


class Session:
    """One invocation of the command line; a context that takes back what it changed in the process."""

    def __init__(self, arguments: Sequence[str], *, debug: bool = False, through: str | None = None) -> None:
        self.arguments = tuple(arguments)
        self.debug = debug
        # The library that models run in.
        self.through = through
        self.run: Path | None = None
        # Where a study keeps what is measured, each cell by itself.
        self.cells: Path | None = None
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        self._undo = ExitStack()

    def __enter__(self) -> Session:
        self._undo.callback(_CURRENT.reset, _CURRENT.set(self))
        # What the library warns of is for everyone to read, how it goes only for those who look for a fault.
        self._undo.enter_context(listening("workbench", self.note, logging.INFO if self.debug else logging.WARNING))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    @property
    def command(self) -> str:
        """The command as it was given, for the shell."""
        return shlex.join(["workbench", *self.arguments])

    def say(self, text: str = "") -> None:
        """A line of the result."""
        self.out.print(printable(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line about how it goes."""
        self.err.print(printable(text), soft_wrap=True)

    def writes(self, path: Path, *, overwrite: bool) -> Path:
        """Note where this command writes its run; refuse a place that holds one before any work is done."""
        held = (path / "manifest.json").is_file()
        if held and not overwrite:
            raise RunError(
                f"{path} already holds a run; `{shlex.join(['workbench', 'runs', 'show', str(path)])}` "
                "prints what it found. Choose another path (--out), or make it again (--overwrite)."
            )
        if path.is_file() or (not held and path.is_dir() and any(path.iterdir())):
            raise RunError(f"{path} exists and is not a run, so it is left alone; choose another path (--out).")
        place = next(parent for parent in path.absolute().parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise RunError(
                f"{path} cannot be written: {place} is no folder that you may write to; choose another path (--out)."
            )
        self.run = path
        return path

    def silence_transformers(self) -> None:
        """No advice and no bars from `transformers` and the hub, until this session ends."""
        for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
            if name not in os.environ:
                os.environ[name] = value
                self._undo.callback(os.environ.pop, name, None)
        from transformers.utils import logging as transformers_logging

        theirs: Any = transformers_logging
        self._undo.callback(theirs.set_verbosity, theirs.get_verbosity())
        if theirs.is_progress_bar_enabled():
            self._undo.callback(theirs.enable_progress_bar)
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()

    def failed(self, error: Exception) -> int:
        """Print an error and give the exit code."""
        if self.debug:
            self.err.print(traceback.format_exc().rstrip(), soft_wrap=True)
        if isinstance(error, WorkbenchError):
            self.err.print(f"Error: {printable(' '.join(str(error).split()))}", style="red", soft_wrap=True)
            return 2
        reason = " ".join(str(error).split())
        self.err.print(
            printable(f"Unexpected {type(error).__name__}{f': {reason}' if reason else ''}."),
            style="red",
            soft_wrap=True,
        )
        if not self.debug:
            again = shlex.join(["workbench", "--debug", *self.arguments])
            self.note(f"This is a fault of the workbench. For the traceback: {again}")
        return 1

    def interrupted(self) -> int:
        """Say what Ctrl-C left, and give the exit code."""
        self.err.print()
        self.note(f"Interrupted. {self._left()}")
        # As it was typed: what is not printable in it has to stay, or the command would be another.
        self.err.print(f"  {self.command}", soft_wrap=True)
        return 130

    def _left(self) -> str:
        if self.run is None:
            return "To start again:"
        from workbench.runs.run import partial_path

        if self.cells is not None and self.cells.is_dir():
            return f"The cells that are done are kept in {self.cells}; this goes on from there:"
        if partial_path(self.run).is_dir():
            return f"The finished steps are kept in {partial_path(self.run)}; this goes on from there:"
        if (self.run / "manifest.json").is_file():
            return f"{self.run} holds a complete run. To start again:"
        return "No step was finished, so nothing is kept. To start again:"


class Command(TyperCommand):
    """A command whose errors end as the table of this module says."""

    def invoke(self, ctx: Any) -> Any:
        session = current_session()
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(session.interrupted()) from None
        except Exception as error:  # noqa: BLE001 (the outermost frame: whatever it is must end in a sentence)
            raise typer.Exit(session.failed(error)) from None


class _Teller(logging.Handler):
    """Passes messages on."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


@contextmanager
def listening(logger: str, tell: Callable[[str], None], level: int = logging.INFO) -> Iterator[None]:
    """Pass on what a logger of the library says, from a level on."""
    source, handler = logging.getLogger(logger), _Teller(tell)
    before = source.level
    handler.setLevel(level)
    source.addHandler(handler)
    source.setLevel(level)
    try:
        yield
    finally:
        source.setLevel(before)
        source.removeHandler(handler)


def current_session() -> Session:
    """The session of this invocation."""
    return _CURRENT.get()


def printable(text: str) -> str:
    """The text with control characters written out: names and prompts must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def _console(*, stderr: bool) -> Console:
    """Nothing is read as markup. In a log there is no width to keep to, so tables get a generous one."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _LOG_WIDTH
    return console
