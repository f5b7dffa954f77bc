"""The demonstration: the whole system trained on the built-in world, sampled, reranked and checked, in minutes.

Every part goes through the code of the large runs: shards, tokenizer, dVAE, CLIP, transformer, pipeline. What is
special is only that the pictures are drawn (`training/shapes.py`), so that a checker can say whether a sample is right,
also for combinations never trained.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dalle.gallery import contact_sheet
from dalle.pipeline import Pipeline
from dalle.progress import duration
from dvae.images import to_image
from rerank import score
from training.checkpoints import replace_text
from training.data import ShardData
from training.drawing import DrawnSample, draw_world
from training.evaluate import evaluate
from training.machine import MachinePlan, seconds_alone, usable_cores
from training.metrics import Report
from training.programs import (
    Inputs,
    forget_runs,
    run_phases,
    time_of,
    train_clip,
    train_dvae,
    train_tokenizer,
    train_transformer,
)
from training.recipes import Recipe
from training.shape_checker import check
from training.shapes import Split, caption, random_scene
from training.shard_index import expand_shards
from training.shards import write_shards
from training.side_by_side import TimeLeft
from training.world import World

N_TRAIN, N_VALIDATION = 16_000, 256
CANDIDATES = 16
CAPTIONS_PER_SPLIT = 64
WORLD_S, SAMPLES_S = 18.0, 60.0
"""Seconds that drawing and sampling take on two CPU cores; only proportions matter."""
SHARE_OF_THREE = 0.0
"""Three things in a row would be a tenth of the pictures, too few to learn in these minutes."""
SPLITS: dict[Split, str] = {
    "trained": "trained combinations",
    "pair": "held out: colour and shape never seen together",
    "relation": "held out: two things never seen in this relation",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many samples the checker accepts, for captions of one kind; fractions."""

    split: str
    captions: int
    best_of_1: float
    """A sample taken without reranking: the mean over all candidates."""
    best_of_16: float
    """The candidate that CLIP puts first."""
    any_of_16: float
    """At least one candidate: what a perfect reranker would reach."""


def run_demo(
    recipe: Recipe,
    out: Path,
    place: World,
    report: Report,
    *,
    fresh: bool = False,
    plan: MachinePlan | None = None,
) -> None:
    """Make the world, train everything on it, and write bundle, sheet and table to `out`; what is there is reused.

    Args:
        recipe: of all stages.
        out: the bundle's directory.
        place: of this process, the only one.
        report: told how far it is.
        fresh: make everything anew.
        plan: which stages are trained side by side, in child processes; None, or one without phases, for one at a
            time, in this process.

    Raises:
        ValueError: there is more than one rank.
        Interrupted, OSError: as `run_jobs`, or as the stages.
    """
    if place.size > 1:
        raise ValueError(
            f"the demonstration runs in one process, and a launcher started it in {place.size}: start it without one"
        )
    plan = plan or MachinePlan(seconds=seconds_alone(recipe))
    if plan.reason:
        report(plan.reason)
    seconds = plan.seconds
    dvae = {name: seconds[name] for name in ("dvae-warmup", "dvae") if name in seconds}
    one_at_a_time = [
        [{"tokenizer": seconds["tokenizer"]}],
        [dvae],
        *([{n: seconds[n]}] for n in ("clip", "transformer")),
    ]
    phases = time_of(plan) if plan.phases else one_at_a_time
    time_left = TimeLeft([[{"world": WORLD_S}], *phases, [{"samples": SAMPLES_S}]])

    def begin(part: str, what: str) -> None:
        report(f"\n{what} ({time_left})")
        time_left.begin(part)

    begin("world", f"drawing {N_TRAIN + N_VALIDATION:,} captioned pictures")
    train, validation = _world_shards(out / "world", recipe.dvae.model.image_size, fresh=fresh, report=report)
    time_left.end("world")
    inputs = Inputs(data=[train], validation=[validation], out=out, fresh=fresh)
    if plan.phases:
        run_phases(recipe, inputs, plan, time_left, report)
    else:
        _train_here(recipe, inputs, place, report, time_left, begin)
    begin("samples", "sampling, reranking and checking")
    _finish(out, validation, report)
    took = duration(time_left.elapsed_s())
    report(f"\nthe demonstration took {took} (this time; finished parts are reused)")


def _train_here(
    recipe: Recipe,
    inputs: Inputs,
    place: World,
    report: Report,
    time_left: TimeLeft,
    begin: Callable[[str, str], None],
) -> None:
    """Train one stage after the other in this process."""

    def heard(line: str) -> None:
        time_left.hear(line)
        report(line)

    begin("tokenizer", "training the tokenizer")
    if inputs.fresh or not (inputs.out / "tokenizer.json").is_file():
        train_tokenizer(recipe, inputs, heard)
    time_left.end("tokenizer")
    begin("dvae", "training the dVAE: pictures to tokens and back")
    train_dvae(recipe, inputs, place, heard)
    time_left.end("dvae")
    begin("clip", "training CLIP, which will rank the samples")
    train_clip(recipe, inputs, place, heard)
    time_left.end("clip")
    begin("transformer", "training the transformer on captions and image tokens")
    train_transformer(recipe, inputs, place, heard)
    time_left.end("transformer")


