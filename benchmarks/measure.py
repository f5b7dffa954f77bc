"""Timing in turns, ratios, peak memory, this machine's rates, and the JSON that a benchmark leaves behind.

What is compared runs in one process, in turns, round after round; a ratio is taken within a round, and the median of
the rounds' ratios is what counts. So a machine that is slow for a minute is slow for all.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dalle.output.text import aligned

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Cell = str | float | int | None

Times = dict[str, list[float]]
"""Seconds of every round, by subject."""


# ------------------------------------------------------------------------------------------------ times


FEWEST = 3
"""Rounds that a slow machine has to go through, too, before a part's time is up."""


def in_turns(
    subjects: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    label: str = "",
    units: int = 1,
    limit_s: float = float("inf"),
) -> Times:
    """Run all subjects once per round, in order, and return the seconds of each.

    Args:
        subjects: what to run, by name.
        rounds: how often each is timed.
        warmup: rounds before that, not timed.
        label: of the progress line on stderr.
        units: of work in one run; seconds are per unit.
        limit_s: start no further round, after `FEWEST`, when the timed ones have taken so long.
    """
    times: Times = {name: [] for name in subjects}
    for number in range(-warmup, rounds):
        if number >= FEWEST and sum(map(sum, times.values())) * units > limit_s:
            break
        for name, run in subjects.items():
            say(f"{label}: {'warming up' if number < 0 else f'round {number + 1} of {rounds}'}, {name}")
            seconds = elapsed(run)
            if number >= 0:
                times[name].append(seconds / units)
    return times


