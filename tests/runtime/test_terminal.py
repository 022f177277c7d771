"""Progress as plain lines or as bars on a terminal, and tables as people read them."""

import io
import math
import sys

import jax
import pytest

from diffusion_t5x.runtime import terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves, in seconds."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def test_a_line_comes_only_when_it_is_time(clock, capsys):
    with terminal.Progress(100, "training", "steps") as bar:
        for _ in range(8):
            clock.now += 3.0
            bar.update()
        lines = capsys.readouterr().err.splitlines()
        # Every ten seconds at the earliest: after 12 and after 24 seconds.
        assert [line.split(",")[0] for line in lines] == [
            "training: 4/100 steps",
            "training: 8/100 steps",
        ]
        clock.now += 5.0
        bar.update(2)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("training: 10/100 steps, ")


def test_the_rate_counts_only_what_was_done_here(clock, capsys):
    with terminal.Progress(1000, "training", "steps", initial=900) as bar:
        clock.now += 20.0
        bar.update(50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == lines[1]
    assert lines[0].startswith("training: 950/1000 steps, 2.5 steps/s, 0:00:20 left")


def test_numbers_stay_beside_the_count_until_there_are_new_ones(clock, capsys):
    with terminal.Progress(10, "training", "steps") as bar:
        bar.update(1, loss=3.14159265, accuracy=0.5)
        clock.now += 11.0
        bar.update()
        assert capsys.readouterr().err.endswith("loss 3.142  accuracy 0.5\n")
        bar.update(0, loss=2.0)
    assert capsys.readouterr().err.endswith("loss 2\n")


def test_an_unknown_total_is_not_shown(clock, capsys):
    with terminal.Progress(None, "predicting", "batches") as bar:
        clock.now += 2.0
        bar.update(3)
    assert capsys.readouterr().err == "predicting: 3 batches, 1.5 batches/s  \n"


def test_no_time_at_all_is_no_division_by_zero(clock, capsys):
    with terminal.Progress(1, "quick", "things") as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("quick: 1/1 things, ")


def test_nothing_goes_to_standard_output(clock, capsys):
    with terminal.Progress(1, "quick", "things") as bar:
        clock.now += 60.0
        bar.update()
    assert capsys.readouterr().out == ""


def test_work_that_fails_says_how_far_it_came_and_fails(clock, capsys):
    with pytest.raises(RuntimeError, match="broken"), terminal.Progress(9, "work", "units") as bar:
        bar.update(4)
        raise RuntimeError("broken")
    assert capsys.readouterr().err.startswith("work: 4/9 units")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()], ids=["file", "terminal"])
def test_other_processes_than_the_first_are_silent(clock, monkeypatch, stream):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.Progress(5, "training", "steps") as bar:
        clock.now += 60.0
        bar.update(5, loss=1.0)
    assert stream.getvalue() == ""


def _terminal_of(monkeypatch):
    """Makes standard error a terminal."""
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    return stream


def test_a_terminal_gets_a_bar_with_count_rate_and_numbers(clock, monkeypatch):
    stream = _terminal_of(monkeypatch)
    with terminal.Progress(100, "training", "steps", initial=10) as bar:
        clock.now += 4.0
        bar.update(20, loss=0.25)
    text = stream.getvalue()
    for part in ("training", "30/100", "5 steps/s", "loss 0.25"):
        assert part in text
    # The plain line is the bar's stand-in and never comes with it.
    assert "training: 30/100 steps" not in text


def test_bars_inside_one_another_share_the_display_and_it_ends_with_the_last(clock, monkeypatch):
    stream = _terminal_of(monkeypatch)
    with terminal.Progress(3, "evaluating", "checkpoints") as outer:
        for number in range(2):
            with terminal.Progress(5, f"predict {number}", "examples") as inner:
                inner.update(5)
            assert [task.description for task in terminal._bars.tasks] == ["evaluating"]
        outer.update(2)
    assert terminal._bars is None
    assert "predict 1" in stream.getvalue()
    assert "2/3" in stream.getvalue()


def test_a_title_stands_before_the_progress_inside_it(clock, capsys):
    with terminal.titled("[2/15] fine-tune"), terminal.Progress(1, "training", "steps") as bar:
        bar.update()
    with terminal.Progress(1, "training", "steps") as bar:
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[2/15] fine-tune: training: 1/1 steps")
    assert lines[1].startswith("training: 1/1 steps")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (12345, "12,345"), (12345.0, "12,345"), (0.123456, "0.1235"),
        (-1.5, "-1.5"), (1234.5678, "1235"), (1e-7, "1e-07"), ("text", "text"), (math.nan, "nan"),
        (math.inf, "inf"), (True, "1"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits_and_integers_are_whole(value, text):
    assert terminal.format_value(value) == text


def test_a_table_without_a_terminal_is_markdown_as_it_stands(capsys):
    # Brackets would be colours to rich.
    terminal.print_table(["name", "[bold]"], [["[red]a[/red]", 0.5]])
    expected = terminal.markdown(["name", "[bold]"], [["[red]a[/red]", 0.5]])
    assert capsys.readouterr().out.split() == expected.split()
