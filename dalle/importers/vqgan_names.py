"""What the weights of a VQGAN are called: by taming-transformers and us, in flax, and in min-dalle's decoder alone."""

import itertools
import re
from typing import Literal

from torch import Tensor

from storage.checkpoints.tensors import Tensors, summary

Style = Literal["taming", "flax", "detoker"]
"""taming-transformers at 3ba01b2, whose names ours are; vqgan-jax at 10ef240; min-dalle at 73621fb."""

_FLAX = (
    (r"\b(down|up|block|attn)\.(\d+)\.", r"\1_\2."),
    (r"(norm\w*)\.weight$", r"\1.scale"),
    (r"embedding\.weight$", "embedding.embedding"),
    (r"\.weight$", ".kernel"),
)
"""From our names to flax's, one after the other."""
_FROM_HWIO = (3, 2, 0, 1)
_LEFT_OUT = re.compile(r"loss\..*")
"""Beside the weights: the discriminator and the network of the perceptual loss."""
_LEFT_OUTSIDE = re.compile(r"(optimizer_states|lr_schedulers|callbacks|loops)\..*")
"""Beside the state dict, as PyTorch Lightning saves it."""
_WHOLE = ("", "state_dict.", "module.", "state_dict.module.", "params.")
"""What the names in a file begin with that holds a VQGAN alone."""
_LAST = re.compile(r"(.*?)decoder\.conv_in\.(weight|kernel)")

_OTHERS = (
    ("colorize", "a VQGAN of segmentation maps, not of pictures"),
    ("quantize.used", "a VQGAN with a subset of its codes (`remap`), whose numbers mean something else"),
    ("quantize.codebook_used", "LlamaGen's, whose codes have unit length"),
    ("encoder.conv_blocks.", "LlamaGen's, whose codes have unit length"),
    ("decoder.decoder.", "ruDALLE's variant that ends in a wavelet transform (DWT)"),
)
"""Parts that only other models have, which are called nearly as a VQGAN."""
_TELL_TALES = (
    ("codebook.weight", "DALLE-pytorch's own dVAE"),
    ("decoder.embed_tokens.", "DALL·E mini's transformer"),
    ("model.decoder.", "DALL·E mini's transformer"),
    ("transformer.", "a transformer"),
    ("visual.", "a CLIP"),
    ("vision_model.", "a CLIP"),
    ("blocks.group_", "OpenAI's dVAE, for which there is `dalle import-dvae`"),
)
"""What other files begin with."""


class VQGANWeights:
    """The weights of a VQGAN in a file, by our names."""

    def __init__(self, part: Tensors, style: Style) -> None:
        self.part, self.style = part, style

    def source(self, name: str) -> str:
        """Return what the file calls a weight."""
        if self.style == "detoker":
            return name.removeprefix("quantize.")
        if self.style == "flax":
            for pattern, replacement in _FLAX:
                name = re.sub(pattern, replacement, name)
            return name
        return "quantize.embed.weight" if name == "quantize.embedding.weight" and self.is_gumbel else name

    @property
    def is_gumbel(self) -> bool:
        """Whether codes are chosen by logits."""
        return "quantize.proj.weight" in self.part

    def __contains__(self, name: str) -> bool:
        return self.source(name) in self.part

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a convolution's weight, or the codes, have here.

        Raises:
            KeyError: there is no such weight; it is the file's name of it.
            ValueError: the shape has too many or too few numbers.
        """
        source = self.source(name)
        shape, rank = self.part.shape(source), 2 if "embedding" in name else 4
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"{source} has the shape {shape}")
        return tuple(shape[i] for i in _FROM_HWIO) if self._is_kernel(name, shape) else shape

    def __getitem__(self, name: str) -> Tensor:
        """Read a weight: float32, in memory of its own."""
        weight = self.part[self.source(name)]
        if self._is_kernel(name, weight.shape):
            return weight.permute(_FROM_HWIO).contiguous()
        # flax's normalisations once had the shape (1, 1, 1, C)
        return weight.flatten() if self.style == "flax" and "norm" in name else weight

    def count(self, name: str) -> int:
        """Return how many numbers from 0 on stand at `{}` in the name of a weight that there is."""
        return next(i for i in itertools.count() if name.format(i) not in self)

    def refuse_unknown(self) -> None:
        """Raise ValueError if a weight of the part was not read, and is none that may be left."""
        if unknown := [name for name in self.part.unused() if not _LEFT_OUT.fullmatch(name)]:
            raise ValueError(
                f"{self.part.path} has {len(unknown)} weights that no plain VQGAN has, {unknown[0]} among them: "
                "not read here"
            )

    def _is_kernel(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a weight is a convolution's in flax's order: height, width, in, out."""
        return self.style == "flax" and len(shape) == 4 and "norm" not in name


def find_vqgan(tensors: Tensors, prefix: str | None = None) -> VQGANWeights:
    """Return the part of a checkpoint that is a VQGAN.

    Args:
        tensors: the checkpoint, which may hold more models.
        prefix: what the names of the VQGAN's weights begin with; None to find it.

    Raises:
        ValueError: there is none, or several; the message says what the file is instead, if that can be told.
    """
    found = {match[1]: match[2] for name in tensors if (match := _LAST.fullmatch(name))}
    if prefix is None:
        if len(found) > 1:
            which = " or ".join(sorted(found))
            raise ValueError(f"{tensors.path} holds {len(found)} VQGANs: say which by --prefix {which}")
        prefix = next(iter(found), "")
        prefix = re.sub(r"(^|\.)decoder\.$", r"\1", prefix)  # of a decoder inside the decoder
    part = tensors.under(prefix)
    for start, what in _OTHERS:
        if any(name.startswith(start) for name in part):
            raise ValueError(f"{tensors.path} is {what}: not read here; expected a plain VQGAN")
    if prefix not in found:
        raise ValueError(_no_vqgan(tensors, prefix))
    style: Style = "flax" if found[prefix] == "kernel" else "detoker" if "embedding.weight" in part else "taming"
    weights = VQGANWeights(part, style)
    if "quantize.embedding.weight" not in weights:
        raise ValueError(
            f"{tensors.path} is an autoencoder without codes, such as Stable Diffusion's: not read here; expected a "
            "VQGAN"
        )
    outside = [name for name in tensors.unused() if not name.startswith(prefix) and not _LEFT_OUTSIDE.fullmatch(name)]
    if outside and prefix in _WHOLE:
        raise ValueError(
            f"{tensors.path} has {len(outside)} tensors beside those of a VQGAN, {outside[0]} among them: not read here"
        )
    return weights


def _no_vqgan(tensors: Tensors, prefix: str) -> str:
    """Return the message for a file that is something else."""
    if prefix:
        return f"{tensors.path} has no VQGAN under {prefix!r}; leave out the prefix to have it looked for"
    names = [name.removeprefix("state_dict.") for name in tensors]
    found = next((what for start, what in _TELL_TALES for name in names if name.startswith(start)), None)
    shown = f"it looks like {found}" if found else f"it holds {summary(names[:100]) or 'no tensors'}"
    return (
        f"{tensors.path} is no VQGAN that is read here: {shown}; expected a VQGAN of taming-transformers, ruDALLE, "
        "minDALL-E or DALL·E mini"
    )
