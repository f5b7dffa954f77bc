"""Shards that are damaged between two parts of a run, unequal shards, and corrupt pictures of many kinds.

Damage between two parts must be refused with an error, or be counted; once the shard is repaired the run resumes
exactly. A manifest (`dalle-train check-data`) tells training what the shards held.
"""

import io
import json
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jobs import Injection, Job, copy_of, wait_for
from PIL import Image
from runs import STEPS, Course, Fault, last_step, latest, metrics, require, require_equal
from support import tiny

from training.data.manifest import Manifest, open_with_manifest

AT_STEP = 6
DAMAGED = "world-000002.tar"
Damage = Callable[[Path], None]


def _truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def _flip_in_pictures(shard: Path) -> None:
    """Flip a bit in the middle of every picture."""
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".png"):
                data[member.offset_data + member.size // 2] ^= 0x10
    shard.write_bytes(bytes(data))


def _flip_in_captions(shard: Path) -> None:
    """Change a letter of every caption, which stays valid."""
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                data[member.offset_data] ^= 0x01
    shard.write_bytes(bytes(data))


def _flip_in_a_header(shard: Path) -> None:
    """Flip a bit in the checksum of a member's header; ordinary readers then drop the rest of the shard."""
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[4].offset
    data = bytearray(shard.read_bytes())
    data[offset + 150] ^= 0x01
    shard.write_bytes(bytes(data))


def _empty(shard: Path) -> None:
    shard.write_bytes(b"")


def _missing(shard: Path) -> None:
    shard.unlink()


def _manifest(world: Path, folder: Path) -> list[object]:
    """Return the options that let training use a manifest of the shards."""
    check = [sys.executable, "-m", "training.cli", "check-data", "--data", str(world), "--out", str(folder)]
    done = subprocess.run(check, capture_output=True, text=True)
    require(done.returncode == 0, f"`dalle-train check-data` ended with {done.returncode}: {done.stderr[-600:]}")
    return ["--manifest", folder]


def _first_part(course: Course, bundle: Path, command: list[str], name: str, inject: Injection | None = None) -> None:
    """Stop a run halfway by SIGTERM."""
    with Job(course.scratch / "logs" / name, command, inject=inject) as job:
        wait_for(lambda: last_step(bundle) >= AT_STEP or not job.is_running(), f"step {AT_STEP}")
        job.send(0, signal.SIGTERM)
        codes = job.wait()
        require(codes == [0, 0], f"the first part ended with {codes}: {job.said()[-600:]}")


def _damaged(course: Course, name: str, *, damage: Damage, with_manifest: bool) -> tuple[str, str]:
    """Stop a run, damage a shard, try to resume, repair the shard, and resume."""
    world, bundle = copy_of(course.world, course.scratch / "worlds" / name), course.bundle(name)
    more = _manifest(world, course.scratch / "worlds" / f"{name}-manifest") if with_manifest else []
    names = str(world / "world-{000000..000005}.tar")
    command = course.command(bundle, *more, data=names)
    _first_part(course, bundle, command, name)
    whole = (world / DAMAGED).read_bytes()
    damage(world / DAMAGED)
    with Job(course.scratch / "logs" / f"{name}-damaged", command) as job:
        codes = job.wait()
        said = job.said()
    require(codes == [1, 1], f"with the damaged shard the ranks ended with {codes}: {said[-600:]}")
    (line, *_) = [line for line in said.splitlines() if line.startswith("error: ")]
    require(DAMAGED in said, f"the shard is not named: {said[-600:]}")
    require("Traceback" not in said, f"a traceback: {said[-1500:]}")
    (world / DAMAGED).write_bytes(whole)
    course.finish(command, f"{name}-end")
    require_equal(bundle, course.straight())
    return f"refused: {line[:160]}", "nothing, once the shard was repaired"


def _note_keys(rank: int, *, folder: Path) -> None:
    """Let a rank write the keys of its batches to a file."""
    import training.loop.loop

    batches = training.loop.loop.batches

    def noted(*arguments: Any, **named: Any) -> Iterator[Any]:
        share = arguments[2]
        first = share.start_step * share.accumulation
        with (folder / f"rank{rank}.jsonl").open("a") as file:
            for number, batch in enumerate(batches(*arguments, **named), first):
                print(json.dumps([number // share.accumulation + 1, batch.keys]), file=file, flush=True)
                yield batch

    training.loop.loop.batches = noted


def _noted_keys(folder: Path) -> list[tuple[int, str]]:
    """Return (step, key) of every sample that the ranks took, by rank and step."""
    lines = [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    return [(step, key) for step, keys in lines for key in keys]


def _lost(course: Course, name: str, *, damage: Damage) -> tuple[str, str]:
    """Stop a run with a manifest, damage a shard, and resume: lost samples are replaced, all others stay."""
    world, bundles = copy_of(course.world, course.scratch / "worlds" / name), (f"{name}-straight", name)
    manifest = course.scratch / "worlds" / f"{name}-manifest"
    more = [*_manifest(world, manifest), "--max-bad-fraction", 0.5]
    straight, bundle = map(course.bundle, bundles)
    folders = [course.scratch / "keys" / one for one in bundles]
    for folder in folders:
        folder.mkdir(parents=True)
    notes = [partial(_note_keys, folder=folder) for folder in folders]
    command = course.command(bundle, *more, data=world)
    course.finish(course.command(straight, *more, data=world), bundles[0], inject=notes[0])
    _first_part(course, bundle, command, name, notes[1])
    stopped_at = latest(bundle)
    damage(world / DAMAGED)
    said = course.finish(command, f"{name}-end", inject=notes[1])
    require(f"{DAMAGED}: " in said and " samples are left" in said, f"the shard is not named: {said[-600:]}")
    data = open_with_manifest([world], Manifest.open(manifest), captions=True)
    lost = {data.key(i) for i in range(len(data)) if data.is_lost(i)}
    expected, found = map(_noted_keys, folders)
    require(len(expected) == 4 * STEPS, f"{len(expected)} samples were taken in place of {4 * STEPS}")
    n_replaced = 0
    for (step, key), (step_found, key_found) in zip(expected, found, strict=True):
        is_replaced = step > stopped_at and key in lost
        is_right = (key_found not in lost) if is_replaced else key_found == key
        require(step == step_found and is_right, f"step {step_found} had {key_found} in place of {key} of step {step}")
        n_replaced += is_replaced
    counted = [line["bad_samples"] for line in metrics(bundle) if line["step"] == STEPS and "bad_samples" in line]
    require(lost and counted == [n_replaced], f"{counted} samples were counted, and {n_replaced} replaced")
    return f"went on; {n_replaced} lost samples were counted and replaced", "they alone: all others came at their steps"


def _unharmed(course: Course, name: str, *, damage: Damage) -> tuple[str, str]:
    """Stop a run with a manifest, damage a shard where the manifest makes up for it, and resume."""
    world, bundle = copy_of(course.world, course.scratch / "worlds" / name), course.bundle(name)
    more = [*_manifest(world, course.scratch / "worlds" / f"{name}-manifest"), "--max-bad-fraction", 0.5]
    command = course.command(bundle, *more, data=world)
    _first_part(course, bundle, command, name)
    damage(world / DAMAGED)
    said = course.finish(command, f"{name}-end")
    require(f"{DAMAGED}: 8 of 8 samples are left" in said, f"the damage was not noticed: {said[-600:]}")
    require_equal(bundle, course.straight())
    return "went on; the places of all samples are known", "nothing"


def _unequal(course: Course, name: str) -> tuple[str, str]:
    """Train on the same samples in shards of very different sizes: the same samples are seen, without waiting."""
    members: list[tuple[str, bytes]] = []
    for path in sorted(course.world.iterdir()):
        with tarfile.open(path) as tar:
            members += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    keys = sorted({key.split(".")[0] for key, _ in members})
    folder = course.scratch / "worlds" / name
    for number, (first, last) in enumerate(((0, 1), (1, 40), (40, 43), (43, len(keys)))):
        own = [member for member in members if member[0].split(".")[0] in keys[first:last]]
        tiny.write_tar(folder / f"world-{number:06}.tar", own)
    bundle = course.bundle(name)
    course.finish(course.command(bundle, data=folder), name)
    require_equal(bundle, course.straight())
    return "both ranks trained to the end, as on equal shards", "nothing"


# --------------------------------------------------------------------------------------------- corrupt pictures


def _picture(rng: np.random.Generator, kind: str = "png", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_of_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0")) + _chunk(b"IEND", b"")


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(share * len(data))]


def _with_flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


CORRUPT: dict[str, Callable[[np.random.Generator], bytes]] = {
    "one byte": lambda rng: rng.bytes(1),  # no bytes at all are no picture, and known before training
    "random bytes": lambda rng: rng.bytes(500),
    "text": lambda rng: b"404 Not Found\n" * 9,
    "HTML": lambda rng: b"<html><body>This picture is no longer here</body></html>",
    "half a PNG": lambda rng: _cut(_picture(rng), 0.5),
    "half a JPEG": lambda rng: _cut(_picture(rng, "jpeg"), 0.5),
    "half a GIF": lambda rng: _cut(_picture(rng, "gif"), 0.5),
    "a PNG header alone": lambda rng: _picture(rng)[:40],
    "a PNG with a flipped byte": lambda rng: _with_flipped(_picture(rng), 1000),
    "a PNG of 2 billion pixels": lambda rng: _png_of_size(60_000, 40_000),
    "a PNG without pixels": lambda rng: _png_of_size(0, 0),
    "half a WebP": lambda rng: _cut(_picture(rng, "webp"), 0.4),
}
N_CORRUPT, N_WHOLE = 200, 200


def _dirty_world(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    makers = list(CORRUPT.values())
    corrupt = set(rng.permutation(N_CORRUPT + N_WHOLE)[:N_CORRUPT].tolist())
    members: list[tuple[str, bytes]] = []
    n_made = 0
    for number in range(N_CORRUPT + N_WHOLE):
        data = _picture(rng)
        if number in corrupt:
            data = makers[n_made % len(makers)](rng)
            n_made += 1
        members += [(f"{number:06}.png", data), (f"{number:06}.txt", b"a small red circle")]
    for shard in range(4):
        tiny.write_tar(folder / f"world-{shard:06}.tar", members[200 * shard : 200 * (shard + 1)])
    return folder


def _corrupt(course: Course, name: str) -> tuple[str, str]:
    """Read all of a dirty data set once, straight and in two parts; then refuse it under the default limit."""
    world = _dirty_world(course.scratch / "worlds" / name)
    steps = (N_CORRUPT + N_WHOLE) // 16
    more = ["--global-batch", 16, "--max-bad-fraction", 0.6]
    straight = course.straight(*more, data=world, steps=steps)
    counted = [line["bad_samples"] for line in metrics(straight) if line["step"] == steps and "bad_samples" in line]
    require(counted == [N_CORRUPT], f"{counted} unusable samples were counted")
    bundle = course.bundle(name)
    command = course.command(bundle, *more, data=world, steps=steps)
    with Job(course.scratch / "logs" / name, command) as job:
        wait_for(lambda: last_step(bundle) >= AT_STEP or not job.is_running(), f"step {AT_STEP}")
        job.send(1, signal.SIGKILL)
        job.wait()
    course.finish(command, f"{name}-end")
    require_equal(bundle, straight)
    strict = course.command(course.bundle(f"{name}-strict"), data=world, steps=steps)
    with Job(course.scratch / "logs" / f"{name}-strict", strict) as job:
        codes = job.wait()
        said = job.said()
    require(codes == [1, 1], f"under the usual limit the ranks ended with {codes}: {said[-600:]}")
    require("--max-bad-fraction" in said and str(world) in said, f"the shards are not named: {said[-600:]}")
    return f"all {N_CORRUPT} were counted and replaced, none crashed; refused under the usual limit", "nothing"


FAULTS = [
    *(
        Fault(
            name=f"a shard {what}",
            injected=f"between two parts of a run{', with a manifest' if with_manifest else ''}",
            run=partial(_damaged, damage=damage, with_manifest=with_manifest),
        )
        for what, damage, with_manifest in (
            ("truncated", _truncate, False),
            ("with bits flipped in pictures", _flip_in_pictures, False),
            ("with a bit flipped in a header", _flip_in_a_header, False),
            ("with bits flipped in captions", _flip_in_captions, True),
            ("empty", _empty, False),
            ("missing", _missing, False),
        )
    ),
    *(
        Fault(
            name=f"a shard {what}, with a manifest",
            injected="between two parts of a run, for good; --max-bad-fraction 0.5",
            run=partial(run, damage=damage),
        )
        for what, damage, run in (
            ("truncated", _truncate, _lost),
            ("missing", _missing, _lost),
            ("with a bit flipped in a header", _flip_in_a_header, _unharmed),
        )
    ),
    Fault(name="unequal shards", injected="1, 39, 3 and 5 samples", run=_unequal),
    Fault(
        name=f"{N_CORRUPT} corrupt pictures",
        injected=f"{len(CORRUPT)} kinds, among {N_WHOLE} that are whole; kill -9 in between",
        run=_corrupt,
    ),
]
