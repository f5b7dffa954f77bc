"""Reads OpenAI's published dVAE, encoder.pkl and decoder.pkl, without running anything in them.

The files are whole modules saved by `torch.save` (openai/DALL-E at 5be4b23): pickles, which can name any function and
have it called. Here each name that such a file needs becomes an inert stand-in that only records its arguments; any
other name is refused; nothing is imported or called. The weights are then taken from the records, with every size
checked.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dvae.model import DVAE, DVAEConfig
from storage.model_directory import load_weights

_ZIP_MAGIC = b"PK\x03\x04"
"""First bytes of a file that torch.save wrote since version 1.6."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a file that torch.save wrote before version 1.6."""
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
}
_NAMES = {
    "__builtin__.set",
    "builtins.set",
    "collections.OrderedDict",
    "functools.partial",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    *_STORAGES,
}
_PACKAGES = ("dall_e", "torch.nn.modules")
"""Names of these modules and of the modules inside them get stand-ins too."""

_READING_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors of reading a damaged file, and of stand-ins called in unexpected ways."""


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
    config = _config(encoder, decoder, f"{encoder_path} and {decoder_path}")
    with torch.device("meta"):
        dvae = DVAE(config)
    load_weights(dvae.encoder, encoder, encoder_path)
    load_weights(dvae.decoder, decoder, decoder_path)
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


class _CodeError(ValueError):
    """A name without a stand-in."""


class _Inert:
    """Stands in for a name in the file: takes arguments, a state and items, and only records them.

    Subclasses are made per file, so that nothing a file does outlives its reading.
    """

    origin = ""
    """The name in the file."""
    args: tuple[Any, ...]
    """Its recorded arguments."""
    state: Any
    """Its recorded attributes."""
    items: dict[Any, Any]
    """Its recorded items, for a mapping."""

    def __new__(cls, *args: object) -> Self:
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, {}
        return self

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        # without this method, the unpickler would set attributes of the file's choosing
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickle into stand-ins and plain containers.

    `storages` holds the type and the number of elements of the raw data that the pickle refers to, by key.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[str, type[_Inert]] = {}
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> type[_Inert]:
        """Return the stand-in of a name: the only way from a pickle to anything callable."""
        origin = f"{module}.{name}"
        is_plain = all(part.isidentifier() for part in (*module.split("."), name))
        is_inside = any(module == package or module.startswith(f"{package}.") for package in _PACKAGES)
        if not is_plain or not (is_inside or origin in _NAMES):
            raise _CodeError(origin)
        if origin not in self._classes:
            self._classes[origin] = type(name, (_Inert,), {"origin": origin})
        return self._classes[origin]

    def persistent_load(self, pid: Any) -> Any:
        """Return the key of a storage, or the class of a module, to which the legacy format adds its source."""
        match pid:
            case ("module", standin, _, _):
                return standin
            case ("storage", standin, str(key), _, int(n_elements)) | (
                "storage",
                standin,
                str(key),
                _,
                int(n_elements),
                None,
            ):
                dtype = _STORAGES[standin.origin]
                if n_elements < 1 or self.storages.setdefault(key, (dtype, n_elements)) != (dtype, n_elements):
                    raise ValueError(f"storage {key} is described in two ways, or empty")
                return key
        raise ValueError("it refers to data in an unknown way")


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
        with path.open("rb") as file:
            is_zip = file.read(4) == _ZIP_MAGIC
        module, storages = _read_zip(path) if is_zip else _read_legacy(path)
        found = module.origin if isinstance(module, _Inert) else f"a {type(module).__name__}"
        if found != origin:
            raise ValueError(f"it holds {found} instead of {origin}")
        _collect(module, "", storages, state, set())
    except _CodeError as error:
        raise ValueError(f"{path} would run code: {error}; refused; {expected}, from {url}") from None
    except _READING_ERRORS as error:
        raise ValueError(f"{path} cannot be read ({error}); {expected}, from {url}") from error
    return state


def _read_zip(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the object and its storages from the format since torch 1.6."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("torch.save did not write it")
        root = roots[0]
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        unpickler = _InertUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        module = unpickler.load()
        storages = {}
        for key, (dtype, n_elements) in unpickler.storages.items():
            entry = entries[f"{root}data/{key}"]
            n_bytes = n_elements * dtype.itemsize
            # torch.save compresses nothing: refuse unread what would unpack to more than the file holds
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != n_bytes:
                raise ValueError(f"storage {key} has {entry.file_size} bytes instead of {n_bytes}")
            storages[key] = torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype)
    return module, storages


def _read_legacy(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the object and its storages from the format before torch 1.6.

    It is five pickles (magic number, version, machine, object, keys of storages), then the length and the
    data of every storage.
    """
    file = io.BytesIO(path.read_bytes())
    if _InertUnpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    _version, machine = (_InertUnpickler(file).load() for _ in range(2))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    unpickler = _InertUnpickler(file)
    module = unpickler.load()
    storages = {}
    for key in _InertUnpickler(file).load():
        dtype, n_elements = unpickler.storages[key]
        n_bytes = n_elements * dtype.itemsize
        found = int.from_bytes(file.read(8), "little")
        data = bytearray(file.read(n_bytes))
        if found != n_elements or len(data) != n_bytes:
            raise ValueError(
                f"storage {key} has {len(data)} bytes and {found} elements instead of {n_bytes} and {n_elements}"
            )
        storages[key] = torch.frombuffer(data, dtype=dtype)
    return module, storages


def _collect(
    module: object, prefix: str, storages: Mapping[str, Tensor], state: dict[str, Tensor], seen: set[int]
) -> None:
    """Add the parameters of a recorded module and of those inside it to `state`, under our names."""
    if not isinstance(module, _Inert) or not isinstance(module.state, dict) or id(module) in seen:
        raise ValueError(f"{prefix or 'it'} is not a module, or is in it twice")
    seen.add(id(module))
    for name, parameter in _items(module.state.get("_parameters")):
        if parameter is not None:
            state[prefix + {"w": "weight", "b": "bias"}.get(name, name)] = _tensor(parameter, prefix + name, storages)
    for name, child in _items(module.state.get("_modules")):
        _collect(child, f"{prefix}{name}.", storages, state, seen)


def _items(mapping: object) -> list[tuple[str, Any]]:
    items = mapping.items if isinstance(mapping, _Inert) else mapping
    if not isinstance(items, dict) or not all(isinstance(name, str) for name in items):
        raise ValueError("a module lacks its parameters or its parts")
    return list(items.items())


def _tensor(parameter: Any, name: str, storages: Mapping[str, Tensor]) -> Tensor:
    """Return a recorded parameter in float32: a part of a storage, by offset and shape."""
    match parameter:
        case _Inert(
            origin="torch._utils._rebuild_parameter",
            args=(_Inert(origin="torch._utils._rebuild_tensor_v2") as tensor, *_),
        ):
            key, offset, shape, strides, *_ = tensor.args
        case _:
            raise ValueError(f"{name} is not a parameter")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError(f"{name} has an impossible shape")
    values = storages[key][offset : offset + math.prod(shape)]
    if values.numel() != math.prod(shape) or tuple(strides) != _contiguous_strides(shape):
        raise ValueError(f"{name} of shape {tuple(shape)} does not fit its data")
    return values.reshape(shape).float()


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
