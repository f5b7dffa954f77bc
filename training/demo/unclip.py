"""DALL·E 2 beside the demonstration's DALL·E: prior and decoder trained on the same world, and all they do measured.

It reads the CLIP and the dVAE of a finished demonstration. The checker says what is right: of captions by three
embeddings (a picture's own, the caption's, the prior's), of variations, text differences, interpolations and edits.

Letters: N candidates  H, W pixels
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.output.sheets import INK, Section, contact_sheet, save_png
from dalle.output.text import Say, aligned, counted
from dalle.unclip.manipulations import CANDIDATES_BETWEEN
from dalle.unclip.parts import upsampler_chain
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing
from dvae.images import to_image, to_tensor
from rerank import score
from storage.atomic import replace_text
from storage.models.directory import read_config
from training.demo.demo import require_one_process, require_this_world
from training.demo.samples import SPLITS, marked_section
from training.drawings.shape_checker import FoundThing, Reading, check, difference, read_scene
from training.drawings.shapes import (
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    Scene,
    Split,
    Thing,
    caption,
    draw,
    held_out_reason,
    random_scene,
)
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.inputs import Inputs
from training.stages.locks import bundle_lock
from training.stages.unclip.decoder import train_decoder
from training.stages.unclip.prior import train_prior
from unclip.decoder import KIND as DECODER
from unclip.decoder import DecoderConfig
from unclip.decoding import decode, invert
from unclip.embeddings import sample_embeddings
from unclip.latents import SAME_PLACE
from unclip.sampling import Noise
from unclip.upsampler import Upsampler, upsample

Source = Literal["z_i", "z_t", "prior"]
SOURCES: dict[Source, str] = {
    "z_i": "a picture's embedding",
    "z_t": "the caption's embedding",
    "prior": "the prior's embedding",
}
"""Of the embedding that the decoder is given beside the caption."""
Attribute = Literal["colour", "shape", "background"]

CAPTIONS, CANDIDATES = 8, 16
"""Captions of each kind, and candidates of each caption."""
PICTURES = 8
"""Pictures that are varied, changed, blended and edited."""
DRAWING = Drawing(steps=10, guidance=2.0)
"""With 20 steps no more captions are drawn right, in twice the time."""
FROM_NOISE = Drawing(steps=25)
"""From a picture's own noise, without guidance."""
ETA = 0.7
THETAS, LAST_THETA = 7, 0.6
"""Pictures of a text difference, and how far the last one goes."""
BETWEEN = 9
"""Pictures of an interpolation."""
SHOWN = 4
"""Rows of a sheet."""


def run_unclip_demo(recipe: Recipe, out: Path, ranks: Ranks, say: Say, *, fresh: bool = False) -> None:
    """Train prior and decoder on the world of a finished demonstration, measure them, and write tables and sheets.

    Args:
        recipe: that has a prior and a decoder.
        out: the bundle of the demonstration.
        ranks: one, this process.
        say: told how far it is.
        fresh: train anew instead of reusing what is there.

    Raises:
        FileNotFoundError: the world, CLIP or dVAE is missing.
        ValueError: there is more than one rank, the world is another than this version draws, or another job trains in
            `out`.
    """
    require_one_process(ranks)
    world = out / "world"
    require_this_world(world, recipe.dvae.model.image_size)
    inputs = Inputs(data=[world / "train"], validation=[world / "validation"], out=out, fresh=fresh)
    with bundle_lock(out):
        say("\ntraining the prior: captions to CLIP's embeddings of pictures")
        train_prior(recipe, inputs, ranks, say)
        say("\ntraining the decoder: embeddings and captions to pictures")
        train_decoder(recipe, inputs, ranks, say)
        say("\ndrawing and checking")
        measure(out, out / "unclip", say)


