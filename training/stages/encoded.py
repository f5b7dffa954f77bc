"""Inputs with image tokens in place of pictures, which a dVAE has encoded once."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dalle.data.names import expand_shards
from dalle.output.progress import progress_bar
from dalle.output.text import Say
from dvae.codec import load_codec
from storage.models.directory import directory_hash
from training.ranks.ranks import Ranks
from training.recipes import Recipe
from training.stages.dvae import channels_last
from training.stages.encode import EncodeConfig, EncodeReport, encode_shards, token_shards
from training.stages.inputs import ENCODED, Inputs, without_made_here
from training.stages.locks import as_in_a_new_process


@as_in_a_new_process()
def encode_data(
    data: Sequence[str | Path],
    out: Path,
    dvae: Path,
    config: EncodeConfig,
    ranks: Ranks,
    say: Say,
) -> EncodeReport:
    """Encode shards of captioned pictures with the dVAE in a directory, as `encode_shards` does.

    Raises:
        FileNotFoundError: the dVAE is missing; and as `encode_shards`.
    """
    coder = channels_last(load_codec(dvae, ranks.device))
    with progress_bar("pictures") as progress:
        made = encode_shards(
            data,
            out,
            coder,
            directory_hash(dvae),
            config,
            ranks,
            progress=progress if ranks.is_first else None,
        )
    say(f"{made}: {out}")
    return made


def encode_inputs(recipe: Recipe, inputs: Inputs, crops: int, ranks: Ranks, say: Say) -> Inputs:
    """Encode the pictures with the bundle's dVAE; returns the inputs with image tokens in place of the pictures."""
    train = recipe.transformer.train
    config = EncodeConfig(
        seed=train.seed,
        workers=train.workers,
        max_bad_fraction=train.max_bad_fraction,
        fresh=inputs.fresh,
        skip_damaged_shards=inputs.skip_damaged_shards,
        cache=inputs.cache,
        cache_gb=inputs.cache_gb,
    )
    shards = {
        name: encode_data(
            of.data,
            inputs.out / ENCODED / name,
            inputs.out / "dvae",
            dataclasses.replace(config, crops=its_crops, manifest=of.manifest),
            ranks,
            say,
        ).shards
        for name, its_crops, of in shards_to_encode(inputs, crops)
    }
    return _with_tokens(inputs, shards)


def shards_to_encode(inputs: Inputs, crops: int) -> Iterator[tuple[str, int, Inputs]]:
    """Yield the parts to encode: name, random crops of each picture, and the shards."""
    yield "train", crops, inputs
    if inputs.validation:
        yield "validation", 0, dataclasses.replace(inputs, data=inputs.validation, manifest=inputs.validation_manifest)


def _with_tokens(inputs: Inputs, shards: Mapping[str, Sequence[Path]]) -> Inputs:
    """Return the inputs with shards of image tokens, by the names of `shards_to_encode`.

    Without manifests, which are of the shards of pictures: image tokens have checksums of their own.
    """
    return dataclasses.replace(
        inputs, data=shards["train"], validation=shards.get("validation", ()), manifest=None, validation_manifest=None
    )


def encoded_inputs(inputs: Inputs) -> Inputs:
    """Return the inputs with the image tokens that `encode_inputs` made of their shards."""
    shards: dict[str, list[Path]] = {}
    for name, _, of in shards_to_encode(inputs, 1):
        of.use_cache()
        targets = token_shards(expand_shards(without_made_here(of.data)), inputs.out / ENCODED / name)
        shards[name] = [target for target in targets.values() if target.exists()]
    return _with_tokens(inputs, shards)
