"""What turned pictures into tokens in a file of DALLE-pytorch: its own VAE, OpenAI's, or a VQGAN."""

import re
from dataclasses import dataclass

import torch

from dalle.importers.dalle_pytorch.hparams import Settings
from dalle.importers.vqgan import read_vqgan
from dalle.importers.vqgan_names import find_vqgan
from dvae.codec import Codec
from dvae.discrete import DiscreteVAE, DiscreteVAEConfig
from dvae.openai import dvae_of
from storage.checkpoints.tensors import Tensors, summary
from storage.models.directory import load_weights

_OWN = "DALLE-pytorch's own VAE"
_USED = {"image_size", "num_tokens", "codebook_dim", "num_layers", "num_resnet_blocks", "hidden_dim", "channels"}
_IGNORED = {"smooth_l1_loss", "temperature", "straight_through", "reinmax", "kl_div_loss_weight"}
"""Settings that matter in training alone."""


@dataclass(frozen=True, kw_only=True)
class ImportedCodec:
    """A codec, and what is to be said about it."""

    codec: Codec
    name: str
    """What it is, in words."""
    pixels: str
    """The range of pixels that its weights see."""


def import_codec(tensors: Tensors) -> ImportedCodec:
    """Return the codec of a vae.pt or a dalle.pt, told by its weights.

    Raises:
        ValueError: there is none, or it is damaged, of another size, or computed in another way.
    """
    weights = tensors.under("weights.")
    vae = weights.under("vae.")
    if "codebook.weight" in weights:
        return ImportedCodec(codec=_discrete(tensors, weights, "hparams"), name=_OWN, pixels="[-1, 1]")
    if "codebook.weight" in vae:
        return ImportedCodec(codec=_discrete(tensors, vae, "vae_params"), name=_OWN, pixels="[-1, 1]")
    if "enc.blocks.input.w" in vae:
        halves = []
        for half in ("enc.", "dec."):
            part = vae.under(half)
            renamed = {re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", name)): name for name in part}
            halves.append({ours: part[name] for ours, name in renamed.items()})
        dvae = dvae_of(halves[0], halves[1], str(tensors.path))
        return ImportedCodec(codec=dvae, name="OpenAI's dVAE", pixels="[0.1, 0.9]")
    if any(name.startswith("model.") for name in vae):
        found = read_vqgan(find_vqgan(tensors, "weights.vae.model."))
        return ImportedCodec(codec=found, name=f"a VQGAN f{found.config.downsampling}", pixels="[-1, 1]")
    note = tensors.plain.get("weights")
    if isinstance(note, str):
        raise ValueError(
            f"{tensors.path} has no weights but a note, {note[:100]!r}: DeepSpeed's checkpoint lies in pieces beside "
            "it; join them first"
        )
    raise ValueError(
        f"{tensors.path} holds {_holds(weights, tensors)}: expected a vae.pt or a dalle.pt that DALLE-pytorch saved, "
        "with the weights of its VAE"
    )


def _holds(weights: Tensors, tensors: Tensors) -> str:
    return summary(list(weights)[:100]) or summary(list(tensors)[:100]) or "nothing"


def _discrete(tensors: Tensors, weights: Tensors, name: str) -> DiscreteVAE:
    """Return DALLE-pytorch's own VAE, whose settings lie under a name."""
    path = tensors.path
    said = Settings(tensors, name, used=_USED, ignored=_IGNORED)
    try:
        vocab_size, codebook_width = weights.shape("codebook.weight")
        hidden, channels, *_ = weights.shape("encoder.0.0.weight")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} has no VAE of DALLE-pytorch: {error}") from error
    if channels != 3:
        raise ValueError(f"{path} has a VAE of pictures with {channels} channels, expected 3: red, green and blue")
    n_layers = _count(r"encoder\.(\d+)\.0\.weight", weights)
    n_blocks = _count(r"encoder\.(\d+)\.net\.0\.weight", weights)
    found = {
        "num_tokens": vocab_size,
        "codebook_dim": codebook_width,
        "num_layers": n_layers,
        "num_resnet_blocks": n_blocks,
        "hidden_dim": hidden,
    }
    for key, value in found.items():
        if said.says(key) and said.whole(key) != value:
            raise ValueError(f"{path} has {key} {value}, but its {name} say {said.whole(key)}: it is damaged")
    try:
        config = DiscreteVAEConfig(
            vocab_size=vocab_size,
            image_size=said.whole("image_size"),
            n_layers=n_layers,
            n_blocks=n_blocks,
            hidden=hidden,
            codebook_width=codebook_width,
        )
    except ValueError as error:
        raise ValueError(f"{path} has impossible sizes: {error}") from error
    with torch.device("meta"):
        vae = DiscreteVAE(config)
    state = {re.sub(r"^codebook\.", "codes.", name): weights[name] for name in weights}
    load_weights(vae, state, path)
    return vae.eval()


def _count(pattern: str, weights: Tensors) -> int:
    return len({match[1] for name in weights if (match := re.fullmatch(pattern, name))})
