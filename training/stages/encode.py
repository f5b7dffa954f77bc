"""Encoding pictures once: shards of captioned pictures in, shards of image tokens and the same captions out.

1. Of every picture the centre crop and some random crops are taken, the latter as training takes them (Listing 2):
   crop k is a function of (seed, key, k).
2. The dVAE encodes them, and each shard of pictures becomes one of tokens, of the same name and with the same keys.
3. A shard is written under a hidden name and renamed when it is complete, so that the same command continues after an
   interruption: existing shards are skipped.

The format is in `dalle/data/image_tokens.py`. Each shard names the dVAE, crops and seed that it was made with, so that
shards can be moved, named by a pattern and refused one by one, and no second file can be lost.

Several ranks share the shards. They do not wait for one another before the end.

Legend: N views of a few pictures  V views of one  C,H,W channels, height, width  Y,X grid of tokens
"""

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dalle.data.image_tokens import (
    DESCRIPTION_MEMBER,
    TOKENS_FIELD,
    Description,
    Encoding,
    pack,
    read_description,
)
from dalle.data.names import expand_shards
from dalle.data.reader import Sample, ShardData, sample_rng
from dvae.codec import Codec
from dvae.images import open_image, resize_and_crop, to_tensor, transformer_augmentation
from storage.atomic import PARTIAL
from storage.disk import full_disk_note
from storage.stores.errors import StoreError
from storage.stores.files import below, delete_file, exists, files_in, make_folder, prefetch, write_file
from storage.tar import write_tar
from training.config import MAX_BATCH, MAX_SEED, MAX_WORKERS, check_bounds
from training.data.batches import BadSamples, Batch, parts_in_order
from training.data.manifest import Manifest, open_with_manifest
from training.ranks.ranks import MAX_WAIT, Ranks, on_first_rank
from training.ranks.stop import Interrupted, StopSignals
from training.stages.inputs import ShardOptions, without_made_here
from training.stages.locks import as_in_a_new_process, folder_lock, held

logger = logging.getLogger(__name__)

MAX_CROPS = 1000
"""Of a picture, which are in memory together."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options of encoding."""

    crops: int = 4
    """Random crops of each picture, besides the centre crop; 0 makes shards that only validation can use."""
    seed: int = 0
    """Seed of the random crops."""
    batch_size: int = 16
    """Crops that the dVAE encodes at once."""
    workers: int = 1
    """Processes that read and crop, per rank; 0 reads in the encoding process."""
    max_bad_fraction: float = 0.01
    """Fraction of unusable pictures above which encoding stops."""
    fresh: bool = False
    """Encode anew, over shards of image tokens that are there."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeOptions, ShardOptions):
    """The options, checked, and how the shards of pictures are read."""

    def __post_init__(self) -> None:
        check_bounds(self, {"crops": (0, MAX_CROPS), "batch_size": (1, MAX_BATCH)})
        check_bounds(self, {"seed": (0, MAX_SEED), "workers": (0, MAX_WORKERS)})
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")


@dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """The shards of image tokens; counts are of this call, over all ranks."""

    encoding: Encoding
    shards: tuple[Path, ...]
    """The shards of image tokens that the shards of pictures have become, in their order."""
    n_written: int
    """Shards written by this call."""
    n_samples: int
    """Pictures in those."""
    n_skipped: int
    """Pictures that could not be used."""

    def __str__(self) -> str:
        there = len(self.shards) - self.n_written
        what = f"{self.n_samples:,} pictures, {self.encoding.crops} random crops and the centre crop of each"
        notes = [f"encoded {what}, into {self.n_written:,} shards of image tokens"]
        notes += [f"{there:,} shards were there already"] if there else []
        notes += [f"{self.n_skipped:,} pictures were skipped"] if self.n_skipped else []
        return "; ".join(notes)


def views(sample: Sample, encoding: Encoding) -> Tensor:
    """Return the centre crop and the random crops of a picture: (V,3,H,W) float32 in [0, 1].

    Raises:
        ValueError, OSError: the picture cannot be used.
    """
    picture = open_image(sample.image_bytes, sample.source)
    images = [resize_and_crop(picture, encoding.image_size)]
    for crop in range(1, 1 + encoding.crops):
        rng = sample_rng(encoding.seed, crop, sample.key, "encoding")
        images.append(transformer_augmentation(picture, encoding.image_size, rng))
    return torch.stack([to_tensor(image) for image in images])


@as_in_a_new_process()
def encode_shards(
    shards: Sequence[str | Path],
    out: Path,
    dvae: Codec,
    dvae_hash: str,
    config: EncodeConfig,
    ranks: Ranks,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> EncodeReport:
    """Make shards of image tokens of shards of captioned pictures; existing ones are kept.

    Args:
        shards: of pictures with captions; what `expand_shards` takes.
        out: folder for the shards of tokens, or its URL in a store; those in it must be of the same encoding.
        dvae: encodes, on the device that it is on.
        dvae_hash: `directory_hash` of its directory.
        config: options.
        ranks: the ranks of the run; each encodes its part of the shards, and returns when all are done.
        progress: called with (pictures done, pictures) of this rank.

    Raises:
        Interrupted: SIGINT or SIGTERM came; complete shards are kept.
        FileNotFoundError: a shard or folder is missing.
        FolderInUseError: another job writes in `out`.
        ValueError: two shards have one name, one cannot be used or has changed since it was encoded, `out` holds
            something else, or too many pictures are unusable.
        OSError: something could not be written; complete shards are kept.
    """
    config.use_cache()
    targets = token_shards(expand_shards(without_made_here(shards, out)), out)
    manifest = None if config.manifest is None else Manifest.open(config.manifest)
    if manifest is not None:
        _require_all(manifest, list(targets))
    encoding = Encoding(
        dvae_hash=dvae_hash,
        image_size=dvae.config.image_size,
        grid=dvae.config.grid,
        vocab_size=dvae.config.vocab_size,
        crops=config.crops,
        seed=config.seed,
    )
    with held(folder_lock(next(iter(targets.values())).parent), ranks):
        on_first_rank(lambda: _claim(out, encoding, set(targets.values()), fresh=config.fresh), ranks)
        group = dist.new_group(backend="gloo", timeout=MAX_WAIT) if ranks.size > 1 else None
        counts = [0, 0, 0, 0]
        if mine := list(targets)[ranks.rank :: ranks.size]:
            if manifest is None:
                data = ShardData.open(mine, captions=True, skip_damaged=config.skip_damaged_shards)
            else:
                data = open_with_manifest(mine, manifest.part(mine), captions=True)
            with StopSignals() as stop:
                encoder = _Encoder(data, dvae, encoding, config, stop, progress)
                encoder.run(targets)
            counts = [encoder.n_written, encoder.n_samples, encoder.n_skipped, int(stop.raised)]
        n_written, n_samples, n_skipped, n_stopped = _sum_over_ranks(counts, group)
    there = tuple(filter(set(files_in(out, ".tar")).__contains__, targets.values()))
    if n_stopped:
        command = "the same command without --fresh" if config.fresh else "the same command"
        raise Interrupted(
            f"stopped: {len(there):,} of {len(targets):,} shards are encoded in {out}, {command} continues from there"
        )
    return EncodeReport(encoding=encoding, shards=there, n_written=n_written, n_samples=n_samples, n_skipped=n_skipped)


def token_shards(paths: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the shard of tokens that each shard of pictures becomes.

    Raises:
        ValueError: two would become the same.
    """
    sources: dict[Path, Path] = {}
    for path in paths:
        target = below(out, f"{path.stem}.tar")
        if target in sources:
            raise ValueError(
                f"{sources[target]} and {path} would both become {target}: rename one, or encode them into two folders"
            )
        sources[target] = path
    return {path: target for target, path in sources.items()}


