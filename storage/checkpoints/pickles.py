"""Pickles of other programs, read into records.

A pickle can name any function and have it called. Here every name that the caller allows becomes an inert stand-in,
made on the spot, which only records its arguments; any other name is refused; nothing is imported or called.
"""

import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any, Self, cast

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

Readable = BytesIO | mmap.mmap
"""Where pickles are read from: a false length in one reads no more than is there."""

MAX_PICKLE_BYTES = 64 << 20
"""Largest pickle; the numbers of tensors are outside of it."""
MAX_PARTS = 10_000_000
"""Objects that one object may hold, those that it holds several times counted as often."""


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


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle into stand-ins and plain containers.

    `storages` holds the name of the type and the number of elements of the raw data that the pickle refers to, by key.
    """

    def __init__(self, file: Readable, allowed: Allowed) -> None:
        super().__init__(file)
        self._allowed = allowed
        self._classes: dict[str, type[Inert]] = {}
        self.storages: dict[str, tuple[str, int]] = {}

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
                described = (standin.origin, n_elements)
                if n_elements < 0 or self.storages.setdefault(key, described) != described:
                    raise ValueError(f"storage {key} is described in two ways")
                return key
        raise ValueError("it refers to data in an unknown way")


def read_pickle(file: Readable, allowed: Allowed) -> InertUnpickler:
    """Return the unpickler of the pickle that a file is at, ready to `load`.

    Raises:
        ValueError, LookupError: it asks for far more memory than it has bytes, or is no pickle.
    """
    _refuse_bombs(file)
    return InertUnpickler(file, allowed)


def _refuse_bombs(file: Readable) -> None:
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
    for opcode, given, _ in pickletools.genops(cast(IO[bytes], file)):
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
