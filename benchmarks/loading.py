"""Reading training data: JPEG shards of 256 pixels to text ids and tensors, images/s of one core, against what a step
consumes.

The shards are made by this program in a temporary folder and read as training reads them: decoded, cropped, the
caption with BPE dropout. `--source FOLDER` takes your own shards of pictures and captions.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks import made, measure, train_step
from benchmarks.measure import Options, Report
from dalle.data.reader import ShardData
from dalle.model import DALLE
from dalle.tokenizer import Tokenizer
from dvae import DVAE, DVAEConfig
from training.data.batches import Batch, Share, batches
from training.data.shards import write_shards
from training.ranks.ranks import Ranks
from training.recipes import recipe
from training.stages.encode import EncodeConfig, encode_shards
from training.stages.transformer import TransformerStage

N, BATCH = 256, 16
STEP = "training step, our best, B=2"


def make(folder: Path) -> Path:
    """Write a shard of made pictures with captions."""
    samples = zip(made.pictures(N), made.captions(N), strict=True)
    no_extra: dict[str, object] = {}
    raw = ((f"{i:06d}", picture, "jpg", [caption], no_extra) for i, (picture, caption) in enumerate(samples))
    return write_shards(raw, folder, "made")[0]


def stage(folder: Path, captions: list[str]) -> TransformerStage:
    """Return the stage whose transforms are measured; its models have no weights, since reading needs none."""
    tokenizer = Tokenizer.train(captions, 16_384)
    with torch.device("meta"):
        model, dvae = DALLE(train_step.SHAPE), DVAE(DVAEConfig())
    return TransformerStage(recipe("50m").transformer, model, tokenizer, dvae, folder, [], {})


def encoded(shards: Path, folder: Path) -> ShardData:
    """Return the same samples with image tokens for pictures. A small dVAE makes them: reading does not care which."""
    dvae = DVAE(DVAEConfig(n_hid=8, n_init=8)).eval()
    encode_shards(
        [shards],
        folder,
        dvae,
        "0" * 16,
        EncodeConfig(crops=4, workers=0),
        Ranks(rank=0, size=1, device=torch.device("cpu")),
    )
    return ShardData.open([folder], captions=True, encoded=True)


def speed(options: Options, report: Report) -> None:
    """Images a second of one process with one thread, and of the training step with all."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = Path(options.source) if options.source else make(folder / "pictures")
        report.notes.append(f"shards: {options.source or 'made by benchmarks/made.py'}")
        pictures = ShardData.open([shards], captions=True)
        captions = [caption for i in range(len(pictures)) for caption in pictures.captions(i)]
        transform = stage(folder, [*captions, *made.captions(8192)]).transform
        readers = {
            "pictures": batches(pictures, transform, Share(seed=0, micro_batch=BATCH)),
            "image tokens, encoded once": batches(
                encoded(shards, folder / "tokens"), transform, Share(seed=0, micro_batch=BATCH)
            ),
        }
        torch.set_num_threads(1)
        subjects = {name: _some(reader) for name, reader in readers.items()}
        times = measure.in_turns(subjects, options.n(7), label="loading", units=4 * BATCH)
        torch.set_num_threads(threads)
    step = {STEP: train_step.STEPS[train_step.BEST](train_step.SHAPE, 2)}
    times |= measure.in_turns(step, options.n(3), warmup=2, label="loading", units=2)
    report.samples["seconds an image"] = times
    rows: list[list[measure.Cell]] = [
        [name, 1 / median(seconds), median(times[STEP]) / median(seconds)] for name, seconds in times.items()
    ]
    report.table("Images a second, one core; the step uses all", ["", "images/s", f"× {STEP}"], rows)
    for name in readers:
        report.line(
            f"loader, {name}, one core", "what the step consumes", median(times[STEP]) / median(times[name]), 1.0
        )


def _some(reader: Iterator[Batch]) -> Callable[[], object]:
    """Return a call that reads four batches."""
    return lambda: [next(reader) for _ in range(4)]


if __name__ == "__main__":
    measure.main("loading", __doc__, {"speed": speed})