def _claim(out: Path, encoding: Encoding, targets: Set[Path], *, fresh: bool) -> None:
    """Make the folder, or check that the shards in it are of the same encoding; with `fresh`, delete the targets.

    Raises:
        ValueError: a shard is of another encoding, or holds no image tokens.
    """
    there = files_in(out, ".tar")
    for shard in there:
        description = read_description(shard)
        if description is None:
            raise ValueError(f"{shard} is no shard of image tokens: give --out a folder of its own")
        differences = encoding.differences(description.encoding)
        if differences and not (fresh and shard in targets):
            what_to_do = "or --fresh to encode anew over it" if shard in targets else "or delete it"
            raise ValueError(
                f"{shard} holds image tokens that were made differently ({differences}): give another --out, the dVAE, "
                f"crops and seed that the folder was made with, {what_to_do}"
            )
    make_folder(out)
    for left_over in [*(shard for shard in there if fresh and shard in targets), *out.glob(f".*{PARTIAL}")]:
        delete_file(left_over)
    n_others = len(set(there).difference(targets))
    if n_others:
        logger.warning("%s holds %d shards of other pictures too: --data %s would read them all", out, n_others, out)


def _require_all(manifest: Manifest, paths: Sequence[Path]) -> None:
    """Check that the shards are those of a manifest: an encoded set with a shard too few would look whole.

    Raises:
        ValueError: one is missing, or the manifest does not know one.
    """
    matches, unknown = manifest.match(paths)
    missing = [entry.name for entry, path in matches if path is None]
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not in it"
        more = f", and {len(missing) + len(unknown) - 1:,} more differ" if len(missing) + len(unknown) > 1 else ""
        raise ValueError(
            f"the shards are not those of the manifest {manifest.folder}: {what}{more}; give --data all of its shards, "
            "or make a manifest of these with `dalle-train check-data`"
        )


