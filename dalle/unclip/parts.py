"""DALL·E 2's parts of a bundle, checked to belong together: clip/, prior/, decoder/, upsampler-48/ and so on.

Prior and decoder remember the CLIP that they were trained with, and a decoder that draws codes its dVAE. Another one,
whose embeddings or codes mean something else, is refused. Each upsampler reads pictures of the size that is made before
it.
"""

import logging
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from dalle.data.bundle import DTYPES, Precision, check_precision, missing_part, usable_device
from dalle.unclip.components import KIND as COMPONENTS
from dalle.unclip.components import Components
from dvae.codec import load_codec
from rerank import CLIP, CLIPConfig
from storage.models.directory import HOW_TO_MAKE, directory_hash, read_config
from unclip import Decoder, Upsampler
from unclip.decoder import DecoderConfig
from unclip.embeddings import AnyPrior, load_prior
from unclip.latents import PrincipalComponents
from unclip.prior import TransformerSizes
from unclip.upsampler import KIND as UPSAMPLER
from unclip.upsampler import UpsamplerConfig

logger = logging.getLogger(__name__)

Kind = Literal["dalle", "unclip"]
"""Which of the two models of a bundle draws: DALL·E's transformer, or DALL·E 2's prior and decoder."""
NEEDED = ("clip", "prior", "decoder")
"""Beside upsamplers. Without the prior, pictures can be varied but not drawn of captions."""
DVAE = "dvae"
"""Needed by a decoder that draws codes."""


class Parts(NamedTuple):
    """The parts of DALL·E 2 in a bundle."""

    clip: CLIP
    decoder: Decoder
    prior: AnyPrior | None
    """Of either kind; None if the bundle has none."""
    upsamplers: tuple[Upsampler, ...]
    """In the order in which they enlarge."""
    components: PrincipalComponents | None
    """Of CLIP's embeddings; None if the bundle has none."""
    hashes: dict[str, str]
    """Name of the directory -> 16 hexadecimal digits."""


def kind_of(bundle: Path, wanted: Kind | None = None) -> Kind:
    """Return the model that draws: the one that is wanted, or DALL·E unless the bundle has parts of DALL·E 2 alone."""
    if wanted is not None:
        return wanted
    only_unclip = not (bundle / "dalle").exists() and any((bundle / part).exists() for part in ("prior", "decoder"))
    return "unclip" if only_unclip else "dalle"


def load_parts(bundle: Path, device: str | torch.device, precision: Precision, size: int | None = None) -> Parts:
    """Load DALL·E 2's parts of a bundle and check that they belong together.

    Args:
        bundle: the directory.
        device: where they compute.
        precision: of decoder and upsamplers; CLIP and the prior are always fp32.
        size: side in pixels of the pictures that are made: upsamplers beyond it are not loaded; None for all of them.

    Raises:
        FileNotFoundError: the bundle, its CLIP, its decoder or the decoder's dVAE is missing.
        ValueError: a part is damaged or of another CLIP or dVAE, upsamplers do not follow each other, or an argument is
            out of range.
    """
    device = usable_device(device)
    check_precision(precision)
    missing = [part for part in NEEDED if not (bundle / part).exists()]
    if set(missing) - {"prior"}:
        raise missing_part(bundle, *missing)
    clip, decoder = CLIP.load(bundle / "clip"), Decoder.load(bundle / "decoder")
    codec = [DVAE] if decoder.config.codes else []
    if codec and not (bundle / DVAE).exists():
        raise FileNotFoundError(
            f"the bundle {bundle} has no {DVAE}, whose codes its decoder draws: put the one there that the decoder was "
            f"trained with, of the hash {decoder.metadata.get('dvae_hash', 'unknown')}"
        )
    prior = None if "prior" in missing else load_prior(bundle / "prior")
    chain = upsampler_chain(bundle, decoder.config.picture_size, size)
    optional = [COMPONENTS] if (bundle / COMPONENTS).exists() else []
    parts = [*(bundle / part for part in (*NEEDED, *codec, *optional) if part not in missing), *chain]
    hashes = {path.name: directory_hash(path) for path in parts}
    _check_clip(bundle, decoder, clip.config, hashes["clip"])
    if codec:
        _use_codec(bundle, decoder, hashes[DVAE], device)
    if prior is not None:
        _check_clip(bundle, prior, clip.config, hashes["clip"])
    if prior is not None and prior.config.normalised != decoder.config.normalised:
        kinds = [f"{'' if model.config.normalised else 'not '}of unit length" for model in (prior, decoder)]
        raise ValueError(
            f"the prior of {bundle} makes embeddings that are {kinds[0]}, its decoder reads such that are {kinds[1]}: "
            "they were not made for each other"
        )
    components = Components.load(bundle / COMPONENTS) if optional else None
    if components is not None and components.metadata.get("clip_hash") != hashes["clip"]:
        raise ValueError(
            f"the {COMPONENTS} of {bundle} are of another CLIP's embeddings: make them again with "
            f"{HOW_TO_MAKE[COMPONENTS]}"
        )
    upsamplers = tuple(Upsampler.load(path) for path in chain)
    networks: tuple[nn.Module, ...] = (decoder, *upsamplers)
    for network in networks:
        _set_precision(network, DTYPES[precision])
    return Parts(
        clip=clip.to(device),
        decoder=decoder.to(device),
        prior=None if prior is None else prior.to(device),
        upsamplers=tuple(upsampler.to(device) for upsampler in upsamplers),
        components=None if components is None else components.principal,
        hashes=hashes,
    )


