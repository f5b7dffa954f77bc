"""Edits on the built-in world: one of two things gets another colour or shape; how often is that right?

python -m benchmarks.editing --bundle runs/demo

A picture of two things is drawn, the square around one of them is masked, and the caption asks for another colour or
another shape there; or only the upper half of the square is masked, and the caption stays. Right is what the checker of
the world reads from the best of N by CLIP. Beside the particles stands naive forcing: the same proposals with the kept
tokens put in their places, and no weights.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.measure import RESULTS, Table, commit, machine, text_table, versions
from dalle.best_of_n import Best, Candidates
from dalle.editing.edit import known_tokens
from dalle.editing.regions import Region
from dalle.family.tokenizers import text_of
from dalle.pipeline import Pipeline
from dalle.sampler.particles import fill
from dalle.sampling import candidate_seed
from dvae.images import to_image
from training.drawings.shape_checker import check
from training.drawings.shapes import COLOURS, OUTLINES, Scene, caption, draw, held_out_reason, random_scene

HALF_SIDE = 15.0 / 64
"""Of the masked square, as a share of the picture's side: a large thing reaches 13.8 / 64."""

KINDS = ("another colour", "another shape", "upper half")
"""Of edits: the first two ask for something else in the square, the last one for the same thing of which only the lower
half is kept, so that what is kept comes after what is drawn."""

Case = tuple[Image.Image, NDArray[np.bool_], str]
"""A picture, what is drawn anew, and the caption of the whole."""


def cases(kind: str, n: int, size: int) -> list[Case]:
    """Draw n pictures of trained combinations with an edit of each that is one, too."""
    rng = np.random.default_rng(np.random.SeedSequence((14, KINDS.index(kind))))
    found: list[Case] = []
    while len(found) < n:
        scene = random_scene(rng, share_of_three=0.0)
        number = len(found) % 2
        wanted = _changed(scene, number, kind, rng)
        if held_out_reason(wanted) is not None or wanted.things[0].pair == wanted.things[1].pair:
            continue
        along, across = 0.25 + 0.5 * number, 0.5
        x, y = (along, across) if scene.relation == "left of" else (across, along)
        at = (np.arange(size) + 0.5) / size
        lowest = 0.0 if kind == "upper half" else HALF_SIDE
        rows, columns = (at > y - HALF_SIDE) & (at < y + lowest), np.abs(at - x) < HALF_SIDE
        found.append((draw(scene, rng, size=size), rows[:, None] & columns, caption(wanted, rng)))
    return found


def _changed(scene: Scene, number: int, kind: str, rng: np.random.Generator) -> Scene:
    """Return a scene of which a thing has another colour or shape."""
    if kind == "upper half":
        return scene
    what, words = ("colour", list(COLOURS)) if kind == "another colour" else ("shape", list(OUTLINES))
    things = list(scene.things)
    others = [word for word in words if word != getattr(things[number], what)]
    things[number] = replace(things[number], **{what: others[int(rng.integers(len(others)))]})
    return replace(scene, things=tuple(things))


def by_particles(pipe: Pipeline, case: Case, n: int) -> Tensor:
    """Return the different ones that were drawn by weight of n particles, best first by CLIP."""
    return pipe.edit(*case, n=n, keep=n).images


def by_forcing(pipe: Pipeline, case: Case, n: int) -> Tensor:
    """Return n candidates into which the kept tokens are put, whatever they were drawn after, best first by CLIP."""
    image, mask, told = case
    region = Region.of(image, mask, pipe.dvae.config.image_size)
    known = known_tokens(pipe, region)
    seeds = [candidate_seed(0, told, k) for k in range(n)]
    text = text_of(pipe.tokenizer, [told], pipe.dalle)
    forced = fill(pipe.dalle, text, known, seeds, pipe.defaults.sampling(0), resample_below=0)
    judge, best = pipe.judge(told, region.paste), Best(n, "clip")
    judge.judge(best, Candidates(torch.arange(n), forced.tokens, forced.log_likelihoods))
    return judge.result(best).images


WAYS: dict[str, Callable[[Pipeline, Case, int], Tensor]] = {"naive forcing": by_forcing, "particles": by_particles}
MEASURES = ("right", "each_right", "exact", "seam", "original_seam", "different", "seconds")
"""Of the best by CLIP; of each candidate; whether its kept pixels are exact; seams of each; how many there are."""


def measure(pipe: Pipeline, edits: list[Case], n: int) -> dict[str, dict[str, float]]:
    """Return the means of `MEASURES` for each way, of the seconds the median.

    The ways take turns on every case, so that a busy machine slows both alike.
    """
    sums: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for case in edits:
        region = Region.of(case[0], case[1], pipe.dvae.config.image_size)
        for way, edit in WAYS.items():
            begun = time.perf_counter()
            images = edit(pipe, case, n)
            took = time.perf_counter() - begun
            rights = [check(to_image(pixels), case[2]).right for pixels in images]
            is_exact = torch.equal(images[0][:, ~region.is_new], region.pixels[:, ~region.is_new])
            seam = float(region.seams(images).mean())
            shares = [float(rights[0]), float(np.mean(rights)), float(is_exact)]
            sums[way].append([*shares, seam, region.original_seam, float(len(images)), took])
    found = {way: dict(zip(MEASURES, np.mean(rows, axis=0).tolist(), strict=True)) for way, rows in sums.items()}
    for way, rows in sums.items():
        found[way]["seconds"] = float(np.median([row[-1] for row in rows]))
    return found


def main() -> None:
    """Measure at every number of candidates, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, nargs="+", default=[Path("runs/demo")], help="of the demonstration")
    parser.add_argument("--edits", type=int, default=32, help="pictures of each kind of edit")
    parser.add_argument("--n", type=int, nargs="+", default=[16], help="candidates, or particles")
    parser.add_argument("--temperatures", type=float, nargs="+", help="by default the bundle's")
    parser.add_argument("--out", type=Path, default=RESULTS / "editing.json")
    arguments = parser.parse_args()
    runs: list[dict[str, object]] = []
    heads = [
        "bundle",
        "temperature",
        "edit",
        "candidates",
        "",
        "best right",
        "each right",
        "seam",
        "of the original",
        "time",
    ]
    rows: list[list[str]] = []
    for bundle, given, kind, n in product(arguments.bundle, arguments.temperatures or [None], KINDS, arguments.n):
        pipe = Pipeline.load(bundle)
        pipe.defaults = pipe.defaults.updated(temperature=given)
        setting = {"bundle": bundle.name, "temperature": pipe.defaults.temperature, "kind": kind, "n": n}
        found = measure(pipe, cases(kind, arguments.edits, pipe.dvae.config.image_size), n)
        runs.append({**setting, "edits": arguments.edits, **found})
        base = found["naive forcing"]["seconds"]
        for way, of in found.items():
            rights = [f"{of['right']:.1%}", f"{of['each_right']:.1%}"]
            seams = [f"{of['seam']:.1f}", f"{of['original_seam']:.1f}"]
            rows.append([*map(str, setting.values()), way, *rights, *seams, f"{of['seconds'] / base:.2f}×"])
            print(*rows[-1], f"{of['different']:.1f} different", flush=True)
        record = {"machine": machine(), "versions": versions(), "commit": commit(), "runs": runs}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text_table(Table(title="Edits", columns=heads, rows=rows)))


if __name__ == "__main__":
    main()
