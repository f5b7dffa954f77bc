import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from storage.checkpoints.tensors import Tensors, open_tensors, summary

FORMATS = ("torch.save", "torch.save (legacy)", "safetensors", "TorchScript", "flax msgpack")


@pytest.fixture(autouse=True)
def linear_layers_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what DeepSpeed has replaced in a process that trained at ZeRO stage 3: it cannot be traced."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


class Small(nn.Module):
    """A module with parameters, buffers and a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer("count", torch.tensor(7))
        self.inner = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.weight.sum()


def flax_bytes(content: Any) -> bytes:
    """What flax.serialization.to_bytes writes of arrays in maps."""

    def array(value: Any) -> msgpack.ExtType:
        flat = (value.shape, value.dtype.name, value.tobytes())
        return msgpack.ExtType(1, msgpack.packb(flat, use_bin_type=True))

    packed: bytes = msgpack.packb(content, default=array, strict_types=True)
    return packed


def write(path: Path, kind: str, module: nn.Module) -> Path:
    state = module.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(module.eval(), torch.ones(1, 3)).save(str(path))
    elif kind == "flax msgpack":
        nested: dict[str, Any] = {}
        for name, value in state.items():
            *parents, leaf = name.split(".")
            here = nested
            for parent in parents:
                here = here.setdefault(parent, {})
            here[leaf] = value.numpy()
        path.write_bytes(flax_bytes(nested))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_back_every_tensor(tmp_path: Path, kind: str) -> None:
    module = Small()
    tensors = open_tensors(write(tmp_path / "x", kind, module))
    state = module.state_dict()
    assert tensors.format == kind
    assert set(tensors) == set(state)
    assert tensors.shape("inner.weight") == (2, 3)
    assert tensors.dtype("count") == torch.int64
    for name, value in state.items():
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tensor_is_read_when_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x", kind, Small())
    tensors = open_tensors(path)
    six = np.arange(6, dtype="float32")
    # had it been read before, it would be the old one
    path.write_bytes(path.read_bytes().replace(six.tobytes(), (six + 1).tobytes()))
    if kind in ("torch.save", "TorchScript"):
        with pytest.raises(ValueError, match="damaged: they do not have their checksum"):
            tensors["weight"]
    else:
        assert tensors["weight"].flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_what_nobody_read_is_reported(tmp_path: Path) -> None:
    state = {"state_dict": {"a": torch.ones(1), "b": torch.ones(2)}, "optimizer": [torch.ones(1)] * 2, "epoch": 3}
    torch.save(state | {"name": "run", "rates": [0.5], "none": None}, tmp_path / "x.pt")
    tensors = open_tensors(tmp_path / "x.pt")
    assert torch.equal(tensors.under("state_dict.")["b"], torch.ones(2))
    assert tensors.unused() == ["state_dict.a", "optimizer.0", "optimizer.1"]
    assert tensors.under("state_dict.").unused() == ["a"]
    assert summary([*tensors.unused(), "step"]) == "state_dict (1), optimizer (2), step"
    assert tensors.plain == {"epoch": 3, "name": "run", "rates.0": 0.5}
    with pytest.raises(KeyError):
        tensors["c"]


def test_views_shared_and_empty_storages_of_every_type_are_read(tmp_path: Path) -> None:
    stacked = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "layers": [
            layer.T for layer in stacked
        ],  # transposed views of one storage, as min-dalle's converter saves them
        "empty": torch.empty(0, 4),
        "half": torch.tensor([0.5]).half(),
        "brain": torch.tensor([1.5]).bfloat16(),
        "mask": torch.tensor([True, False]),
        "double": torch.tensor([2.0]).double(),
        **{f"{kind}".removeprefix("torch."): torch.tensor([3]).to(kind) for kind in (torch.int8, torch.int16)},
    }
    for is_zip in (True, False):
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
        tensors = open_tensors(tmp_path / "x.pt")
        for i, layer in enumerate(stacked):
            found = tensors[f"layers.{i}"]
            assert torch.equal(found, layer.T)
            assert found.is_contiguous()
            assert found.untyped_storage().nbytes() == 48  # its own part of the shared storage, and no more
        assert tensors["empty"].shape == (0, 4)
        assert tensors["mask"].tolist() == [True, False]
        assert {tensors[name].dtype for name in ("half", "brain", "double")} == {torch.float32}
        assert [tensors[name].item() for name in ("half", "brain", "double", "int8", "int16")] == [0.5, 1.5, 2, 3, 3]


def test_a_lightning_checkpoint_with_a_class_as_a_key_is_read(tmp_path: Path) -> None:
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].ModelCheckpoint = kind  # type: ignore[attr-defined]
    try:
        torch.save(
            {"state_dict": {"a": torch.ones(2)}, "callbacks": {kind: {"best": torch.ones(1)}}}, tmp_path / "last.ckpt"
        )
    finally:
        for name in names:
            del sys.modules[name]
    tensors = open_tensors(tmp_path / "last.ckpt")
    assert list(tensors) == ["state_dict.a", "callbacks.ModelCheckpoint.best"]
    assert names[0] not in sys.modules


def test_flax_arrays_in_pieces_scalars_and_other_types_are_read(tmp_path: Path) -> None:
    half = msgpack.ExtType(1, msgpack.packb(((2,), "bfloat16", struct.pack("<2H", 0x3FC0, 0x4000))))
    pieces = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}}
    pieces["chunks"] = {"0": np.arange(4.0, dtype="float32"), "1": np.arange(4.0, 6.0, dtype="float32")}
    scalar = msgpack.ExtType(3, msgpack.packb(((), "float64", struct.pack("<d", 2.5))))
    content = {"params": {"half": half, "large": pieces, "scalar": scalar, "ids": np.arange(70_000)}, "step": 3}
    (tmp_path / "x.msgpack").write_bytes(flax_bytes(content | {"loss": 0.5, "name": "long " * 20, "negative": -3}))
    tensors = open_tensors(tmp_path / "x.msgpack")
    assert tensors["params.half"].tolist() == [1.5, 2.0]
    assert torch.equal(tensors["params.large"], torch.arange(6.0).reshape(2, 3))
    assert tensors["params.scalar"].item() == 2.5
    assert tensors["params.ids"].sum().item() == 70_000 * 69_999 // 2
    assert tensors.plain == {"step": 3, "loss": 0.5, "name": "long " * 20, "negative": -3}


WRONG = {
    "empty": (b"", r"is empty \(0 bytes\): download it again"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605247071\n",
        "is a Git LFS pointer, a text in place of the file of 605,247,071 bytes: get the file itself",
    ),
    "page": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not a checkpoint"),
    "denied": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page, not a checkpoint"),
    "json": (b'{"error": "Repository not found"}', "is a JSON text: expected a checkpoint"),
    "gzip": (b"\x1f\x8b\x08\0abc", "is compressed with gzip: unpack it first"),
    "keras": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "text": (b"hello\n", "cannot be read: .*; expected a checkpoint; download it again"),
    "number": (pickle.dumps(3, 2), "torch.save did not write it"),
    "msgpack of a false length": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "announces 4,294,967,295 more, but has 0"),
    "msgpack of a false count": (b"\xdf\xff\xff\xff\xff\xa1a", "announces 8,589,934,590 more, but has 2"),
    "msgpack of a false shape": (
        flax_bytes({"a": msgpack.ExtType(1, msgpack.packb(([10**9], "float32", b"1234")))}),
        r"an array of shape \(1000000000,\) and type float32 has 4 bytes",
    ),
    "msgpack of objects": (
        flax_bytes({"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}),
        "an array is of type 'object'; expected float16",
    ),
    "msgpack of Python's own": (flax_bytes({"a": msgpack.ExtType(9, b"x")}), "an extension of type 9"),
    "msgpack in itself": (b"\x81\xa1a" * 99 + b"\x01", "nests too deeply"),
    "msgpack with more behind": (b"\x81\xa1a\x01\x01", "1 bytes follow its end"),
    "safetensors of a false length": (struct.pack("<Q", 2**40) + b"{}", "cannot be read: .*"),
    "safetensors of a false place": (
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64),
        "cannot be read: .*",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    data, message = WRONG[name]
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_tensors(tmp_path / "x.pt")


def test_a_missing_file_a_folder_and_another_zip_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pt: expected a checkpoint"):
        open_tensors(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is a folder: expected a file"):
        open_tensors(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("weight.npy", b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"torch\.save did not write it: it is a zip file that holds weight\.npy"):
        open_tensors(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_refused_or_its_tensors_are(tmp_path: Path, kind: str) -> None:
    whole = write(tmp_path / "x", kind, Small()).read_bytes()
    for length in (1, 7, 40, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot be read|is cut off|is a JSON|is a web page"):
            open_tensors(tmp_path / "x")
    if kind in ("torch.save", "TorchScript"):
        (tmp_path / "x").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"is cut off: a zip file of .* bytes without its end; download it again"):
            open_tensors(tmp_path / "x")


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.args


@pytest.mark.parametrize("kind", ["torch.save", "torch.save (legacy)", "TorchScript"])
def test_a_file_that_names_code_is_refused_and_none_of_it_runs(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    attack = {"weight": torch.ones(2), "z": Calls(os.system, f"touch {marker}")}
    torch.save(attack, path, _use_new_zipfile_serialization=kind != "torch.save (legacy)")
    if kind == "TorchScript":
        with zipfile.ZipFile(path) as archive:
            data = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (data | {"constants.pkl": b")."}).items():
                archive.writestr(f"x/{name}", content)
    with pytest.raises(ValueError, match=r"x\.pt would run code: it names (posix|nt)\.system, .*nothing was run"):
        open_tensors(path)
    assert not marker.exists()


def test_the_code_in_a_script_archive_is_never_read(tmp_path: Path) -> None:
    path, marker = write(tmp_path / "x.pt", "TorchScript", Small()), tmp_path / "marker"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            is_code = "/code/" in name
            archive.writestr(name, f"import os\nos.system('touch {marker}')\n" if is_code else content)
        archive.writestr("../../outside", b"x")
    assert len(open_tensors(path)) == 4
    assert not marker.exists()
    assert not (tmp_path.parent.parent / "outside").exists()


@pytest.mark.slow
def test_containers_that_repeat_or_hold_themselves_end(tmp_path: Path) -> None:
    inner: list[Any] = [1] * 10
    for _ in range(9):
        inner = [inner] * 10  # ten thousand million values in some bytes
    itself: dict[str, Any] = {}
    itself["again"] = itself
    for content in (inner, itself):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"nests too deeply, or holds too many values|more than 10,000,000 parts"):
            open_tensors(tmp_path / "x.pt")


def test_two_parts_of_one_name_and_shifted_parts_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / "x.pt")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("x/data/0", bytes(256))
    with pytest.raises(ValueError, match="two of its parts have the same name"):
        open_tensors(tmp_path / "x.pt")
    torch.save({"a": torch.ones(64)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    while b"/data/0" not in data[entry : entry + 80]:
        entry = data.index(b"PK\x01\x02", entry + 1)
    data[entry + 42 : entry + 46] = struct.pack("<I", 5)
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match="is not where its directory says"):
        open_tensors(tmp_path / "x.pt")


def test_reading_holds_one_tensor_at_a_time(
    tmp_path: Path, rise_of_memory: Callable[[Callable[[], object]], int]
) -> None:
    # malloc keeps what it was given back of blocks below 32 MiB
    torch.save({f"w{i}": torch.ones(10 << 20) for i in range(6)}, tmp_path / "x.pt")
    tensors = open_tensors(tmp_path / "x.pt")
    # one has 40 MiB, all have 240
    assert rise_of_memory(lambda: [tensors[name].mean() for name in tensors]) < 120 << 20


def test_want_of_memory_is_no_fault_of_the_file(tmp_path: Path) -> None:
    class Large:
        shape, dtype = (1 << 40,), torch.float32
        words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes"

        def read(self) -> torch.Tensor:
            raise RuntimeError(self.words)

    tensors = Tensors(tmp_path / "x.pt", "torch.save", {"a": Large()})
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        tensors["a"]
    Large.words = "it is damaged"
    with pytest.raises(ValueError, match=r"x\.pt, a: it is damaged; download it again"):
        tensors["a"]


def test_tensors_are_a_mapping_without_values_held(tmp_path: Path) -> None:
    tensors = open_tensors(write(tmp_path / "x", "safetensors", Small()))
    assert isinstance(tensors, Tensors)
    first, second = tensors["weight"], tensors["weight"]
    assert first.data_ptr() != second.data_ptr()
    (tmp_path / "x").unlink()  # nothing of the file is still mapped
    assert torch.equal(first, second)
