"""The fault suite: injects every fault into real runs on two ranks, and prints what happened and what was lost.

`make faults`, or `python tests/faults [words of a fault's name …] [--out FOLDER]`. Exit code 1 if anything was lost.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training"), str(ROOT / "tests")]

import jobs  # noqa: E402  # after the path
from runs import Course, Fault, Row, inject  # noqa: E402


def all_faults() -> list[Fault]:
    """Return every fault, the quick ones first."""
    import dirty
    import disks
    import hangs
    import kills
    import nonfinite
    import stops
    import stores

    return [
        *stops.FAULTS,
        *hangs.FAULTS,
        *disks.FAULTS,
        *stores.FAULTS,
        *dirty.FAULTS,
        *nonfinite.FAULTS,
        *kills.FAULTS,
    ]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| fault | injected | what happened | lost |", "|---|---|---|---|"]
    for row in rows:
        mark = {True: "", False: "**FAILED** ", None: ""}[row.passed]
        cells = [row.fault, row.injected, mark + " ".join(row.happened.split()), row.lost or "–"]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def run(chosen: Sequence[Fault], scratch: Path, out: Path) -> bool:
    """Inject faults and print the table; returns whether nothing was lost."""
    jobs.prepare_environment(scratch)
    course = Course(scratch)
    rows: list[Row] = []
    for number, fault in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {fault.name}: {fault.injected}", file=sys.stderr, flush=True)
        row = inject(fault, course, f"fault{number:02}")
        rows.append(row)
        verdict = {True: "nothing lost", False: f"FAILED: {row.happened}", None: row.happened}[row.passed]
        print(f"    {row.seconds:.0f} s, {verdict}", file=sys.stderr, flush=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "faults.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        (out / "faults.md").write_text(table(rows) + "\n")
    print(table(rows))
    n_lost, n_skipped = sum(row.passed is False for row in rows), sum(row.passed is None for row in rows)
    took = sum(row.seconds for row in rows) / 60
    print(f"\n{len(rows)} faults in {took:.1f} minutes: {n_lost} lost something, {n_skipped} could not be run here")
    return n_lost == 0


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only faults with one of these in their names")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "faults", help="folder for faults.json and faults.md"
    )
    parser.add_argument("--keep", action="store_true", help="keep the runs and their logs")
    given = parser.parse_args()
    chosen = [fault for fault in all_faults() if not given.words or any(word in fault.name for word in given.words)]
    if not chosen:
        parser.error(f"no fault has one of {given.words} in its name")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    scratch = Path(tempfile.mkdtemp(prefix="faults-", dir=os.environ.get("TMPDIR")))
    started_at = time.monotonic()
    try:
        return 0 if run(chosen, scratch, given.out) else 1
    finally:
        print(f"{(time.monotonic() - started_at) / 60:.1f} minutes in all", file=sys.stderr)
        if given.keep:
            print(f"kept: {scratch}", file=sys.stderr)
        else:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
