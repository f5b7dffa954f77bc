"""A model's directory on disk: config.json beside model.safetensors, replaced as a whole or not at all.

Saving writes a temporary sibling directory and renames it into place; loading checks everything before a weight is
used. A `kind` ("dvae", "dalle", "clip") tells the models apart, and a frozen dataclass is the configuration.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from storage.atomic import flush
from storage.disk import full_disk_note
from storage.errors import check_number, check_whole
from storage.text import parse_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
"""A third file, in the directories of models that read captions themselves."""
FORMAT_VERSION = 1
"""Increased when older code can no longer read new directories."""

ADDED_LATER = {"added_later": True}
"""Metadata of a configuration's field that older directories lack; they are read with its default."""

MAX_SIZE = 1 << 24
"""Largest whole number of a configuration that is read: of a larger one, torch could not even tell the memory."""

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format, in the order in which the library places tensors of different types."""

Config = TypeVar("Config")

_PARTS = ("layers", "groups", "blocks")
"""Ends of the names of fields that count parts of a model."""
_CONFIG_KEYS = {"format", "kind", "config", "metadata", "weights_sha256"}


def save_directory(
    path: Path | str,
    kind: str,
    config: Any,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and model.safetensors as the directory `path`, replacing the model directory that was there.

    Everything is written beside `path` first and renamed at the end, so that a crash or a full disk leaves
    the old directory as it was.

    Args:
        path: the directory; its parents are made.
        kind: what the model is, e.g. "dvae".
        config: a dataclass whose fields are JSON values or tuples of them.
        state: weights by name; on any device. They are looked up one at a time.
        metadata: JSON values kept beside the configuration, no part of `directory_hash`.
        files: further files of the directory, by name.
        like: tensors without values of the weights' names, shapes and types, if looking up a weight is dear.

    Raises:
        ValueError: `path` is something other than a directory of this kind, which is never overwritten, `metadata`
            is not JSON, or the weights are not as `like` says.
        OSError: the disk is full or not writable; the older directory is intact.
    """
    path = Path(path).resolve()
    _require_replaceable(path, kind, {CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, *(files or {})})
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        temporary.mkdir(parents=True)
        for name, data in (files or {}).items():
            (temporary / name).write_bytes(data)
        write_tensors(temporary / WEIGHTS_FILE, state, like)
        description = _description(kind, config, metadata, _sha256(temporary / WEIGHTS_FILE))
        (temporary / CONFIG_FILE).write_text(description, encoding="utf-8")
        for file in temporary.iterdir():
            flush(file)
        _swap(temporary, path)
    except OSError as error:
        code = error.errno or errno.EIO
        full = full_disk_note(error, path)
        full += ", or choose another place" if full else ""
        raise OSError(
            code,
            f"cannot save the {kind} in {path}: {os.strerror(code)}; what was there before is unchanged{full}",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> None:
    """Write the bytes that `safetensors.torch.save_file` writes; each tensor is looked up once, and then let go.

    Args:
        path: the file; it gets the mode that the umask gives.
        tensors: by name, on any device.
        like: tensors of the same names, shapes and types, such as on the meta device; needed if looking up a tensor of
            `tensors` is dear.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or type than that of `like`.
        OSError: it cannot be written.
    """
    like = tensors if like is None else like
    if like.keys() != tensors.keys():
        raise ValueError(f"tensors are missing or unexpected: {', '.join(sorted(like.keys() ^ tensors.keys()))}")
    types = list(_NAMES)
    names = sorted(like, key=lambda name: (types.index(like[name].dtype), name))
    header, offset = {}, 0
    for name in names:
        size = math.prod(like[name].shape) * like[name].dtype.itemsize
        places = [offset, offset + size]
        header[name] = {"dtype": _NAMES[like[name].dtype], "shape": list(like[name].shape), "data_offsets": places}
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach()
            if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
                found, expected = tuple(tensor.shape), tuple(like[name].shape)
                raise ValueError(f"{name} is {tensor.dtype} {found} instead of {like[name].dtype} {expected}")
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def load_directory(
    path: Path | str, kind: str, config_type: type[Config]
) -> tuple[Config, dict[str, Tensor], dict[str, Any]]:
    """Read a directory written by `save_directory`.

    Returns:
        The configuration, the weights by name on the CPU, and the metadata.

    Raises:
        FileNotFoundError: there is no such directory, or one of its two files is missing.
        ValueError: it is of another kind or a newer format, its configuration does not fit `config_type`,
            or its weights are damaged.
    """
    path = Path(path)
    description = _read_description(path, kind)
    config = _config(path / CONFIG_FILE, description["config"], config_type)
    weights = path / WEIGHTS_FILE
    found, expected = _sha256(weights), description["weights_sha256"]
    if found != expected:
        raise ValueError(
            f"{weights} is damaged: its sha256 is {found[:16]}…, but {CONFIG_FILE} says {str(expected)[:16]}…; "
            "copy or save the directory again"
        )
    try:
        state = load_file(weights, device="cpu")
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is no readable safetensors file ({error}); copy or save the directory again"
        ) from error
    if not_numbers := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise ValueError(
            f"{weights} holds {state[not_numbers[0]].dtype} in {not_numbers[0]!r}, expected floating-point weights; "
            "copy or save the directory again"
        )
    for name, value in vars(config).items():
        # each has weights of its own: thousands of millions of them would be built for hours, to be refused in the end
        if name.endswith(_PARTS) and value > len(state):
            raise ValueError(f"{path / CONFIG_FILE} says {name} {value:,}, but {weights.name} has {len(state)} weights")
    return config, state, description["metadata"]


