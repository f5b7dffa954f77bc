"""Doors of the product, each tried with thousands of inputs, and what came out of them.

An input may end in a right result, in counted skips, or in an error in words: a ValueError or OSError that the command
lines print in one line, which names the file. Anything else fails the test: another exception, a loss that nothing
counts, more than `DEADLINE_S` seconds of computing, or more than `MAX_PEAK` bytes of memory.

FUZZ_TIMES=20 tries twenty times as many inputs, FUZZ_SEED=7 other ones, with constants of the modules that are loaded.
"""

import os
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.internal.conjecture import providers

from dalle.cli.terminal import error_line
from dalle.output.text import printable

TIMES = float(os.environ.get("FUZZ_TIMES", "1"))
SEED = os.environ.get("FUZZ_SEED")
DEADLINE_S = 20
"""Of computing, for one input; most take milliseconds. Thirty times as long asleep counts as a hang, too."""
MAX_PEAK = 1 << 30
"""Bytes that an input may take at its peak."""
HEADROOM = 6 << 30
"""Bytes of address space beyond which allocations fail: in time, before the machine suffers."""
MAX_LINE = 2500
"""Characters of an error."""

Function = Callable[..., Any]

if SEED is None:
    # Hypothesis also tries constants of the modules that happen to be loaded, so a run of more files, or any change of
    # the code, would try other inputs.
    providers._get_local_constants = providers.Constants  # type: ignore[attr-defined]


def fuzz(n: int) -> Callable[[Function], Function]:
    """Mark a test of `n` inputs: slow, and with the same inputs every time unless another seed is asked for."""

    def marked(test: Function) -> Function:
        test = settings(
            max_examples=max(1, int(n * TIMES)),
            derandomize=SEED is None,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )(test)
        return pytest.mark.slow(test if SEED is None else seed(int(SEED))(test))

    return marked


class LossError(AssertionError):
    """Something was lost, and nothing counts it."""


class _HangError(BaseException):
    """Raised by the alarm; no Exception, so that nothing in between catches it."""


class Door:
    """Tries inputs and counts what comes out."""

    def __init__(self, name: str) -> None:
        self.name, self.counts, self.seconds = name, Counter[str](), 0.0

    def knock(self, call: Callable[[], int], *, names: str = "") -> None:
        """Try one input.

        Args:
            call: returns the number of counted skips, 0 for a right result; raises `LossError` for a loss.
            names: what an error must name, such as the file.
        """
        began = time.monotonic()
        self.counts["tried"] += 1
        try:
            with _bounds():
                skipped = call()
            self.counts["skips" if skipped else "right"] += 1
        except (ValueError, OSError) as error:
            if not is_in_words(error, names):
                self.counts["tracebacks"] += 1
                raise AssertionError(f"no error in words that names {names!r}: {error!r}") from error
            self.counts["words"] += 1
        except LossError:
            self.counts["losses"] += 1
            raise
        except Exception:
            self.counts["tracebacks"] += 1
            raise
        except _HangError:
            self.counts["hangs"] += 1
            raise AssertionError(f"more than {DEADLINE_S} s") from None
        finally:
            self.seconds += time.monotonic() - began


def is_in_words(error: BaseException, names: str) -> bool:
    """Return whether an error is a line for people, which names the file."""
    line = printable(error_line(error))
    return "\n" not in line and 10 < len(line) < MAX_LINE and printable(names) in line


def require_kept(condition: bool, what: object) -> None:
    """Raise LossError unless everything is there or counted."""
    if not condition:
        raise LossError(str(what))


@contextmanager
def _bounds() -> Iterator[None]:
    """Bound time and memory of a block."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = {number: signal.signal(number, _alarm) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + HEADROOM, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    at_first = _memory("VmRSS")
    signal.setitimer(signal.ITIMER_PROF, DEADLINE_S)
    signal.setitimer(signal.ITIMER_REAL, 30 * DEADLINE_S)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    peak = _memory("VmHWM") - at_first
    assert peak < MAX_PEAK, f"a peak of {peak >> 20:,} MiB"


def _alarm(*_: object) -> None:
    raise _HangError


def _memory(name: str) -> int:
    """Return a number of bytes that Linux tells of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


HEADS = ("tried", "right", "skips", "words", "tracebacks", "losses", "hangs")


def table(rows: list[tuple[str, dict[str, int], float]]) -> list[str]:
    """Return lines of door, numbers of inputs and seconds, and their sums."""
    heads = ("inputs", "right", "counted skips", "errors in words", "tracebacks", "silent losses", "hangs", "seconds")
    cells = [("door", *heads)]
    cells += [(name, *(f"{counts.get(head, 0):,}" for head in HEADS), f"{s:.0f}") for name, counts, s in rows]
    sums = [f"{sum(counts.get(head, 0) for _, counts, _ in rows):,}" for head in HEADS]
    cells.append(("all", *sums, f"{sum(s for *_, s in rows):.0f}"))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
