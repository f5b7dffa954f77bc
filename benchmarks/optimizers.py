"""AdamW against Muon: the transformer's loss by steps and by seconds, at two widths, on image tokens of real pictures.

python -m benchmarks.optimizers --bundle runs/icons --data tokens/train --validation tokens/validation

The bundle gives the tokenizer and the dVAE; the shards are what `dalle-train encode` made with that dVAE. Each run is
one of `dalle-train transformer`: recipe icons-cpu with another width and batch, and the same batches for both
optimizers. Seconds are those of the steps alone, without validation, samples and saving. The plot shows, for each
optimizer and width, the learning rate with the lowest last loss. Runs of other widths that OUT holds stay, and are
drawn too: give each width the steps and the batch that its machine has time for.
"""

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from benchmarks.measure import RESULTS, ROOT, commit, machine, say, versions
from dalle.model import DALLE
from training.config import OptimizerConfig, OptimizerKind
from training.ranks.ranks import join
from training.recipes import Recipe, recipe
from training.run_files import read_metrics
from training.stages.inputs import Inputs
from training.stages.transformer import train_transformer

COLOURS = {"adamw": "#8a8a8a", "muon": "#c0392b"}
D_HEAD = 64
VALIDATIONS = 5
"""In a run."""
VALIDATION_SAMPLES = 64
"""In each of them."""
PAPER = OptimizerConfig()
"""The paper's settings, but for the kind."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    optimizer: OptimizerKind
    width: int
    global_batch: int
    learning_rate: float
    """The highest."""
    seed: int

    def recipe(self, steps: int, init_scale: float) -> Recipe:
        """Return what `dalle-train transformer` is told."""
        base = recipe("icons-cpu")
        train = base.transformer.train
        every = math.ceil(steps / VALIDATIONS)
        train = dataclasses.replace(
            train,
            steps=steps,
            global_batch=self.global_batch,
            seed=self.seed,
            optimizer=dataclasses.replace(PAPER, kind=self.optimizer),
            learning_rate=train.learning_rate.stretched(steps / train.steps).with_peak(self.learning_rate),
            log_every=every,
            validate_every=every,
            validation_samples=VALIDATION_SAMPLES,
            sample_every=0,
        )
        model = dataclasses.replace(base.transformer.model, d_model=self.width, n_heads=self.width // D_HEAD)
        transformer = dataclasses.replace(base.transformer, model=model, train=train, init_scale=init_scale)
        return dataclasses.replace(base, transformer=transformer)


def curve(lines: Iterable[dict[str, Any]], tokens_per_step: int) -> dict[str, list[float]]:
    """Return the steps of a run's validations, the seconds of training until then, and the losses.

    Args:
        lines: of its metrics.jsonl.
        tokens_per_step: positions of all streams of a batch.
    """
    found: dict[str, list[float]] = {"steps": [], "seconds": [], "losses": []}
    seconds, before = 0.0, 0
    for line in sorted(lines, key=lambda line: (line["step"], line["split"] == "validation")):
        if line["split"] == "train":
            seconds += (line["step"] - before) * tokens_per_step / line["tokens_per_s"]
            before = line["step"]
        elif line["split"] == "validation":
            for name, value in (("steps", line["step"]), ("seconds", seconds), ("losses", line["loss"])):
                found[name].append(value)
    return found


def measured(trial: Trial, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Train, and return the curve."""
    chosen = trial.recipe(arguments.steps, arguments.init_scale)
    bundle = arguments.bundle
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(data=arguments.data, validation=arguments.validation, out=Path(folder))
        directory = train_transformer(
            chosen, inputs, join(), say, tokenizer=bundle / "tokenizer.json", dvae=bundle / "dvae"
        )
        tokens = chosen.transformer.train.global_batch * DALLE.load(directory).config.stream.length
        return curve(read_metrics(inputs.run_directory("transformer")), tokens)


def best_rate(runs: Sequence[dict[str, Any]]) -> float:
    """Return the learning rate whose runs have the lowest last loss, in the mean over seeds."""
    rates = sorted({run["learning_rate"] for run in runs})
    return float(min(rates, key=lambda rate: mean(run["losses"][-1] for run in runs if run["learning_rate"] == rate)))


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss by steps and by seconds, a row for each width and a line for each seed."""
    import matplotlib  # only for the plot, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = sorted({run["width"] for run in runs})
    figure, rows = pyplot.subplots(
        len(widths), 2, figsize=(8.4, 3.4 * len(widths)), dpi=120, layout="constrained", squeeze=False
    )
    for (left, right), width in zip(rows, widths, strict=True):
        for optimizer, colour in COLOURS.items():
            of = [run for run in runs if run["width"] == width and run["optimizer"] == optimizer]
            rate = best_rate(of)
            for number, run in enumerate(one for one in of if one["learning_rate"] == rate):
                label = f"{optimizer}, {rate:g}" if number == 0 else None
                left.plot(run["steps"], run["losses"], color=colour, label=label)
                right.plot(run["seconds"], run["losses"], color=colour)
        batch = next(run["global_batch"] for run in runs if run["width"] == width)
        left.set_ylabel(f"validation loss, width {width}, batch {batch}")
        left.legend(frameon=False)
        for axes, name in ((left, "steps"), (right, "seconds of training")):
            axes.set_xlabel(name)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Measure what the command line says, write the JSON after each run, and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="bundle with the tokenizer and the dVAE")
    parser.add_argument("--data", nargs="+", required=True, help="shards of image tokens to train on")
    parser.add_argument("--validation", nargs="+", required=True, help="shards of image tokens to validate on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--init-scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/optimizers.png")
    arguments = parser.parse_args()
    if wrong := [width for width in arguments.widths if width < D_HEAD or width % D_HEAD]:
        parser.error(f"--widths must be multiples of {D_HEAD}, the width of a head, got {wrong}")
    runs: list[dict[str, Any]] = []
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]
        runs = [run for run in before if run["width"] not in arguments.widths]
    record = {"machine": machine(), "versions": versions(), "commit": commit(), "init_scale": arguments.init_scale}
    every = itertools.product(arguments.widths, arguments.learning_rates, arguments.seeds, get_args(OptimizerKind))
    for width, rate, seed, optimizer in every:
        trial = Trial(
            optimizer=optimizer, width=width, global_batch=arguments.global_batch, learning_rate=rate, seed=seed
        )
        say(f"optimizers: {trial}")
        runs.append(dataclasses.asdict(trial) | measured(trial, arguments))
        arguments.out.write_text(json.dumps(record | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
        print(f"{trial}: {runs[-1]['losses'][-1]:.4f} after {runs[-1]['seconds'][-1]:.0f} s", flush=True)
    draw(runs, arguments.plot)


if __name__ == "__main__":
    main()
