"""How far a command is: bars with the time left in a terminal, plain lines elsewhere; always on stderr.

Both are a `workbench.studies.Reporter`: `step` begins a step (and ends the one before), `advance` counts
within it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Column

from workbench.cli.session import printable

# Ablations of a large model take minutes each; the estimate must not forget the last one meanwhile.
_REMEMBERED_SECONDS = 3600.0


class Display(ABC):
    """What the two forms share: the count of steps."""

    def __init__(self, console: Console, steps: int | None) -> None:
        self.console = console
        self._steps = steps
        self._begun = 0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abstractmethod
    def step(self, name: str, title: str, kept: bool) -> None:
        """A step begins, or is `kept` from an interrupted run."""

    @abstractmethod
    def advance(self, done: int, total: int) -> None:
        """So far within the step."""

    def note(self, text: str) -> None:
        """A line between."""
        self.console.print(f"  {printable(text)}", soft_wrap=True)

    def _label(self, name: str, title: str) -> str:
        self._begun += 1
        place = f"[{self._begun}/{self._steps}] " if self._steps else ""
        return printable(f"{place}{name.replace(':', ' ')}: {title}")


class Bars(Display):
    """One bar a step; finished ones stay."""

    def __init__(self, console: Console, steps: int | None) -> None:
        super().__init__(console, steps)
        self._task: TaskID | None = None
        text = TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        )
        self._progress = Progress(
            SpinnerColumn(),
            text,
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left", style="progress.remaining"),
            Remaining(),
            console=console,
            expand=True,
            speed_estimate_period=_REMEMBERED_SECONDS,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end()
        self._progress.stop()

    def step(self, name: str, title: str, kept: bool) -> None:
        self._end()
        label = self._label(name, title)
        if kept:
            self._task = self._progress.add_task(f"kept {label}", total=1)
            self._end()
        else:
            self._task = self._progress.add_task(label, total=None)

    def advance(self, done: int, total: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def _end(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1, total=1)
            self._task = None


class Lines(Display):
    """For logs: a line when a step begins and when it ends, and one every ten seconds between."""

    def __init__(
        self,
        console: Console,
        steps: int | None,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(console, steps)
        self._every, self._clock = every, clock
        self._since: float | None = None
        self._told = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end()

    def step(self, name: str, title: str, kept: bool) -> None:
        self._end()
        label = self._label(name, title)
        if kept:
            self._print(f"{label} (kept from the interrupted run)")
            return
        self._print(label)
        self._since = self._told = self._clock()

    def advance(self, done: int, total: int) -> None:
        now = self._clock()
        if self._since is None or not 0 < done < total or now - self._told < self._every:
            return
        left = (now - self._since) / done * (total - done)
        self._print(f"  {100 * done / total:.0f} %, about {left:.0f} s left")
        self._told = now

    def _end(self) -> None:
        if self._since is not None:
            self._print(f"  done in {self._clock() - self._since:.1f} s")
            self._since = None

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def display(console: Console, steps: int | None = None) -> Display:
    """Bars where they can be drawn, lines elsewhere."""
    return Bars(console, steps) if console.is_terminal else Lines(console, steps)