def elapsed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes, queued work of a GPU included."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ratio(times: Times, slow: str, fast: str) -> float:
    """Return the median over the rounds of how many times as long `slow` takes as `fast`."""
    return median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def say(text: str) -> None:
    """Report progress on stderr, on one line where that is a terminal."""
    if sys.stderr.isatty():
        print(f"  {text:<110}"[:118], end="\r", file=sys.stderr, flush=True)
    else:
        print(f"  {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ the machine


SIDE, REPEATS = 2048, 4


def products(dtype: torch.dtype) -> Callable[[], object]:
    """Return a run of large matrix products, `PRODUCTS_FLOPS` in all, to be timed in turns with what they bound."""
    return repeated_product(dtype, SIDE, SIDE, SIDE, REPEATS)


PRODUCTS_FLOPS = REPEATS * 2 * SIDE**3
"""Operations of `products`, whose rate is what floors are computed with."""


def repeated_product(
    dtype: torch.dtype, m: int, k: int, n: int, repeats: int, device: str = "cpu"
) -> Callable[[], object]:
    """Return a run of products of m×k by k×n, 2·m·k·n operations each."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    result = a @ b

    def run() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=result)

    return run


def rates() -> dict[str, float]:
    """Return matrix-product rates in GFLOP/s, large and in the model's own shapes, and the copy rate in GB/s."""
    shapes = ((SIDE, SIDE, SIDE), (1280, 512, 2048), (1280, 2048, 512), (1024, 512, 8192))
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for m, k, n in shapes:
            name = f"{str(dtype).removeprefix('torch.')} {m}×{k}×{n}"
            repeats = max(1, PRODUCTS_FLOPS // (2 * m * k * n))
            times = in_turns({name: repeated_product(dtype, m, k, n, repeats)}, 5, label="rate")
            found[name] = 2 * m * k * n * repeats / median(times[name]) / 1e9
    source = torch.zeros(64 * MIB // 4)
    target = torch.empty_like(source)
    copies = in_turns({"copy": lambda: target.copy_(source)}, 5, label="rate")
    found["copy, read + written"] = 2 * 64 * MIB / median(copies["copy"]) / 1e9
    return found


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu, flags, memory = platform.processor(), "", 0
    if (info := Path("/proc/cpuinfo")).exists():
        entries = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        known = {key.strip(): value.strip() for key, value in entries}
        cpu, flags = known.get("model name", cpu), known.get("flags", "")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "pillow", "tokenizers", "einops"):
        found[name] = metadata.version(name)
    lines = (Path(__file__).parent / "peers.txt").read_text(encoding="utf-8").splitlines()
    return found | dict(line.split("==") for line in lines if "==" in line)


def commit() -> str:
    """Return the commit that was measured, with a + if files were changed since; empty outside of git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------ memory


def _status(field_name: str) -> int:
    """Return a field of Linux's /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field_name}:")) * 1024


class PeakMemory:
    """The most memory that this process holds from here on, above what it holds here.

    On Linux it is read from VmHWM: `ru_maxrss` of a process starts at that of the one that started it, which may have
    been large.
    """

    def __init__(self) -> None:
        self._linux = Path("/proc/self/clear_refs").exists()
        if self._linux:
            _give_back()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before = _status("VmRSS") if self._linux else self._maximum()

    @staticmethod
    def _maximum() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def bytes(self) -> int:
        """Return the peak so far."""
        return self.absolute() - self._before

    def absolute(self) -> int:
        """Return the peak so far, with what was held before."""
        return _status("VmHWM") if self._linux else self._maximum()


def _give_back() -> None:
    """Return to the system what malloc holds but nobody uses: it would be used again without a rise."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory(*arguments: object) -> int:
    """Return the peak bytes that `python -m benchmarks.memory ARGUMENTS…` reports from a process of its own."""
    words = [str(argument) for argument in arguments]
    say(f"peak memory: {' '.join(words)}")
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure with a limit: a line of the table of lines to reach."""

    what: str
    """What was measured."""
    against: str
    """What it is compared with."""
    value: float
    """The median."""
    limit: float
    """What it has to reach."""
    at_most: bool = False
    """Whether the value may not exceed the limit, rather than having to reach it."""
    unit: str = "×"
    """Of value and limit: × for a ratio, or a word."""

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table to print."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve of a plot."""

    plot: str
    """Which plot it belongs to."""
    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(kw_only=True)
class Report:
    """What a benchmark found."""

    benchmark: str
    tables: list[Table] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    """Every single time, by part and subject."""
    rates: dict[str, float] = field(default_factory=dict)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Keep a table, and print it."""
        self.tables.append(Table(title=title, columns=columns, rows=rows))
        print(f"\n{text_table(self.tables[-1])}", flush=True)

    def line(
        self, what: str, against: str, value: float, limit: float, *, at_most: bool = False, unit: str = "×"
    ) -> None:
        """Keep a line to reach, and print it."""
        self.lines.append(Line(what=what, against=against, value=value, limit=limit, at_most=at_most, unit=unit))
        print(f"{what} against {against}: {figure(value)}{unit}", flush=True)

    def write(self, path: Path) -> None:
        """Write everything as JSON, with what it was measured on."""
        lines = [dataclasses.asdict(line) | {"met": line.met} for line in self.lines]
        content = {
            "benchmark": self.benchmark,
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python -m", f"benchmarks.{self.benchmark}", *sys.argv[1:]]),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "rates": self.rates,
            "lines": lines,
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "series": [dataclasses.asdict(one) for one in self.series],
            "notes": self.notes,
            "samples": self.samples,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Return a JSON value with floats of six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value


def figure(value: Cell) -> str:
    """Return a cell: three digits of a float, – for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return str(value)


def text_table(table: Table) -> str:
    """Return a table as aligned text."""
    rows = [[figure(cell) for cell in row] for row in (table.columns, *table.rows)]
    head, *lines = aligned(rows, "<>").splitlines()
    return "\n".join([table.title, head, "-" * max(map(len, [head, *lines])), *lines])


# ------------------------------------------------------------------------------------------------ programs


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a benchmark is run."""

    rounds: int | None = None
    """Rounds, where not each part's own number."""
    quick: bool = False
    """One round, to try the program."""
    source: str | None = None
    """The user's own data, for the programs that take some."""

    def n(self, default: int) -> int:
        """Return the rounds of a part that wants `default`."""
        return 1 if self.quick else self.rounds or default


NO_PRODUCTS = {"scale", "plan", "costs", "zero3_memory", "family"}
"""Benchmarks that need no rate of matrix products beside them."""


def main(benchmark: str, doc: str | None, parts: Mapping[str, Callable[[Options, Report], None]]) -> None:
    """Run a benchmark's parts as the command line says; print its tables, write its JSON."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(parts), metavar="PART", help=f"some of: {', '.join(parts)}")
    parser.add_argument("--rounds", type=int, help="rounds of every part, instead of its own number")
    parser.add_argument("--quick", action="store_true", help="one round: to try the program, not to measure")
    parser.add_argument("--source", help="your own shards (loading) or captions (tokenizer) instead of made ones")
    parser.add_argument("--out", type=Path, help="JSON to write; default: results/, unless --only or --quick is given")
    arguments = parser.parse_args()
    report = Report(benchmark=benchmark)
    options = Options(rounds=arguments.rounds, quick=arguments.quick, source=arguments.source)
    started = time.perf_counter()
    torch.manual_seed(0)
    if benchmark not in NO_PRODUCTS:
        report.rates = rates()
    for name, part in parts.items():
        if not arguments.only or name in arguments.only:
            say(f"{benchmark}: {name}")
            part(options, report)
    whole = not arguments.only and not arguments.quick
    out = arguments.out or (RESULTS / f"{benchmark}.json" if whole else None)
    report.notes.append(f"took {time.perf_counter() - started:.0f} s")
    if out is not None:
        report.write(out)
    print(f"\n{benchmark}: {report.notes[-1]}{f', wrote {out}' if out else ''}", flush=True)
