"""What sampling needs of a transformer, whichever of the family it is."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from dalle.cache import Decoder, bytes_per_candidate, bytes_per_caption
from dalle.model import DALLE

Transformer = DALLE
"""Any of them."""
Decoding = Decoder
"""Any of them while it decodes: one image position a step, for all candidates."""


def load_transformer(path: Path) -> Transformer:
    """Return the transformer of a directory, on the CPU; raises as `DALLE.load`."""
    return DALLE.load(path)


def decoding(
    model: Transformer, text: Tensor, counts: Sequence[int], prefix: Tensor | None = None, *, compile: bool = False
) -> Decoding:
    """Read the prompts and return what decodes their candidates; arguments and errors are `Decoder`'s."""
    return Decoder(model, text, counts, prefix, compile=compile)


def candidate_bytes(model: Transformer) -> int:
    """Return the memory of one candidate's keys and values."""
    return bytes_per_candidate(model.config, model.dtype)


def caption_bytes(model: Transformer) -> int:
    """Return the memory of one caption: its keys and values, and the peak of reading it."""
    return bytes_per_caption(model.config, model.dtype)


def n_step_weights(model: Transformer) -> int:
    """Return how many weights a candidate is multiplied with at each image position."""
    return _n_weights(model.blocks) + _n_weights(model.image_head)


def _n_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
