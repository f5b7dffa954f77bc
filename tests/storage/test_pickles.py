import builtins
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from storage.checkpoints.pickles import MAX_PICKLE_BYTES, READING_ERRORS, Allowed, Inert, RefusedNameError
from storage.checkpoints.torch_files import TENSOR_NAMES, read_torch_file

ALLOWED = Allowed(names=TENSOR_NAMES, packages=("dall_e", "torch.nn.modules"))


def save(path: Path, data: bytes, *, is_zip: bool = True, method: int = zipfile.ZIP_STORED) -> Path:
    """Make a file as torch.save makes them, with a pickle of any kind and one storage of 4 elements."""
    if not is_zip:
        path.write_bytes(data)
        return path
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/data/0", bytes(16))
    return path


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_come_back_and_classes_are_records(tmp_path: Path, is_zip: bool) -> None:
    weights = OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.nn.Parameter(torch.ones(4, dtype=torch.float16)))
    torch.save({"state": weights, "step": 3}, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    file = read_torch_file(tmp_path / "x.pt", ALLOWED)
    state = file.content["state"]
    assert file.content["step"] == 3
    assert isinstance(state, Inert)
    assert state.origin == "collections.OrderedDict"
    assert torch.equal(file.tensor(state.items["a"], "a"), weights["a"])
    assert torch.equal(file.tensor(state.items["b"], "b"), torch.ones(4))
    with pytest.raises(ValueError, match="step is not a tensor"):
        file.tensor(3, "step")


def test_a_name_is_allowed_by_itself_or_by_its_package() -> None:
    assert ALLOWED.has("dall_e.encoder", "Encoder")
    assert ALLOWED.has("collections", "OrderedDict")
    assert not ALLOWED.has("collections", "Counter")
    assert not ALLOWED.has("dall_evil", "run")
    assert not ALLOWED.has("dall_e", "sys.modules")


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.function, self.args


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `marker`, each with the name that must be refused."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    inner = io.BytesIO()
    torch.save(Calls(os.system, command), inner)
    standin = b"cdall_e.encoder\nEncoder\n"
    return {
        "reduce": (pickle.dumps(Calls(os.system, command), 2), r"(posix|nt)\.system"),
        "eval": (pickle.dumps(Calls(eval, code), 2), r"__builtin__\.eval"),
        "eval, protocol 4": (pickle.dumps(Calls(eval, code), 4), r"builtins\.eval"),
        "torch.load": (pickle.dumps(Calls(torch.load, io.BytesIO(inner.getvalue())), 2), r"\.load|_io\.BytesIO"),
        "getattr": (pickle.dumps(Calls(getattr, "x", "upper"), 2), r"__builtin__\.getattr"),
        "__import__": (pickle.dumps(Calls(builtins.__import__, "os"), 2), r"__builtin__\.__import__"),
        "torch.hub": (b"ctorch.hub\nload\n(S'a'\ntR.", r"torch\.hub\.load"),
        "torch.nn.functional": (b"ctorch.nn.functional\nhandle_torch_function\n.", r"handle_torch_function"),
        "dotted name": (b"\x80\x04\x8c\x0edall_e.encoder\x8c\x13os.path.os.system_x\x93.", r"os\.path\.os\.system_x"),
        "dotted name inside": (
            b"\x80\x04\x8c\x10torch.nn.modules\x8c\x0amodule.sys\x93.",
            r"torch\.nn\.modules\.module\.sys",
        ),
        "name of another package": (b"cdall_evil\nrun\n.", r"dall_evil\.run"),
        "os.system as INST": (b"(S'" + command.encode() + b"'\nios\nsystem\n.", r"os\.system"),
        "os.system as OBJ": (b"(cos\nsystem\nS'x'\no.", r"os\.system"),
        "state of a stand-in": (
            standin + b")\x81}(S'__class__'\ncos\nsystem\nsb.",
            r"os\.system",
        ),
        "persistent id": (b"((S'storage'\ncos\nsystem\nS'0'\nS'cpu'\nI4\ntQ.", r"os\.system"),
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    data, refused = attacks(marker)[name]
    for is_zip in (True, False):
        with pytest.raises(RefusedNameError, match=refused):
            read_torch_file(save(tmp_path / "x.pkl", data, is_zip=is_zip), ALLOWED)
    assert not marker.exists()


def tensor_file(folder: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Path:
    """A file with one parameter that refers to 4 elements in its own way."""

    class Reference:
        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(thing, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(Calls(torch._utils._rebuild_parameter, Reference(), True, OrderedDict()))
    return save(folder / "tensor.pkl", file.getvalue())


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (4,), (1,)),
        (0, (10**12,), (0,)),
        (-1, (1,), (1,)),
        (0, (2, 2), (1, 3)),
        (0, (8,), (0,)),
        (0, (2, 2), (1,)),
        (0, (0, 2**70), (1, 1)),
        (0, (-4,), (1,)),
        (0, (2, 3), (3, 1)),
    ],
)
def test_a_tensor_outside_of_its_data_is_refused(
    tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    file = read_torch_file(tensor_file(tmp_path, offset, shape, strides), ALLOWED)
    with pytest.raises(ValueError, match=r"w (of shape .* does not fit its data|has an impossible shape)"):
        file.tensor(file.content, "w")


@pytest.mark.parametrize("strides", [(2, 1), (1, 2), (0, 1)])
def test_a_tensor_inside_of_its_data_is_read(tmp_path: Path, strides: tuple[int, int]) -> None:
    file = read_torch_file(tensor_file(tmp_path, 0, (2, 2), strides), ALLOWED)
    assert torch.equal(file.tensor(file.content, "w"), torch.zeros(2, 2))


def test_compressed_data_is_refused(tmp_path: Path) -> None:
    data = zipfile.ZipFile(tensor_file(tmp_path, 0, (4,), (1,))).read("a/data.pkl")
    with pytest.raises(ValueError, match=r"a/data\.pkl is compressed"):
        read_torch_file(save(tmp_path / "x.pkl", data, method=zipfile.ZIP_DEFLATED), ALLOWED)


BOMBS = {
    "a number of a part": b"Nr\xff\xff\xff\x7f.",
    "bytes": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "a byte array": b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "a tuple of itself": b")q\0" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60)) + b"}h\x3cNs.",
    "more marks than objects": b"N1.",
}
"""Pickles of a few bytes that ask for gigabytes, or for a hash that never ends."""


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_asks_for_much_is_refused(tmp_path: Path, name: str) -> None:
    for is_zip in (True, False):
        with pytest.raises(READING_ERRORS):
            read_torch_file(save(tmp_path / "x.pkl", BOMBS[name], is_zip=is_zip), ALLOWED)


def test_a_zip_that_unpacks_to_much_or_is_encrypted_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", bytes(MAX_PICKLE_BYTES + 1), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its pickle has more than 67,108,864 bytes"):
        read_torch_file(path, ALLOWED)
    encrypted = bytearray(save(tmp_path / "x.pkl", b"N.").read_bytes())
    for place in (6, encrypted.index(b"PK\1\2") + 8):  # the flags of the pickle's entry
        encrypted[place] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(READING_ERRORS):
        read_torch_file(path, ALLOWED)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_short_is_refused(tmp_path: Path, is_zip: bool) -> None:
    torch.save({"a": torch.ones(8)}, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    whole = (tmp_path / "x.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(READING_ERRORS):
            read_torch_file(tmp_path / "x.pt", ALLOWED)