def read_config(path: Path | str, kind: str, config_type: type[Config]) -> Config:
    """Read the configuration of a directory alone, however large its weights are.

    Raises:
        FileNotFoundError, ValueError: as `load_directory`.
    """
    return _config(Path(path) / CONFIG_FILE, _read_description(Path(path), kind)["config"], config_type)


def as_written_before(config: Any) -> dict[str, Any]:
    """Return a configuration's values as older versions wrote them: what was added later is left out at its default."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if fields[name].metadata != ADDED_LATER or value != fields[name].default
    }


def directory_hash(path: Path | str) -> str:
    """Return 16 hexadecimal digits that name a model: its kind, configuration and weights, but not its metadata.

    Cheap: the hash of the weights is read from config.json; `load_directory` compares it with the weights.

    Raises:
        FileNotFoundError: there is no model directory at `path`.
        ValueError: its config.json is not one of ours.
    """
    description = _read_description(Path(path), None)
    identity = {key: description[key] for key in ("kind", "config", "weights_sha256")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def directory_kind(path: Path | str, *, expected: str) -> str:
    """Return the kind of a model that was saved by `save_directory`.

    Args:
        path: its directory.
        expected: a kind, for the message if there is nothing.

    Raises:
        FileNotFoundError: there is no model directory at `path`.
        ValueError: its config.json is not one of ours.
    """
    return str(_read_description(Path(path), None, expected)["kind"])


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Assign `state`, without a copy, to `module`, which may be on the meta device.

    Raises:
        ValueError: a weight is missing, unexpected or of another shape; `path` is named in the message.
    """
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in expected]
    problems += [
        f"{name} has the shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"the weights in {path} do not fit its configuration: {shown}")
    module.load_state_dict(dict(state), strict=True, assign=True)


def _require_replaceable(path: Path, kind: str, names: Set[str]) -> None:
    """Raise ValueError unless `path` is free, an empty directory, or one saved as this kind, since saving deletes it.

    A config.json proves little: most models of other programs have one, beside other files.
    """
    choose = f"choose a new or empty directory, or that of a {kind}"
    if not path.is_dir():
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} is a file: {choose}")
        return
    found = sorted(path.iterdir())
    if not found:
        return
    others = [file.name for file in found if file.name not in names or not file.is_file()]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(f"{path} holds files that belong to no model ({shown}): {choose}")
    held = _format_and_kind(path / CONFIG_FILE)
    if held != (FORMAT_VERSION, kind):
        what = f"says format {held[0]!r}, kind {held[1]!r}" if held else "is missing or not ours"
        raise ValueError(
            f"{path} is not replaced: its {CONFIG_FILE} {what}; "
            f"expected format {FORMAT_VERSION}, kind {kind!r}: {choose}"
        )


def _format_and_kind(file: Path) -> tuple[Any, Any] | None:
    """Return format and kind of a config.json; None if it is not one of ours."""
    try:
        description = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_ours = isinstance(description, dict) and {"format", "kind"} <= description.keys()
    return (description["format"], description["kind"]) if is_ours else None


def _description(kind: str, config: Any, metadata: Mapping[str, Any] | None, weights_sha256: str) -> str:
    description = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "config": dataclasses.asdict(config),
        "metadata": dict(metadata or {}),
        "weights_sha256": weights_sha256,
    }
    try:
        return json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration and metadata of a {kind} must be JSON values: {error}") from error