def upsampler_chain(bundle: Path, side: int, size: int | None = None) -> list[Path]:
    """Return the directories of upsamplers from pictures of `side` pixels to those of `size`, or to the largest.

    Raises:
        ValueError: a directory's name is not the size of its pictures, a size cannot be made, or an upsampler reads
            pictures of another size than is made before it.
    """
    found: list[tuple[UpsamplerConfig, Path]] = []
    for path in bundle.glob("upsampler-*"):
        config = read_config(path, UPSAMPLER, UpsamplerConfig)
        if path.name != f"upsampler-{config.image_size}":
            raise ValueError(
                f"{path} makes pictures of {config.image_size} pixels: rename it to upsampler-{config.image_size}"
            )
        found.append((config, path))
    found.sort(key=lambda each: each[0].image_size)
    sizes = [side, *(config.image_size for config, _ in found)]
    if size is not None and size not in sizes:
        raise ValueError(
            f"size is {size}; with the decoder and upsamplers of {bundle} it can be "
            f"{', '.join(map(str, sorted(set(sizes))))} pixels"
        )
    chain: list[Path] = []
    for (config, path), made in zip(found, sizes, strict=False):
        if size is not None and config.image_size > size:
            break
        if config.input_size != made:
            maker = chain[-1].name if chain else "decoder"
            raise ValueError(
                f"{path.name} of {bundle} enlarges pictures of {config.input_size} pixels, but {maker} makes them of "
                f"{made}: add upsampler-{config.input_size}, or stop before it with a size of {made}"
            )
        chain.append(path)
    return chain


def _check_clip(bundle: Path, model: AnyPrior | Decoder, clip: CLIPConfig, clip_hash: str) -> None:
    """Raise ValueError if a model was trained with another CLIP than the bundle's."""
    trained_with, stage = model.metadata.get("clip_hash"), model.kind.partition("-")[0]
    if trained_with is None:
        logger.info("the %s does not say which CLIP it was trained with: taken to be the bundle's", stage)
    elif trained_with != clip_hash:
        raise ValueError(
            f"the {stage} was trained with the CLIP {trained_with}, {bundle} holds {clip_hash}: its embeddings "
            f"would mean something else; put that CLIP into the bundle, or train again with `dalle-train {stage}`"
        )
    config: TransformerSizes | DecoderConfig = model.config
    read = (config.embed_dim, config.text_width, config.text_len)
    given = (clip.embed_dim, clip.text_width, clip.context_length)
    if read != given:
        raise ValueError(
            f"the {stage} reads embeddings of {read[0]}, a text width of {read[1]} and {read[2]} positions, the "
            f"CLIP of {bundle} has {given[0]}, {given[1]} and {given[2]}: put the CLIP that it was trained with there"
        )


def _use_codec(bundle: Path, decoder: Decoder, dvae_hash: str, device: torch.device) -> None:
    """Give a decoder that draws codes the bundle's dVAE; raise ValueError if it was trained with another."""
    trained_with = decoder.metadata.get("dvae_hash")
    if trained_with != dvae_hash:
        raise ValueError(
            f"the decoder was trained with the dVAE {trained_with or 'of an unknown hash'}, {bundle} holds "
            f"{dvae_hash}: its codes would mean something else; put that dVAE into the bundle, or train again with "
            "`dalle-train decoder`"
        )
    decoder.use_codec(load_codec(bundle / DVAE, device))


def _set_precision(network: nn.Module, dtype: torch.dtype) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
