"""Captions to text ids: ours against DALLE-pytorch's tokenizer, one thread, captions/s.

Both return int64 tensors of 256 ids a caption. Ours is trained on other captions of the same kind; theirs is the one
it ships. `--source FILE` takes your own captions, one a line.
"""

import os
from pathlib import Path
from statistics import median

from benchmarks import made, measure, peers
from benchmarks.measure import Options, Report
from dalle.tokenizer import Tokenizer

OURS, BATCHED, THEIRS = "ours, one by one", "ours, 512 at a time", "DALLE-pytorch, 512 at a time"
TEXT_LEN, N = 256, 4096


def speed(options: Options, report: Report) -> None:
    """Captions a second, without BPE dropout."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizers library, read when it first encodes a batch
    if options.source is None:
        learned, used = made.captions(4 * N, seed=1), made.captions(N)
    else:
        used = Path(options.source).read_text(encoding="utf-8").splitlines()
        learned = used
    report.notes.append(f"captions: {options.source or 'made by benchmarks/made.py'}")
    ours = Tokenizer.train(learned, 16_384)
    theirs = peers.package("dalle_pytorch.tokenizer").SimpleTokenizer()
    chunks = [used[first : first + 512] for first in range(0, len(used), 512)]
    times = measure.in_turns(
        {
            THEIRS: lambda: [theirs.tokenize(chunk, TEXT_LEN, truncate_text=True) for chunk in chunks],
            OURS: lambda: [ours.text([caption], TEXT_LEN) for caption in used],
            BATCHED: lambda: [ours.text(chunk, TEXT_LEN) for chunk in chunks],
        },
        options.n(5),
        label="tokenizer",
        units=len(used),
    )
    report.samples["seconds a caption"] = times
    rows: list[list[measure.Cell]] = [
        [name, 1 / median(seconds), measure.ratio(times, THEIRS, name)] for name, seconds in times.items()
    ]
    report.table("Captions to text ids, one thread", ["", "captions/s", f"× {THEIRS}"], rows)


if __name__ == "__main__":
    measure.main("tokenizer", __doc__, {"speed": speed})