class _Encoder:
    """Encodes the shards of one rank.

    Args:
        data: the rank's shards of pictures.
        dvae: encodes.
        encoding: written into the shards.
        config: options.
        stop: tells when to stop.
        progress: called with (pictures done, pictures).
    """

    def __init__(
        self,
        data: ShardData,
        dvae: Codec,
        encoding: Encoding,
        config: EncodeConfig,
        stop: StopSignals,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._data, self._dvae, self._encoding, self._config = data, dvae, encoding, config
        self._stop, self._progress = stop, progress
        self.n_written = self.n_samples = self.n_skipped = 0

    def run(self, targets: Mapping[Path, Path]) -> None:
        """Write the shards of tokens that are missing, one after the other, until a signal comes.

        Args:
            targets: where the tokens of each shard of pictures go.

        Raises:
            ValueError: a shard that is there was made of other pictures, or too many are unusable.
            OSError: something could not be written.
        """
        missing = [n for n, path in enumerate(self._data.shards) if not self._is_there(n, targets[path])]
        n_pictures = sum(len(self._data.samples_of(number)) for number in missing)
        parts = {number: self._parts(number) for number in missing}
        bad_samples = BadSamples(self._data, self._config.max_bad_fraction)
        batches = parts_in_order(
            self._data,
            lambda sample, _: {"views": views(sample, self._encoding)},
            itertools.chain.from_iterable(parts.values()),
            bad_samples,
            workers=self._config.workers,
        )
        for done, number in enumerate(missing):
            prefetch(self._data.shards[following] for following in missing[done : done + 3])
            n_before = self.n_samples
            target = targets[self._data.shards[number]]
            try:
                _write_shard(target, self._members(number, itertools.islice(batches, len(parts[number])), n_pictures))
            except _StoppedError:
                return
            if self.n_samples > n_before:
                self.n_written += 1
            else:
                logger.warning("%s has no usable picture: it is left out", self._data.shards[number])
                delete_file(target)
        if self.n_samples == 0 and len(missing) == len(self._data.shards):
            raise bad_samples.error(f"all {n_pictures:,} pictures are unusable")

    def _is_there(self, number: int, target: Path) -> bool:
        """Return whether the tokens of a shard are there.

        Raises:
            ValueError: they are of another shard.
        """
        description = read_description(target) if exists(target) else None
        if description is not None and description.source_fingerprint != self._data.fingerprint(number):
            raise ValueError(
                f"{target} was made of another shard than {self._data.shards[number]}, or that has changed since: "
                "give another --out, or --fresh to encode anew"
            )
        return description is not None

    def _parts(self, number: int) -> list[range]:
        """Return a shard's samples in groups whose views make about one batch."""
        samples = self._data.samples_of(number)
        size = max(1, self._config.batch_size // (1 + self._encoding.crops))
        return [samples[first : first + size] for first in range(0, len(samples), size)]

    def _members(self, number: int, batches: Iterable[Batch], n_pictures: int) -> Iterator[tuple[str, bytes]]:
        """Yield the names and bytes of the members of a shard of tokens, in order.

        Raises:
            _StoppedError: a signal came.
        """
        name, fingerprint = self._data.shards[number].name, self._data.fingerprint(number)
        description = Description(encoding=self._encoding, source=name, source_fingerprint=fingerprint)
        yield DESCRIPTION_MEMBER, description.to_json()
        for batch in batches:
            if self._stop.raised:
                raise _StoppedError
            if batch.numbers:
                tokens_BVYX = self._tokens(batch.tensors["views"])
                for i, key, tokens_VYX in zip(batch.numbers, batch.keys, tokens_BVYX, strict=True):
                    for field, data in self._data.caption_members(i).items():
                        yield f"{key}.{field}", data
                    yield f"{key}.{TOKENS_FIELD}", pack(tokens_VYX, self._encoding)
            self.n_samples += len(batch.numbers)
            self.n_skipped += batch.n_bad
            if self._progress is not None:
                self._progress(self.n_samples + self.n_skipped, n_pictures)

    def _tokens(self, views_BVCHW: Tensor) -> NDArray[np.integer[Any]]:
        """Return the (B,V,Y,X) tokens of some pictures' views."""
        device = next(self._dvae.parameters()).device
        tokens = [
            self._dvae.encode(views_NCHW.to(device).contiguous(memory_format=torch.channels_last)).cpu()
            for views_NCHW in torch.split(views_BVCHW.flatten(0, 1), self._config.batch_size)
        ]
        tokens_BVYX: NDArray[np.integer[Any]] = torch.cat(tokens).numpy().reshape(-1, *self._encoding.shape)
        return tokens_BVYX


class _StoppedError(Exception):
    """A signal came while a shard was written."""


def _write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a shard whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    try:
        write_file(path, lambda local: write_tar(local, members))
    except StoreError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        raise OSError(
            code,
            f"cannot make {path}: {os.strerror(code)}{full_disk_note(error, path)}; the shards before it are kept, "
            "and the same command continues from there",
        ) from error


def _sum_over_ranks(counts: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Return the sums over all ranks, which wait here until the last one is done."""
    if group is None:
        return list(counts)
    sums = torch.tensor(counts)
    dist.all_reduce(sums, group=group)
    return [int(count) for count in sums.tolist()]
