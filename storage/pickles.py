"""Files of torch.save from elsewhere, read without running anything that is in them.

They are pickles, which can name any function and have it called. Here every name that the caller allows becomes an
inert stand-in, made on the spot, which only records its arguments; any other name is refused; nothing is imported or
called. Afterwards the tensors are taken out of the records, with every size checked.
"""

import errno
import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

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
_PARAMETER, _TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
TENSOR_NAMES = frozenset({"collections.OrderedDict", _PARAMETER, _TENSOR, *_STORAGES})
"""Names in files that hold tensors and parameters."""

MAX_PICKLE_BYTES = 64 << 20
"""Largest pickle; the numbers of tensors are outside of it."""
MAX_PARTS = 10_000_000
"""Objects that one object may hold, those that it holds several times counted as often."""

READING_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Raised by reading a damaged file, or records of another form than expected."""


class RefusedNameError(ValueError):
    """The file names something that is not allowed; the message is the name."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Names that get stand-ins."""

    names: Collection[str]
    """Whole names, such as "functools.partial"."""
    packages: Sequence[str] = ()
    """Modules of which, and of the modules inside them, all names are allowed."""

    def has(self, module: str, name: str) -> bool:
        """Return whether a name of a module is allowed; names with dots inside never are."""
        is_plain = all(part.isidentifier() for part in (*module.split("."), name))
        is_inside = any(module == package or module.startswith(f"{package}.") for package in self.packages)
        return is_plain and (is_inside or f"{module}.{name}" in self.names)


class Inert:
    """Stands for a name in the file: it takes arguments, a state and items, and only records them.

    Its classes are made per file, so that nothing a file does outlives its reading.
    """

    origin = ""
    """The name in the file."""
    args: tuple[Any, ...]
    """Arguments of the call."""
    state: Any
    """Attributes that it would have."""
    items: dict[Any, Any]
    """Items that it would have as a mapping."""

    def __new__(cls, *args: object) -> Self:
        """Record the arguments."""
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, {}
        return self

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        # without this method, the unpickler would set attributes of the file's choosing
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value


@dataclass(frozen=True)
class TorchFile:
    """The content of a file of torch.save."""

    content: Any
    """Plain containers, numbers, texts and `Inert` records."""
    storages: Mapping[str, Tensor]
    """The numbers of the tensors, flat, by the keys that the records name."""

    def tensor(self, record: Any, name: str) -> Tensor:
        """Return a recorded tensor or parameter in float32.

        Args:
            record: in `content`.
            name: of it, for messages.

        Raises:
            ValueError: the record is something else, or does not fit its storage.
        """
        if isinstance(record, Inert) and record.origin == _PARAMETER and record.args:
            record = record.args[0]
        if not isinstance(record, Inert) or record.origin != _TENSOR:
            raise ValueError(f"{name} is not a tensor")
        key, offset, shape, strides, *_ = record.args
        if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
            raise ValueError(f"{name} has an impossible shape")
        values = self.storages[key][offset : offset + math.prod(shape)]
        if values.numel() != math.prod(shape) or tuple(strides) != _contiguous_strides(shape):
            raise ValueError(f"{name} of shape {tuple(shape)} does not fit its data")
        return values.reshape(shape).float()


def read_torch_file(path: Path, allowed: Allowed) -> TorchFile:
    """Read a file of torch.save, of either format.

    Raises:
        RefusedNameError (a ValueError): it names something that is not allowed.
        READING_ERRORS: it is damaged, or something else.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        return _read_zip(path, allowed) if is_zip else _read_legacy(path, allowed)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise  # the system's
        raise ValueError("it names places outside of itself, or is damaged") from error


def _refuse_bombs(file: io.BytesIO) -> None:
    """Read a pickle's instructions without following them; the place in the file stays.

    A pickle of a few bytes can ask for gigabytes, by a number for one of its parts, or hold itself so many times over
    that a hash of it would never end.

    Raises:
        ValueError, LookupError: it is such a pickle, or none.
    """
    start, mark = file.tell(), -1
    stack: list[int] = []  # for each object on the unpickler's stack the number of its parts
    memo: dict[int, int] = {}
    given: Any  # pickletools says nothing of its kind
    for opcode, given, _ in pickletools.genops(file):
        name, n_before, parts = opcode.name, len(opcode.stack_before), 0
        if pickletools.markobject in opcode.stack_before or (name == "POP" and stack[-1] == mark):
            while (top := stack.pop()) != mark:
                parts += top
            n_before = 0 if name == "POP" else opcode.stack_before.index(pickletools.markobject)
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if name == "MEMOIZE" else int(given)
            if not 0 <= number <= len(memo):
                raise ValueError("it numbers its parts in an impossible way")
            memo[number] = stack[-1]
        parts += sum(stack.pop() for _ in range(n_before))
        if name in ("GET", "BINGET", "LONG_BINGET"):
            parts = memo[int(given)]
        if parts > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS:,} parts")
        stack += [mark if after is pickletools.markobject else 1 + parts for after in opcode.stack_after]
    file.seek(start)


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickle into stand-ins and plain containers.

    `storages` holds the type and the number of elements of the raw data that the pickle refers to, by key.
    """

    def __init__(self, file: io.BytesIO, allowed: Allowed) -> None:
        _refuse_bombs(file)
        super().__init__(file)
        self._allowed = allowed
        self._classes: dict[str, type[Inert]] = {}
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        """Return the stand-in of a name. This is the only way from a pickle to anything that can be called."""
        origin = f"{module}.{name}"
        if not self._allowed.has(module, name):
            raise RefusedNameError(origin)
        if origin not in self._classes:
            self._classes[origin] = type(name, (Inert,), {"origin": origin})
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


def _read_zip(path: Path, allowed: Allowed) -> TorchFile:
    """Read the format since torch 1.6."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("torch.save did not write it")
        root = roots[0]
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        if entries[f"{root}data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
        unpickler = _InertUnpickler(io.BytesIO(archive.read(f"{root}data.pkl")), allowed)
        content = unpickler.load()
        storages = {}
        for key, (dtype, n_elements) in unpickler.storages.items():
            entry = entries[f"{root}data/{key}"]
            n_bytes = n_elements * dtype.itemsize
            # torch.save compresses nothing: data that would unpack to more than the file holds is refused unread
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != n_bytes:
                raise ValueError(f"storage {key} has {entry.file_size} bytes instead of {n_bytes}")
            storages[key] = torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype)
    return TorchFile(content, storages)


def _read_legacy(path: Path, allowed: Allowed) -> TorchFile:
    """Read the format before torch 1.6.

    It has five pickles (magic number, version, machine, object, keys of storages), then the length and the
    data of every storage.
    """
    file = io.BytesIO(path.read_bytes())
    if _InertUnpickler(file, allowed).load() != _LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    _version, machine = (_InertUnpickler(file, allowed).load() for _ in range(2))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    unpickler = _InertUnpickler(file, allowed)
    content = unpickler.load()
    storages = {}
    for key in _InertUnpickler(file, allowed).load():
        dtype, n_elements = unpickler.storages[key]
        n_bytes = n_elements * dtype.itemsize
        found = int.from_bytes(file.read(8), "little")
        data = bytearray(file.read(n_bytes))
        if found != n_elements or len(data) != n_bytes:
            raise ValueError(
                f"storage {key} has {len(data)} bytes and {found} elements instead of {n_bytes} and {n_elements}"
            )
        storages[key] = torch.frombuffer(data, dtype=dtype)
    return TorchFile(content, storages)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
