from __future__ import annotations

import io

import pytest
from rich.console import Console

from workbench.cli.progress import Bars, Display, Lines, display
from workbench.studies import Reporter


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, markup=False, highlight=False)


def test_a_terminal_gets_bars_and_a_log_gets_lines():
    assert isinstance(display(console(True)), Bars)
    assert isinstance(display(console(False)), Lines)
    assert isinstance(display(console(True)), Reporter)
    assert isinstance(display(console(False)), Reporter)


def test_a_display_of_no_form_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Display(console(False), None)


def test_lines_tell_begin_end_and_the_time_left_now_and_then():
    now = [0.0]
    out = console(False)
    with Lines(out, 3, clock=lambda: now[0]) as lines:
        lines.step("detect:text", "sinks [bold]", kept=True)
        lines.step("verify:sink", "8 heads", kept=False)
        for done, seconds in ((0, 1), (1, 5), (2, 12), (3, 13), (8, 40), (10, 50)):
            now[0] = float(seconds)
            lines.advance(done, 10)
        lines.note("between")
        lines.step("examples", "patterns", kept=False)
        now[0] = 51.5
    assert out.file.getvalue().splitlines() == [
        "[1/3] detect text: sinks [bold] (kept from the interrupted run)",
        "[2/3] verify sink: 8 heads",
        "  20 %, about 48 s left",
        "  80 %, about 10 s left",
        "  between",
        "  done in 50.0 s",
        "[3/3] examples: patterns",
        "  done in 1.5 s",
    ]


def test_a_step_that_fails_is_not_called_done():
    out = console(False)
    try:
        with Lines(out, None) as lines:
            lines.step("model", "x", kept=False)
            raise ValueError
    except ValueError:
        pass
    assert out.file.getvalue() == "model: x\n"


def test_bars_show_each_step_and_what_was_kept():
    out = console(True)
    with Bars(out, 2) as bars:
        bars.step("detect:text", "sinks [bold]", kept=True)
        bars.step("verify:sink", "8 heads", kept=False)
        bars.advance(3, 4)
        (kept, running) = bars._progress.tasks
        assert (kept.description, kept.finished) == ("kept [1/2] detect text: sinks [bold]", True)
        assert (running.description, running.percentage) == ("[2/2] verify sink: 8 heads", 75)
    assert running.finished
    assert "sinks [bold]" in out.file.getvalue()
