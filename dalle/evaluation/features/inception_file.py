"""Inception v3 from a file of the user: nothing in it is run, nothing is downloaded."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dalle.evaluation.features.inception import LAYOUTS, Inception, Layout
from storage.checkpoints.tensors import Tensors, open_tensors, sha256
from storage.models.directory import load_weights

logger = logging.getLogger(__name__)

_CLASSES = "fc.weight"
_UNUSED = "AuxLogits."
"""The head that torchvision's file has for training."""
_COUNTER = ".num_batches_tracked"
"""Ends the names of numbers that only training reads; files of older PyTorch lack them."""


class InceptionFile(NamedTuple):
    """A file's network."""

    net: Inception
    sha256: str
    path: Path


def load_inception(path: Path | str, device: torch.device | str = "cpu") -> InceptionFile:
    """Read Inception v3, of TensorFlow's layout or torchvision's, which the number of classes tells apart.

    A file whose sha256 is not that of a published one is read, and a warning says so.

    Args:
        path: a state dict by torch.save or in safetensors, or an archive of TorchScript with the same names.
        device: where the network computes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of the two networks, and the message says what is missing, unexpected or of another
            shape; or it is damaged, or names code.
    """
    path = Path(path)
    tensors = open_tensors(path)
    layout = _layout(tensors)
    net = _empty(layout)
    names = [name for name in tensors if not name.startswith(_UNUSED)]
    counters = {name: torch.tensor(0) for name in net.state_dict() if name.endswith(_COUNTER) and name not in names}
    shapes = {name: torch.empty(tensors.shape(name), device="meta") for name in names}
    try:
        load_weights(_empty(layout), shapes | counters, path)  # before anything is read
    except ValueError as error:
        raise ValueError(f"{error}; {_expected(tensors, layout)}") from None
    state: Mapping[str, Tensor] = {
        name: tensors[name] if name.endswith(_COUNTER) else tensors[name].float() for name in names
    }
    load_weights(net, {**state, **counters}, path)
    digest = sha256(path)
    if not digest.startswith(layout.sha256):
        logger.warning(
            "%s: its sha256 begins with %s; that of the published file with %s: numbers are not comparable with those "
            "of others",
            path,
            digest[:8],
            " or ".join(layout.sha256),
        )
    return InceptionFile(net.eval().requires_grad_(False).to(device), digest, path)


def _empty(layout: Layout) -> Inception:
    with torch.device("meta"):
        return Inception(layout)


def _layout(tensors: Tensors) -> Layout:
    classes = tensors.shape(_CLASSES)[0] if _CLASSES in tensors and tensors.shape(_CLASSES) else None
    for layout in LAYOUTS.values():
        if layout.classes == classes:
            return layout
    found = f"no {_CLASSES}" if classes is None else f"{classes} classes"
    raise ValueError(f"{tensors.path} has {found}: it is no Inception v3 that is known here; {_expected(tensors)}")


def _expected(tensors: Tensors, *layouts: Layout) -> str:
    files = " or ".join(layout.file for layout in layouts or LAYOUTS.values())
    script = "it is a TorchScript archive, whose names differ from those of the state dict; "
    return f"{script if tensors.format == 'TorchScript' else ''}expected {files}"
