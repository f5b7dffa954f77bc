"""What sampling needs of a transformer, whichever of the family it is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.cache import Decoder, bytes_per_candidate, bytes_per_caption
from dalle.family.dalle_pytorch import cache as pytorch
from dalle.family.dalle_pytorch.model import KIND as PYTORCH_KIND
from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.family.mini import cache as mini
from dalle.family.mini.config import MiniConfig
from dalle.family.mini.model import KIND as MINI_KIND
from dalle.family.mini.model import DALLEMini
from dalle.family.variants.model import KIND as VARIANT_KIND
from dalle.family.variants.model import VariantDALLE, VariantDecoder
from dalle.model import DALLE, KIND, DALLEConfig
from storage.models.directory import directory_kind, read_config
from storage.models.stored import n_weights

Transformer = DALLE | DALLEMini | VariantDALLE | DALLEPytorch
"""Any of them."""
Decoding = Decoder | mini.MiniDecoder | pytorch.DALLEPytorchDecoder
"""Any of them while it decodes: one image position a step, for all candidates."""


Trained = DALLE | DALLEMini
"""Those that are trained here."""
TrainedConfig = DALLEConfig | MiniConfig
"""Their sizes."""


def new_transformer(config: TrainedConfig) -> Trained:
    """Return a new model, its weights drawn by torch's global generator."""
    return DALLEMini(config) if isinstance(config, MiniConfig) else DALLE(config)


def kind_of(config: TrainedConfig) -> str:
    """Return the kind of the directory that such a model is saved in."""
    return MINI_KIND if isinstance(config, MiniConfig) else KIND


def load_transformer(path: Path) -> Transformer:
    """Return the transformer of a directory, on the CPU; raises as `DALLE.load`."""
    return _class_of(path).load(path)


def sized_transformer(path: Path) -> Transformer:
    """Return the transformer of a directory without its weights, on the meta device; raises as `load_transformer`."""
    kind = _class_of(path)
    build: Callable[[Any], Transformer] = kind
    with torch.device("meta"):
        return build(read_config(path, kind.kind, kind.config_type))


def _class_of(path: Path) -> type[Transformer]:
    kinds: dict[str, type[DALLEMini | VariantDALLE | DALLEPytorch]] = {
        MINI_KIND: DALLEMini,
        VARIANT_KIND: VariantDALLE,
        PYTORCH_KIND: DALLEPytorch,
    }
    return kinds.get(directory_kind(path, expected=KIND), DALLE)


def decoding(
    model: Transformer, text: Tensor, counts: Sequence[int], prefix: Tensor | None = None, *, compile: bool = False
) -> Decoding:
    """Read the prompts and return what decodes their candidates; arguments and errors are `Decoder`'s."""
    if isinstance(model, DALLEMini):
        return mini.MiniDecoder(model, text, counts, prefix, compile=compile)
    if isinstance(model, VariantDALLE):
        return VariantDecoder(model, text, counts, prefix, compile=compile)
    if isinstance(model, DALLEPytorch):
        return pytorch.DALLEPytorchDecoder(model, text, counts, prefix)
    return Decoder(model, text, counts, prefix, compile=compile)


def candidate_bytes(model: Transformer) -> int:
    """Return the memory of one candidate's keys and values."""
    if isinstance(model, DALLEMini):
        return mini.candidate_bytes(model)
    if isinstance(model, DALLEPytorch):
        return pytorch.bytes_per_candidate(model.config, model.dtype)
    return bytes_per_candidate(model.config, model.dtype)


def caption_bytes(model: Transformer) -> int:
    """Return the memory of one caption: its keys and values, and the peak of reading it."""
    if isinstance(model, DALLEMini):
        return mini.caption_bytes(model)
    if isinstance(model, DALLEPytorch):
        return pytorch.bytes_per_caption(model.config, model.dtype)
    return bytes_per_caption(model.config, model.dtype)


def n_step_weights(model: Transformer) -> int:
    """Return how many weights a candidate is multiplied with at each image position."""
    if isinstance(model, DALLEMini):
        return mini.n_step_weights(model)
    if isinstance(model, DALLEPytorch):
        return pytorch.n_step_weights(model)
    return n_weights(model.blocks) + n_weights(model.image_head)
