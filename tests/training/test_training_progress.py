"""Progress for people: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from longnet.training.progress import LineReporter, TerminalReporter, format_seconds, make_reporter


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_at_most_once_an_interval_and_at_the_end() -> None:
    stream = io.StringIO()
    reporter = LineReporter(stream, interval=1000.0)
    reporter.begin("Training", 0.5)
    for step in range(100):
        reporter.advance(0.5 + step / 200, f"step {step}")
    assert stream.getvalue() == ""
    reporter.end()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Training 100%  step 99  0:00 left") or "step 99" in lines[0]


def test_every_line_is_printed_with_no_interval() -> None:
    stream = io.StringIO()
    reporter = LineReporter(stream, interval=0.0)
    reporter.say("Reading")
    reporter.begin("Scoring")
    reporter.advance(0.25)
    reporter.advance(0.5, "half")
    reporter.end()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Reading"
    assert len(lines) == 3
    assert lines[1].startswith("Scoring  25%") and lines[1].endswith("left")
    assert "half" in lines[2]


def test_a_terminal_gets_a_bar_with_details_and_text_as_it_is() -> None:
    stream = _Terminal()
    reporter = TerminalReporter(Console(file=stream, force_terminal=True, width=120))
    reporter.say("[bold]a path[/bold] :x:")
    reporter.begin("Training")
    reporter.advance(0.5, "loss 1.0000")
    reporter.end()
    written = stream.getvalue()
    assert "[bold]a path[/bold] :x:" in written
    assert "50%" in written and "loss 1.0000" in written and "left" in written


def test_a_task_of_unknown_length_has_no_share() -> None:
    stream, terminal = io.StringIO(), _Terminal()
    for reporter in (LineReporter(stream, interval=0.0), TerminalReporter(Console(file=terminal, force_terminal=True))):
        reporter.begin("Streaming", None)
        reporter.advance(None, "100 bytes")
        reporter.end()
    assert stream.getvalue().rstrip() == "Streaming  100 bytes"
    assert "100 bytes" in terminal.getvalue() and "%" not in terminal.getvalue()


def test_the_stream_decides() -> None:
    assert isinstance(make_reporter(io.StringIO()), LineReporter)
    assert isinstance(make_reporter(_Terminal()), TerminalReporter)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3700, "1:01:40"), (-1, "0:00")])
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
