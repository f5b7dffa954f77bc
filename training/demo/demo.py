"""The demonstration: the whole system trained on the built-in world, sampled, reranked and checked, in minutes.

Every part goes through the code of the large runs: shards, tokenizer, dVAE, CLIP, transformer, pipeline. What is
special is only that the pictures are drawn (`drawings/shapes.py`), so that a checker can say whether a sample is right,
also for combinations never trained.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dalle.data.reader import ShardData
from dalle.evaluation.bundle import evaluate
from dalle.output.sheets import save_png
from dalle.output.text import Say, duration
from dalle.pipeline import Pipeline
from storage.atomic import replace_text
from training.data.shards import write_shards
from training.demo.samples import (
    CAPTIONS_PER_SPLIT,
    FIGURE_CANDIDATES,
    FIGURE_CAPTIONS,
    FIGURE_SPLIT,
    SPLITS,
    check_samples,
    different_captions,
    draw_curves,
    figure_of,
    samples_sheet,
    summary,
    table_of,
)
from training.drawings.drawing import DrawnSample, draw_world
from training.drawings.shapes import WORLD_VERSION
from training.plan.machine import MachinePlan, seconds_alone, usable_cores
from training.ranks.ranks import Ranks
from training.ranks.side_by_side import TimeLeft
from training.recipes import Recipe
from training.run_files import CHECKPOINTS
from training.stages.all import run_phases, time_of
from training.stages.clip import train_clip
from training.stages.dvae import train_dvae
from training.stages.exchanged_captions import exchanged_captions_table
from training.stages.inputs import Inputs, forget_runs
from training.stages.locks import bundle_lock
from training.stages.tokenizer import train_tokenizer
from training.stages.transformer import train_transformer

N_TRAIN, N_VALIDATION = 16_000, 256
WORLD_S, SAMPLES_S = 18.0, 225.0
"""Seconds that drawing and sampling take on two CPU cores; only proportions matter."""
TABLE = "table.json"
"""Written last, once a demonstration is finished."""
SHARE_OF_THREE = 0.0
"""Share of the pictures with three things in a row: none, because a tenth is too few to learn in these minutes."""


def run_demo(
    recipe: Recipe,
    out: Path,
    ranks: Ranks,
    say: Say,
    *,
    fresh: bool = False,
    plan: MachinePlan | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Make the world, train everything on it, and write bundle, sheet and table to `out`; what is there is reused.

    Args:
        recipe: of all stages.
        out: the bundle's directory.
        ranks: one, this process.
        say: told how far it is.
        fresh: make everything anew.
        plan: which stages are trained side by side, in child processes; None, or one without phases, for one at a
            time, in this process.
        options: of the command of each stage, by its name, which say what `recipe` says besides its name.

    Raises:
        ValueError: there is more than one rank, or another job trains in `out`.
        Interrupted, OSError: as `run_jobs`, or as the stages.
    """
    require_one_process(ranks)
    plan = plan or MachinePlan(seconds=seconds_alone(recipe))
    if plan.reason:
        say(plan.reason)
    time_left = TimeLeft([[{"world": WORLD_S}], *time_of(plan), [{"samples": SAMPLES_S}]])

    def begin(part: str, what: str) -> None:
        say(f"\n{what} ({time_left})")
        time_left.begin(part)

    with bundle_lock(out):
        (out / TABLE).unlink(missing_ok=True)
        begin("world", f"drawing {N_TRAIN + N_VALIDATION:,} captioned pictures")
        train, validation = _world_shards(out / "world", recipe.dvae.model.image_size, fresh=fresh, say=say)
        time_left.end("world")
        inputs = Inputs(data=[train], validation=[validation], out=out, fresh=fresh)
        if plan.phases:
            run_phases(recipe, inputs, plan, time_left, say, options=options)
        else:
            _train_here(recipe, inputs, ranks, say, time_left, begin)
        begin("samples", "sampling, reranking and checking")
        _finish(out, validation, say)
    took = duration(time_left.elapsed_s())
    say(f"\nthe demonstration took {took} (this time; finished parts are reused)")


def require_one_process(ranks: Ranks) -> None:
    """Raise ValueError if a launcher started several processes."""
    if ranks.size > 1:
        raise ValueError(
            f"the demonstration runs in one process, and a launcher started it in {ranks.size}: start it without one"
        )


def is_finished(out: Path) -> bool:
    """Return whether a demonstration was made to its end in a folder."""
    return (out / TABLE).is_file()