def _world_shards(folder: Path, size: int, *, fresh: bool, report: Report) -> tuple[Path, Path]:
    """Draw the world into shards, unless they are there; what was trained on an earlier world is then forgotten.

    It is forgotten on the disk, and first, so that a demonstration interrupted later never goes on from it. Runs beside
    no world are not the demonstration's, and stay.
    """
    made_of = {"train": N_TRAIN, "validation": N_VALIDATION, "size": size, "version": 3}
    note = folder / "world.json"
    if not fresh and note.is_file() and note.read_text() == json.dumps(made_of):
        report(f"the world is in {folder}")
        return folder / "train", folder / "validation"
    if fresh or note.is_file():
        forget_runs(folder.parent)
        (folder.parent / "tokenizer.json").unlink(missing_ok=True)
        note.unlink(missing_ok=True)
    for name, count, seed in (("train", N_TRAIN, 0), ("validation", N_VALIDATION, 1)):
        write_shards(_drawings(count, seed, size, report), folder / name, "world", 4_000, overwrite=True)
    replace_text(note, json.dumps(made_of))
    report(f"drew the world into {folder}")
    return folder / "train", folder / "validation"


def _drawings(count: int, seed: int, size: int, report: Report) -> Iterator[DrawnSample]:
    drawn = draw_world(count, seed, size=size, share_of_three=SHARE_OF_THREE, processes=usable_cores())
    for number, sample in enumerate(drawn, 1):
        yield sample
        if number % 4_000 == 0:
            report(f"drew {number:,}/{count:,}")


def _finish(out: Path, validation: Path, report: Report) -> None:
    """Measure the bundle, check its samples, and write the sheet and the tables."""
    pipe = Pipeline.load(out)
    evaluation = evaluate(pipe, ShardData.open(expand_shards([validation]), captions=True))
    scores, sections = [], []
    for split, meaning in SPLITS.items():
        result, examples = check_samples(pipe, split, CAPTIONS_PER_SPLIT, report)
        scores.append(result)
        sections.extend([(f"{meaning}: {caption}", images, labels) for caption, images, labels in examples])
    contact_sheet(sections, title="best 4 of 16 by CLIP, and what the checker says of each").save(out / "sheet.png")
    table = table_of(scores)
    (out / "table.txt").write_text(table + "\n\n" + evaluation.table() + "\n")
    summary = {"samples": [dataclasses.asdict(entry) for entry in scores], "evaluation": dataclasses.asdict(evaluation)}
    (out / "table.json").write_text(json.dumps(summary, indent=2))
    report(f"\n{table}\n\nmeasured on {evaluation.samples} pictures not trained on:\n{evaluation.table()}\n")
    report(f"bundle: {out}\nsheet:  {out / 'sheet.png'}\ntable:  {out / 'table.txt'}")


Example = tuple[str, list[Image.Image], list[str]]
"""A caption, its best pictures, and their labels."""


def check_samples(pipe: Pipeline, split: Split, n_captions: int, report: Report) -> tuple[Score, list[Example]]:
    """Sample captions of one kind, rerank, and let the checker decide.

    Returns:
        The score, and three examples: caption, the four best pictures, their labels.
    """
    rng = np.random.default_rng(np.random.SeedSequence((7, list(SPLITS).index(split))))
    captions: dict[str, None] = {}
    while len(captions) < n_captions:
        scene = random_scene(rng, split=split, share_of_three=SHARE_OF_THREE)
        captions.setdefault(caption(scene, rng))
    rights: list[list[bool]] = []
    firsts: list[bool] = []
    examples: list[Example] = []
    grid = pipe.dvae.config.grid
    for start in range(0, n_captions, 16):
        group = list(captions)[start : start + 16]
        tokens = pipe.sample_tokens(group, CANDIDATES).tokens
        for told, candidates in zip(group, tokens, strict=True):
            with torch.no_grad():
                images = pipe.dvae.decode(candidates.unflatten(1, (grid, grid)))
            ranking = score(pipe.clip, [told], images)[0].argsort(descending=True).tolist()
            pictures = [to_image(image) for image in images]
            right = [check(picture, told).right for picture in pictures]
            rights.append(right)
            firsts.append(right[ranking[0]])
            if len(examples) < 3:
                best = ranking[:4]
                examples.append((told, [pictures[k] for k in best], ["right" if right[k] else "wrong" for k in best]))
        report(f"{SPLITS[split]}: checked {min(start + 16, n_captions)}/{n_captions} captions")
    matrix = np.asarray(rights)
    result = Score(
        split=SPLITS[split],
        captions=n_captions,
        best_of_1=float(matrix.mean()),
        best_of_16=float(np.mean(firsts)),
        any_of_16=float(matrix.any(axis=1).mean()),
    )
    return result, examples


def table_of(scores: Sequence[Score]) -> str:
    """Return the scores as an aligned table."""
    lines = [f"{'right by the checker':<52} {'captions':>8} {'best of 1':>10} {'best of 16':>11} {'any of 16':>10}"]
    for entry in scores:
        shares = f"{entry.best_of_1:>10.1%} {entry.best_of_16:>11.1%} {entry.any_of_16:>10.1%}"
        lines.append(f"{entry.split:<52} {entry.captions:>8} {shares}")
    return "\n".join(lines)
