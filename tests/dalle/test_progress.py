import io

import pytest

from dalle.output import progress
from dalle.output.progress import part_of, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_progress_is_drawn_again_and_again_on_a_terminal_and_removed_at_the_end(monkeypatch):
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL_S", 0.0)
    terminal = Terminal()
    with progress_bar("pictures", stream=terminal) as show:
        show(1, 4)
        part_of(show, 1, 4)(1, 2)
    *drawn, removed, end = terminal.getvalue().split("\r")
    assert [number for number in ("1/4 pictures", "2/4 pictures") if any(number in line for line in drawn)]
    assert "left" in drawn[-1]
    assert removed.strip() == end == ""


def test_a_file_gets_a_line_now_and_then_with_the_time_left_and_the_speed(clock):
    file = io.StringIO()
    with progress_bar("candidates", stream=file) as show:
        for second in range(21):
            show(2 * second, 60)
            clock[0] += 1
    assert file.getvalue().splitlines() == [
        "20/60 candidates, 00:20 left,  2.00 candidates/s",
        "40/60 candidates, 00:10 left,  2.00 candidates/s",
    ]


def test_the_speed_does_not_count_what_came_before_the_first_step(clock):
    file = io.StringIO()
    with progress_bar("candidates", stream=file) as show:
        clock[0] += 60  # a minute of compiling, and then 2 candidates/s
        show(2, 60)
        clock[0] += 20
        show(42, 60)
    assert file.getvalue() == "42/60 candidates, 00:09 left,  2.00 candidates/s\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_is_shown_of_work_that_ends_at_once_or_has_no_parts(stream):
    with progress_bar("pictures", stream=stream) as show:
        show(1, 4)
        show(4, 4)
    with progress_bar("pictures", stream=stream) as show:
        show(0, 0)
    assert stream.getvalue() == ""
