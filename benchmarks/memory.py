"""Peak memory of one subject in a process of its own, printed as bytes: what the other programs start.

python -m benchmarks.memory step "ours, float32" 32 2     # a training step: subject, grid, batch
python -m benchmarks.memory decode "ours, best" 8         # a decoding step: subject, candidates
"""

import dataclasses
import sys

import torch

from benchmarks import decode, train_step
from benchmarks.measure import PeakMemory


def main(kind: str, subject: str, *sizes: str) -> None:
    """Build the subject and run it, above what the process holds after importing everything."""
    if kind == "step":
        grid, batch = map(int, sizes)
        warm = train_step.STEPS[subject]
        peak = PeakMemory()
        step = warm(dataclasses.replace(train_step.SHAPE, grid=grid), batch)
        for _ in range(2):  # the optimizer's states appear at the end of the first
            step()
    else:
        (n,) = map(int, sizes)
        peak = PeakMemory()
        run = decode.SUBJECTS[subject](n, 0)
        for _ in range(2):
            run()
    print(peak.bytes())


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