def measure(bundle: Path, folder: Path, say: Say, *, n_captions: int = CAPTIONS, n_pictures: int = PICTURES) -> None:
    """Measure all that DALL·E 2 does on the world; write table.txt, table.json and a sheet of each to a folder.

    Args:
        bundle: with DALL·E 2's parts.
        folder: where they are written; made if missing.
        say: told how far it is.
        n_captions: of each kind.
        n_pictures: an even number, varied, changed, blended and edited.

    Raises:
        FileNotFoundError, ValueError: as `UnCLIP.load`.
    """
    # as the decoder draws: the world's pictures are of that size
    size = read_config(bundle / "decoder", DECODER, DecoderConfig).picture_size
    unclip = UnCLIP.load(bundle, size=size)
    upsamplers = [Upsampler.load(path).eval() for path in upsampler_chain(bundle, size)]
    scenes = list(some_scenes(n_pictures, "trained", seed=21))
    pictures = [draw(scene, np.random.default_rng(k), size=unclip.image_size) for k, scene in enumerate(scenes)]
    parts: list[tuple[str, Callable[[], Measured]]] = [
        ("captions", lambda: of_captions(unclip, say, n_captions, upsamplers)),
        ("inversion", lambda: of_inversion(unclip, pictures)),
        ("variations", lambda: of_variations(unclip, pictures, scenes)),
        ("text differences", lambda: of_differences(unclip, pictures, scenes)),
        ("interpolation", lambda: of_interpolations(unclip, pictures, scenes)),
        ("edits", lambda: of_edits(unclip, pictures, scenes)),
    ]
    folder.mkdir(exist_ok=True, parents=True)
    told, measured = [], {}
    for name, make in parts:
        measured[name] = make()
        told.append(f"{name}\n{aligned(measured[name].rows, '<>')}")
        say(f"\n{told[-1]}")
    for name, found in measured.items():
        if found.sections:
            sheet = contact_sheet(found.sections, title=f"DALL·E 2: {name}", columns=found.columns)
            save_png(sheet, folder / f"{name.replace(' ', '-')}.png")
    numbers = {name: found.numbers for name, found in measured.items()}
    replace_text(folder / "table.txt", "\n\n".join(told) + "\n")
    replace_text(folder / "table.json", json.dumps(numbers, indent=2, allow_nan=False))
    say(f"\nDALL·E 2's tables and sheets are in {folder}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one thing that DALL·E 2 does."""

    rows: list[list[str]]
    """Of a table, the head first."""
    numbers: Mapping[str, object]
    """The same for a JSON file."""
    sections: list[Section]
    """Of a sheet."""
    columns: int = 8
    """Of the sheet."""


def some_scenes(count: int, split: Split, seed: int) -> Iterator[Scene]:
    """Yield scenes of two things, always the same ones."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, list(SPLITS).index(split))))
    for _ in range(count):
        yield random_scene(rng, split=split, share_of_three=0.0)


def words(found: Reading | Scene, attribute: str) -> list[str | None]:
    """Return what is read of an attribute, in order: of both things, or of the background."""
    if attribute == "background":
        return [found.background]
    things: Sequence[FoundThing | Thing] = found.things
    return [getattr(thing, attribute) for thing in things]


def percent(share: float | np.floating[Any]) -> str:
    """Return a share for a table."""
    return f"{share:.1%}"


# ---- captions ---------------------------------------------------------------------------------------------


def of_captions(unclip: UnCLIP, say: Say, count: int, upsamplers: Sequence[Upsampler] = ()) -> Measured:
    """Measure captions of every kind, by every source of the embedding: best of 1, and best of N by CLIP.

    With upsamplers, the first candidate of each caption and the best by CLIP are enlarged, and checked again.
    """
    head = ["right by the checker", "captions", "of", "best of 1", f"best of {CANDIDATES} by CLIP", "any"]
    rows = [[*head, *(["the first, enlarged", "the best, enlarged"] if upsamplers else [])]]
    numbers: dict[str, object] = {}
    sections: list[Section] = []
    for split in get_args(Split):
        scenes = list(some_scenes(count, split, seed=22))
        rng = np.random.default_rng(23)
        told = [caption(scene, rng) for scene in scenes]
        seen = [draw(scene, rng, size=unclip.image_size) for scene in scenes]
        for source, name in SOURCES.items():
            rights, best, large = [], [], []
            for text, picture in zip(told, seen, strict=True):
                images = drawn_of_caption(unclip, text, picture, source)
                drawn = [to_image(image) for image in images]
                verdicts = [check(image, text).right for image in drawn]
                order = score(unclip.clip, [text], images)[0].argsort(descending=True, stable=True).tolist()
                rights.append(verdicts)
                best.append(verdicts[order[0]])
                if upsamplers:
                    chosen = [0, order[0]]
                    first, drawn[order[0]] = map(
                        to_image, enlarge(upsamplers, images[chosen], Noise.of(0, text, chosen))
                    )
                    large.append([check(image, text).right for image in (first, drawn[order[0]])])
                if source == "prior" and len(best) <= SHOWN:
                    sections.append(marked_section(f"{SPLITS[split]}: {text}", drawn, verdicts, order[:8]))
            one, any_of = float(np.mean(rights)), float(np.mean([any(each) for each in rights]))
            found = {"best_of_1": one, "best_by_clip": float(np.mean(best)), "any": any_of}
            if upsamplers:
                found |= dict(zip(("first_enlarged", "best_enlarged"), np.mean(large, axis=0).tolist(), strict=True))
            rows.append([SPLITS[split], str(len(told)), name, *map(percent, found.values())])
            numbers[f"{split}, {source}"] = found
            say(f"{SPLITS[split]}, {name}: best of 1 {one:.1%}, of {CANDIDATES} by CLIP {np.mean(best):.1%}")
    return Measured(rows=rows, numbers=numbers, sections=sections)


def enlarge(upsamplers: Sequence[Upsampler], images: Tensor, noise: Noise) -> Tensor:
    """Return pictures (N, 3, H, W) enlarged by upsamplers, one after the other."""
    for upsampler in upsamplers:
        images = upsample(upsampler, images, noise)
    return images


def drawn_of_caption(unclip: UnCLIP, caption: str, picture: Image.Image, source: Source) -> Tensor:
    """Return candidates of a caption, (N, 3, H, W) in [0, 1], by one source of the embedding."""
    noise = Noise.of(0, caption, range(CANDIDATES))
    text = unclip.captioned(caption).repeated(CANDIDATES)
    if source == "prior":
        embeddings = sample_embeddings(unclip.the_prior(), text, noise)
    else:
        embeddings = text.features if source == "z_t" else unclip.seen(picture).embedding.expand(CANDIDATES, -1)
    return decode(unclip.decoder, embeddings, text, noise, steps=DRAWING.steps, guidance=DRAWING.guidance_or())


# ---- pictures ---------------------------------------------------------------------------------------------


def of_inversion(unclip: UnCLIP, pictures: Sequence[Image.Image]) -> Measured:
    """Measure how exactly pictures are drawn again from their own embedding and noise, by corrections on the way up."""
    rows, numbers = [["", "PSNR to the picture, dB", "all that the decoder can draw"]], {}
    seen = [unclip.seen(picture) for picture in pictures]
    pixels = torch.cat([each.pixels for each in seen])
    embeddings = torch.cat([each.embedding for each in seen])
    text = unclip.uncaptioned().repeated(len(pictures))
    possible = unclip.decoder.pictures(unclip.decoder.encoded(pixels))
    for corrections in (0, 1, 3):
        start = invert(unclip.decoder, pixels, embeddings, text, steps=FROM_NOISE.steps, corrections=corrections)
        noise = Noise.of(0, "", range(len(pictures)))
        again = decode(unclip.decoder, embeddings, text, noise, start=start, steps=FROM_NOISE.steps, guidance=1)
        decibels, exact = _decibels(pixels, again), float((again == possible).flatten(1).all(dim=1).float().mean())
        rows.append([f"{corrections} corrections", f"{decibels:.1f}", percent(exact)])
        numbers[f"{corrections} corrections"] = {"psnr": decibels, "exact": exact}
    decibels = _decibels(pixels, possible)
    rows.append(["what the decoder can draw", f"{decibels:.1f}", ""])
    numbers["possible"] = {"psnr": decibels}
    return Measured(rows=rows, numbers=numbers, sections=[])


def _decibels(images: Tensor, others: Tensor) -> float:
    """Return the PSNR of the mean squared error of all pictures, in dB; at most 100."""
    return float(-10 * (images - others).square().mean().clamp_min(1e-10).log10())


def of_variations(unclip: UnCLIP, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Measured:
    """Measure what variations keep: colours and shapes in any order, sizes, the background, the whole scene."""
    names = ("background", "colour", "shape", "size")
    kept: dict[str, list[bool]] = {name: [] for name in (*names, "all")}
    different: list[float] = []
    sections: list[Section] = []
    for picture, scene in zip(pictures, scenes, strict=True):
        found = unclip.variations(picture, n=7, eta=ETA, drawing=FROM_NOISE)
        readings = [read_scene(to_image(image)) for image in found.images]
        for reading in readings:
            for name in names:
                kept[name].append(sorted(map(str, words(reading, name))) == sorted(map(str, words(scene, name))))
            kept["all"].append(difference(scene.canonical(), reading) is None)
        different.append(float((found.images.flatten(1).diff(dim=0).abs().mean(dim=1) > 0).float().mean()))
        if len(sections) < SHOWN:
            images = [picture, *(to_image(image) for image in found.images)]
            sections.append(Section("", images, ["the picture", *[""] * 7]))
    shares = {name: float(np.mean(values)) for name, values in kept.items()}
    rows = [
        [f"kept at eta {ETA}", *shares, "differ"],
        ["", *map(percent, shares.values()), percent(np.mean(different))],
    ]
    return Measured(rows=rows, numbers={**shares, "differ": float(np.mean(different))}, sections=sections)


def changed(scene: Scene, attribute: Attribute, rng: np.random.Generator) -> Scene:
    """Return a scene of a trained kind that differs in one attribute: of the background, or of the first thing."""
    choices = {"colour": [*COLOURS], "shape": [*OUTLINES], "background": [*BACKGROUNDS]}[attribute]
    while True:
        word = choices[int(rng.integers(len(choices)))]
        if attribute == "background":
            other = replace(scene, background=word)
        else:
            other = replace(scene, things=(replace(scene.things[0], **{attribute: word}), *scene.things[1:]))
        if other != scene and held_out_reason(other) is None and other.things[0].pair != other.things[1].pair:
            return other


def of_differences(unclip: UnCLIP, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Measured:
    """Measure text differences, by theta: is the named attribute changed as told, and is all else as it was."""
    rng = np.random.default_rng(24)
    rows: list[list[str]] = []
    numbers: dict[str, object] = {}
    sections: list[Section] = []
    for attribute in get_args(Attribute):
        hits = np.zeros((len(pictures), THETAS, 2), dtype=bool)
        for row, (picture, scene) in enumerate(zip(pictures, map(Scene.canonical, scenes), strict=True)):
            wanted = changed(scene, attribute, rng)
            before, after = (f"{each.things[0]} on a {each.background} background" for each in (scene, wanted))
            found = unclip.text_diff(picture, before, after, theta=LAST_THETA, n=THETAS, drawing=FROM_NOISE)
            for k, image in enumerate(found.images):
                reading = read_scene(to_image(image))
                rest = [name for name in ("background", "colour", "shape", "size") if name != attribute]
                others = all(words(reading, name) == words(scene, name) for name in rest)
                hits[row, k] = words(reading, attribute) == words(wanted, attribute), others
            if row < SHOWN // 2:
                labels = [f"theta {each['theta']:.1f}" for each in found.each]
                sections.append(
                    Section(f'from "{before}" to "{after}"', [to_image(each) for each in found.images], labels)
                )
        thetas = [f"{LAST_THETA * k / (THETAS - 1):.1f}" for k in range(THETAS)]
        rows = rows or [["share, by theta", *thetas, "at any"]]
        is_changed, is_kept = hits[..., 0], hits[..., 1]
        told = {"changed as named": is_changed, "all else as it was": is_kept, "both": is_changed & is_kept}
        for name, values in told.items():
            shares = {
                **dict(zip(thetas, values.mean(axis=0).tolist(), strict=True)),
                "any": float(values.any(axis=1).mean()),
            }
            rows.append([f"{attribute}: {name}", *map(percent, shares.values())])
            numbers[f"{attribute}: {name}"] = shares
    return Measured(rows=rows, numbers=numbers, sections=sections, columns=THETAS)


def of_interpolations(unclip: UnCLIP, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Measured:
    """Measure interpolations with one candidate for each place, and with several, which are shown.

    Are the ends the pictures, and does no step between them go back? CLIP says so, which also chooses among candidates,
    and the checker. A step between two equal pictures goes nowhere.
    """
    head = ["candidates", "ends, PSNR to the pictures", "steps that go forward, by CLIP", "nowhere", "back"]
    rows, numbers, sections = [[*head, "back, by the checker"]], {}, list[Section]()
    for candidates in (1, CANDIDATES_BETWEEN):
        found, sections = _interpolated(unclip, pictures, [scene.canonical() for scene in scenes], candidates)
        numbers[counted(candidates, "candidate")] = found
        ends, *shares = found.values()
        rows.append([str(candidates), f"{ends:.1f} dB", *map(percent, shares)])
    return Measured(rows=rows, numbers=numbers, sections=sections, columns=BETWEEN)


def _interpolated(
    unclip: UnCLIP, pictures: Sequence[Image.Image], scenes: Sequence[Scene], candidates: int
) -> tuple[dict[str, float], list[Section]]:
    """Return the PSNR of the ends in dB, shares of steps, and a strip of each pair of pictures."""
    ends: list[float] = []
    steps: list[float] = []
    steps_by_checker: list[int] = []
    sections: list[Section] = []
    for a, b, first, last in zip(pictures[::2], pictures[1::2], scenes[::2], scenes[1::2], strict=True):
        found = unclip.interpolate(a, b, n=BETWEEN, keep_ends=True, candidates=candidates, drawing=FROM_NOISE)
        for picture, image in ((a, found.images[0]), (b, found.images[-1])):
            ends.append(_decibels(unclip.seen(picture).pixels, image[None]))
        embeddings = unclip.clip.encode_image(found.images)
        steps += (embeddings @ (embeddings[-1] - embeddings[0])).diff().tolist()
        images = [to_image(image) for image in found.images]
        steps_by_checker += np.diff([position(read_scene(image), first, last) for image in images]).tolist()
        if len(sections) < SHOWN:
            sections.append(Section("", images, [f"{each['theta']:.2f}" for each in found.each]))
    went = np.array(steps)
    return {
        "ends_psnr": float(np.mean(ends)),
        "steps_forward": float((went > SAME_PLACE).mean()),
        "steps_nowhere": float((abs(went) <= SAME_PLACE).mean()),
        "steps_back": float((went < -SAME_PLACE).mean()),
        "steps_back_by_checker": float((np.array(steps_by_checker) < 0).mean()),
    }, sections


def position(found: Reading, first: Scene, last: Scene) -> int:
    """Return where a picture is between two scenes: its words that are the last's, less those that are the first's."""
    each = (
        three
        for name in ("background", "colour", "shape", "size")
        for three in zip(words(found, name), words(first, name), words(last, name), strict=False)
    )
    return sum((word == after) - (word == before) for word, before, after in each)


def of_edits(unclip: UnCLIP, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> Measured:
    """Measure edits that draw a half anew, with another colour or shape: is the whole right, and the rest exact."""
    rng = np.random.default_rng(25)
    rows = [["edits", f"right, best of {CANDIDATES}", "right, each", "kept pixels exact"]]
    numbers: dict[str, object] = {}
    sections: list[Section] = []
    attributes: tuple[Attribute, ...] = ("colour", "shape")
    for attribute in attributes:
        best, each, exact = [], [], []
        for picture, scene in zip(pictures, map(Scene.canonical, scenes), strict=True):
            wanted = changed(scene, attribute, rng)
            text, half = caption(wanted, rng), unclip.image_size // 2
            mask = np.zeros((unclip.image_size, unclip.image_size), dtype=bool)
            mask[(slice(None), slice(half)) if scene.relation == "left of" else slice(half)] = True
            found = unclip.edit(picture, mask, text, n=CANDIDATES, keep=CANDIDATES, drawing=DRAWING)
            verdicts = [check(to_image(image), text).right for image in found.images]
            kept = ~found.region.is_new
            best.append(verdicts[0])
            each.append(float(np.mean(verdicts)))
            exact.append(torch.equal(found.images[0][:, kept], to_tensor(picture)[:, kept]))
            if len(best) <= SHOWN // 2:
                edits = [to_image(image) for image in found.images[:7]]
                shown = marked_section(text, edits, verdicts, range(len(edits)))
                before = Section(text, [picture, *shown.images], ["the picture", *shown.labels])
                sections.append(before._replace(marks=[INK, *(shown.marks or ())]))
        shares = [float(np.mean(values)) for values in (best, each, exact)]
        rows.append([f"another {attribute}", *map(percent, shares)])
        numbers[attribute] = dict(zip(("best", "each", "exact"), shares, strict=True))
    return Measured(rows=rows, numbers=numbers, sections=sections)