def _train_here(
    recipe: Recipe,
    inputs: Inputs,
    ranks: Ranks,
    say: Say,
    time_left: TimeLeft,
    begin: Callable[[str, str], None],
) -> None:
    """Train one stage after the other in this process."""

    def heard(line: str) -> None:
        time_left.hear(line)
        say(line)

    begin("tokenizer", "training the tokenizer")
    if inputs.fresh or not (inputs.out / "tokenizer.json").is_file():
        train_tokenizer(recipe, inputs, heard)
    time_left.end("tokenizer")
    begin("dvae", "training the dVAE: pictures to tokens and back")
    train_dvae(recipe, inputs, ranks, heard)
    time_left.end("dvae")
    begin("clip", "training CLIP, which will rank the samples")
    train_clip(recipe, inputs, ranks, heard)
    time_left.end("clip")
    begin("transformer", "training the transformer on captions and image tokens")
    train_transformer(recipe, inputs, ranks, heard)
    time_left.end("transformer")


def _world_shards(folder: Path, size: int, *, fresh: bool, say: Say) -> tuple[Path, Path]:
    """Draw the world into shards, unless they are there. Drawn afresh, all that was trained on them is forgotten.

    It is forgotten on the disk, and first, so that a demonstration interrupted later never goes on from it.

    Raises:
        ValueError: another world is there, as of an earlier version of this program, or runs without a world, which
            are not the demonstration's.
    """
    note = folder / "world.json"
    if not fresh and note.is_file():
        require_this_world(folder, size)
        say(f"the world is in {folder}")
        return folder / "train", folder / "validation"
    if not note.is_file() and any((folder.parent / "training").glob(f"*/{CHECKPOINTS}")):
        raise ValueError(f"{folder.parent} holds runs that are not a demonstration's: give another --out")
    if fresh:
        forget_runs(folder.parent)
        (folder.parent / "tokenizer.json").unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    for name, count, seed in (("train", N_TRAIN, 0), ("validation", N_VALIDATION, 1)):
        write_shards(_drawings(count, seed, size, say), folder / name, "world", 4_000, overwrite=True)
    replace_text(note, _made_of(size))
    say(f"drew the world into {folder}")
    return folder / "train", folder / "validation"


def require_this_world(folder: Path, size: int) -> None:
    """Raise ValueError if a folder holds another world than this version draws; FileNotFoundError if none."""
    made_of = (folder / "world.json").read_text()
    if made_of != _made_of(size):
        raise ValueError(
            f"{folder.parent} holds a demonstration of another world than this version draws, and both must not be "
            f"mixed ({made_of}, expected {_made_of(size)}): give another --out, or --fresh to replace it"
        )


def _made_of(size: int) -> str:
    return json.dumps({"train": N_TRAIN, "validation": N_VALIDATION, "size": size, "version": WORLD_VERSION})


def _drawings(count: int, seed: int, size: int, say: Say) -> Iterator[DrawnSample]:
    drawn = draw_world(count, seed, size=size, share_of_three=SHARE_OF_THREE, processes=usable_cores())
    for number, sample in enumerate(drawn, 1):
        yield sample
        if number % 4_000 == 0:
            say(f"drew {number:,}/{count:,}")


def _finish(out: Path, validation: Path, say: Say) -> None:
    """Measure the bundle, check its samples, and write the sheet, the curves and the tables."""
    pipe = Pipeline.load(out)
    evaluation = evaluate(pipe, ShardData.open([validation], captions=True))
    samples, sections = [], []
    for split in SPLITS:
        captions = different_captions(split, CAPTIONS_PER_SPLIT, share_of_three=SHARE_OF_THREE)
        checked, shown = check_samples(pipe, split, captions, say)
        samples.append(checked)
        sections += shown
    captions = different_captions(FIGURE_SPLIT, FIGURE_CAPTIONS, share_of_three=SHARE_OF_THREE)
    figure, _ = check_samples(pipe, FIGURE_SPLIT, captions, say, n=FIGURE_CANDIDATES)
    save_png(samples_sheet(sections, pipe), out / "sheet.png")
    draw_curves([*samples, figure], out / "curves.png")
    exchanged = exchanged_captions_table(pipe.clip)
    table = f"{table_of(samples)}\n\n{figure_of(figure)}\n\n{exchanged.table()}\n\n"
    table += f"measured on {evaluation.samples} pictures not trained on:\n{evaluation.table()}"
    replace_text(out / "table.txt", table + "\n")
    numbers = {
        "sampling": str(pipe.defaults),
        "samples": summary(samples),
        "figure_9c": summary([figure]),
        "exchanged_captions": dataclasses.asdict(exchanged),
        "evaluation": dataclasses.asdict(evaluation),
    }
    replace_text(out / TABLE, json.dumps(numbers, indent=2))
    say(f"\n{table}\n")
    say(f"bundle: {out}\nsheet:  {out / 'sheet.png'}\ncurves: {out / 'curves.png'}\ntable:  {out / 'table.txt'}")