def _swap(new: Path, path: Path) -> None:
    """Rename `new` to `path`; the directory that was there is removed only afterwards."""
    old = _aside(path)
    if path.exists():
        # left by a crash between the two renames of an earlier save; `path` has been written since
        if old.exists():
            shutil.rmtree(old)
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_description(path: Path, kind: str | None, expected: str = "model") -> dict[str, Any]:
    """Return the checked contents of config.json; of any kind where `kind` is None, and then `expected` names it."""
    _require_files(path, kind or expected)
    file = path / CONFIG_FILE
    try:
        description = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy or save the directory again") from error
    if not isinstance(description, dict) or "format" not in description:
        raise ValueError(
            f"{file} does not describe a model: expected a JSON object with {', '.join(sorted(_CONFIG_KEYS))}"
        )
    if description["format"] != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {description['format']!r}, but this version reads {FORMAT_VERSION}: "
            "update the program, or save the model again with this one"
        )
    if description.keys() != _CONFIG_KEYS:
        raise ValueError(f"{file} {_difference(description.keys(), _CONFIG_KEYS)}")
    if not isinstance(description["config"], dict) or not isinstance(description["metadata"], dict):
        raise ValueError(f"{file}: config and metadata must be JSON objects")
    if kind is not None and description["kind"] != kind:
        raise ValueError(f"{path} holds a {description['kind']}, not a {kind}: give the directory of a {kind}")
    return description


HOW_TO_MAKE = {
    "dvae": "`dalle-train dvae`, or `dalle import-dvae` or `dalle import-vqgan` for published weights",
    "dalle": "`dalle-train transformer`",
    "prior": "`dalle-train prior`, or `dalle import-unclip` for published weights",
    "prior-autoregressive": "`dalle-train prior --prior-kind autoregressive`",
    "decoder": "`dalle-train decoder`, or `dalle import-unclip` for published weights",
    "upsampler": "`dalle-train upsampler`, or `dalle import-unclip` for published weights",
    "components": "`UnCLIP.principal_components`, of pictures like those of its training",
    "clip": "`dalle-train clip`, or `dalle import-clip` for published weights",
}
"""The commands that make a model, by its kind."""


def _require_files(path: Path, kind: str) -> None:
    expected = f"expected {CONFIG_FILE} and {WEIGHTS_FILE}"
    how = f"train one with {HOW_TO_MAKE.get(kind, '`dalle-train`')}, or copy one there"
    if not path.is_dir():
        found = f"{path} is a file, not a directory" if path.exists() else "there is no such directory"
        if _aside(path).is_dir():
            how = f"an interrupted save left the previous one in {_aside(path)}: rename it to {path.name}"
        raise FileNotFoundError(f"no {kind} in {path}: {expected}, but {found}; {how}")
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no {kind} in {path}: {expected}, but {' and '.join(missing)} is missing; {how}")


def _config(file: Path, values: dict[str, Any], config_type: type[Config]) -> Config:
    fields = dataclasses.fields(config_type)  # type: ignore[arg-type]
    known = {field.name for field in fields}
    added = {field.name for field in fields if field.metadata == ADDED_LATER}
    if values.keys() | added != known:
        raise ValueError(f"the config of {file} {_difference(values.keys() | added, known)}")
    try:
        for field in fields:
            if field.name in values:
                _check_numbers(field.name, values[field.name], field.type)
        return config_type(**{name: _tuples(value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config of {file} is not valid: {error}") from error


def _check_numbers(name: str, value: Any, expected: Any) -> None:
    """Raise TypeError or ValueError if a value, or one in a list, is no number where its type asks for one."""
    inner = get_args(expected)
    if get_origin(expected) is tuple and isinstance(value, list):
        for item in value:
            _check_numbers(name, item, inner[0])
    elif expected is int or (int in inner and value is not None):
        check_whole(name, value)
        if abs(value) > MAX_SIZE:
            raise ValueError(f"{name} is above {MAX_SIZE:,}")
    elif expected is float:
        check_number(name, value)


def _tuples(value: Any) -> Any:
    """JSON has no tuples; frozen configurations have no lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _difference(found: Any, expected: set[str]) -> str:
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
    parts = ([f"lacks {', '.join(missing)}"] if missing else []) + (
        [f"has unknown {', '.join(unknown)}"] if unknown else []
    )
    return " and ".join(parts) + "; it was written by another version: save the model again with this one"
