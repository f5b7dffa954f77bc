"""DALL·E 2 beside DALL·E on the built-in world: who binds a colour to the right thing, what sampling takes, and more.

python -m benchmarks.unclip --bundle runs/demo

The bundle holds both models, trained on the same world. Captions have two things of different colours and shapes, as
"a red cube on a blue ball" has. The checker reads from each picture whether all colours and shapes are there, and
whether each shape has its own colour. Then the time of a picture is measured, by sampler, steps and batch, and all that
DALL·E 2 does as `dalle-train demo --unclip` measures it, on more captions and pictures.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import RESULTS, Table, commit, machine, text_table, versions
from dalle.pipeline import Pipeline
from dalle.unclip.pipeline import UnCLIP
from dvae.images import to_image
from rerank import score
from storage.models.directory import read_config
from training.demo.unclip import DRAWING, measure, some_scenes, words
from training.drawings.shape_checker import difference, read_scene
from training.drawings.shapes import Scene, caption
from unclip.decoder import KIND as DECODER
from unclip.decoder import DecoderConfig
from unclip.decoding import decode
from unclip.sampling import Noise, Sampler

CANDIDATES = 16
SAMPLERS: tuple[tuple[Sampler, int], ...] = (("ddim", 10), ("ddim", 25), ("ddim", 50), ("ddpm", 250))
HALF: tuple[Sampler, int] = ("ddim", 25)
"""What is also timed in bfloat16."""
BATCHES = (1, 16)
BINDING = ("parts", "bound", "right")
"""Both colours and both shapes are there; each shape has its colour; all that the caption says is right."""

Draw = Callable[[str], Tensor]
"""Returns candidates of a caption, (N, 3, H, W) in [0, 1]."""


def bound(image: Tensor, scene: Scene) -> tuple[bool, bool, bool]:
    """Return `BINDING` of a picture (3, H, W)."""
    found, told = read_scene(to_image(image)), scene.canonical()
    parts = all(sorted(map(str, words(found, name))) == sorted(map(str, words(told, name))) for name in _THINGS)
    pairs = sorted((str(thing.colour), str(thing.shape)) for thing in found.things)
    each = pairs == sorted(thing.pair for thing in told.things)
    return parts, each, difference(told, found) is None


_THINGS = ("colour", "shape")


def binding(draw: Draw, clip: torch.nn.Module, scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the shares of `BINDING`, of each candidate and of the best by CLIP, and the seconds of a caption."""
    rng, rows, begun = np.random.default_rng(31), [], time.perf_counter()
    for scene in scenes:
        told = caption(scene, rng)
        images = draw(told)
        found = np.array([bound(image, scene) for image in images], dtype=float)
        best = int(score(clip, [told], images)[0].argmax())  # type: ignore[arg-type]
        rows.append([*found.mean(axis=0), *found[best]])
    names = [*(f"{name}, each" for name in BINDING), *(f"{name}, best" for name in BINDING)]
    shares = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    return {**shares, "seconds": (time.perf_counter() - begun) / len(scenes)}


def sampling_times(unclip: UnCLIP, samplers: Sequence[tuple[Sampler, int]] = SAMPLERS) -> dict[str, float]:
    """Return seconds for a picture, by sampler, steps and batch, with guidance; the median of three."""
    text, found = unclip.captioned("a large red circle left of a large blue square on a white background"), {}
    for sampler, steps in samplers:
        for batch in BATCHES:
            times = []
            for _ in range(3):
                begun, told = time.perf_counter(), text.repeated(batch)
                noise = Noise.of(0, "", range(batch))
                decode(unclip.decoder, told.features, told, noise, steps=steps, sampler=sampler, guidance=2.0)
                times.append((time.perf_counter() - begun) / batch)
            found[f"{sampler}, {steps} steps, {batch} at once"] = float(np.median(times))
    return found


def main() -> None:
    """Measure both models, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("runs/demo"), help="of the demonstration, with DALL·E 2")
    parser.add_argument("--captions", type=int, default=24, help="of each kind")
    parser.add_argument("--pictures", type=int, default=16, help="that are varied, changed, blended and edited; even")
    parser.add_argument("--out", type=Path, default=RESULTS / "unclip.json")
    arguments = parser.parse_args()
    if arguments.pictures % 2:
        parser.error("--pictures is odd, and pictures are blended in pairs")
    size = read_config(arguments.bundle / "decoder", DECODER, DecoderConfig).picture_size
    dalle, unclip = Pipeline.load(arguments.bundle), UnCLIP.load(arguments.bundle, size=size)
    record: dict[str, object] = {"machine": machine(), "versions": versions(), "commit": commit()}

    def by_dalle(told: str) -> Tensor:
        return dalle.decode(dalle.sample_tokens([told], CANDIDATES).tokens[0])

    def by_unclip(told: str) -> Tensor:
        guidance = DRAWING.guidance_or()
        return unclip.generate(told, n=CANDIDATES, keep=CANDIDATES, steps=DRAWING.steps, guidance=guidance).images

    scenes = [
        scene
        for scene in some_scenes(8 * arguments.captions, "trained", seed=30)
        if len(set(words(scene, "colour"))) == len(set(words(scene, "shape"))) == 2
    ][: arguments.captions]
    models = {"DALL·E": by_dalle, "DALL·E 2": by_unclip}
    record["binding"] = shares = {name: binding(draw, unclip.clip, scenes) for name, draw in models.items()}
    rows = [
        [name, *(f"{value:.1%}" for value in list(of.values())[:-1]), f"{of['seconds']:.1f} s"]
        for name, of in shares.items()
    ]
    print(text_table(Table(title="Binding", columns=["", *list(shares["DALL·E"])], rows=rows)), flush=True)
    record["sampling"] = times = sampling_times(unclip)
    half = UnCLIP.load(arguments.bundle, size=size, precision="bf16")
    times |= {f"bf16, {name}": seconds for name, seconds in sampling_times(half, [HALF]).items()}
    rows = [[name, f"{1000 * seconds:.0f} ms"] for name, seconds in times.items()]
    print(text_table(Table(title="The decoder, a picture", columns=["", "time"], rows=rows)), flush=True)
    folder = arguments.bundle / "unclip-measured"
    measure(arguments.bundle, folder, print, n_captions=arguments.captions, n_pictures=arguments.pictures)
    record["all"] = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
