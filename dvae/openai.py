"""Reads OpenAI's published dVAE, encoder.pkl and decoder.pkl, without running anything in them.

The files are whole modules saved by `torch.save` (openai/DALL-E at 5be4b23). `storage/checkpoints/` reads them into
records, of which the weights are taken here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvae.model import DVAE, DVAEConfig
from storage.checkpoints.pickles import READING_ERRORS, Allowed, Inert, RefusedNameError
from storage.checkpoints.torch_files import TENSOR_NAMES, TorchFile, read_torch_file
from storage.errors import reason_of
from storage.models.directory import load_weights

_ALLOWED = Allowed(
    names={*TENSOR_NAMES, "__builtin__.set", "builtins.set", "functools.partial", "torch.device"},
    packages=("dall_e", "torch.nn.modules"),
)


def import_openai(encoder_path: Path | str, decoder_path: Path | str) -> DVAE:
    """Return OpenAI's dVAE from its two published files; the sizes are read off the weights.

    Args:
        encoder_path: encoder.pkl, from cdn.openai.com/dall-e/encoder.pkl.
        decoder_path: decoder.pkl, from cdn.openai.com/dall-e/decoder.pkl.

    Returns:
        The model on the CPU in evaluation mode, with float32 weights. `save` makes the directory that
        everything else loads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not what it should be, is damaged, or names code.
    """
    encoder = _read_module(Path(encoder_path), "Encoder")
    decoder = _read_module(Path(decoder_path), "Decoder")
    return dvae_of(encoder, decoder, f"{encoder_path} and {decoder_path}")


def dvae_of(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], files: str) -> DVAE:
    """Return the dVAE with OpenAI's weights under our names; ValueError naming their files if they are of none."""
    config = _config(encoder, decoder, files)
    with torch.device("meta"):
        dvae = DVAE(config)
    load_weights(dvae.encoder, encoder, files)
    load_weights(dvae.decoder, decoder, files)
    return dvae.eval()


def _config(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], files: str) -> DVAEConfig:
    try:
        config = DVAEConfig(
            n_hid=encoder["blocks.input.weight"].shape[0],
            n_init=decoder["blocks.input.weight"].shape[0],
            n_groups=_count(r"blocks\.group_(\d+)\.", encoder),
            n_blocks=_count(r"blocks\.group_1\.block_(\d+)\.", encoder),
            vocab_size=encoder["blocks.output.conv.weight"].shape[0],
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"{files} lack the weight {error}: expected OpenAI's encoder.pkl and decoder.pkl") from error
    except ValueError as error:
        raise ValueError(f"{files} have impossible sizes: {error}") from error
    return config


def _count(pattern: str, names: Mapping[str, Tensor]) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _read_module(path: Path, kind: str) -> dict[str, Tensor]:
    """Return the parameters of OpenAI's module by our names.

    Args:
        path: encoder.pkl or decoder.pkl.
        kind: "Encoder" or "Decoder".
    """
    origin, expected = f"dall_e.{kind.lower()}.{kind}", f"expected OpenAI's {kind.lower()}.pkl"
    url = f"https://cdn.openai.com/dall-e/{kind.lower()}.pkl"
    if path.is_dir():
        raise ValueError(f"{path} is a folder: {expected}, from {url}")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: {expected}, from {url}")
    state: dict[str, Tensor] = {}
    try:
        file = read_torch_file(path, _ALLOWED)
        module = file.content
        found = module.origin if isinstance(module, Inert) else f"a {type(module).__name__}"
        if found != origin:
            raise ValueError(f"it holds {found} instead of {origin}")
        _collect(module, "", file, state, set())
    except RefusedNameError as error:
        raise ValueError(f"{path} would run code: {reason_of(error, 200)}; refused; {expected}, from {url}") from None
    except READING_ERRORS as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error, 200)}); {expected}, from {url}") from error
    return state


def _collect(module: object, prefix: str, file: TorchFile, state: dict[str, Tensor], seen: set[int]) -> None:
    """Add the parameters of a recorded module and of those inside it to `state`, under our names."""
    if not isinstance(module, Inert) or not isinstance(module.state, dict) or id(module) in seen:
        raise ValueError(f"{prefix or 'it'} is not a module, or is in it twice")
    seen.add(id(module))
    for name, parameter in _items(module.state.get("_parameters")):
        if parameter is not None:
            state[prefix + {"w": "weight", "b": "bias"}.get(name, name)] = file.tensor(parameter, prefix + name)
    for name, child in _items(module.state.get("_modules")):
        _collect(child, f"{prefix}{name}.", file, state, seen)


def _items(mapping: object) -> list[tuple[str, Any]]:
    items = mapping.items if isinstance(mapping, Inert) else mapping
    if not isinstance(items, dict) or not all(isinstance(name, str) for name in items):
        raise ValueError("a module lacks its parameters or its parts")
    return list(items.items())
