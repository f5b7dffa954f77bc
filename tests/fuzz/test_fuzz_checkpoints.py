"""Models and checkpoints of strangers: pickles of torch.save, safetensors, directories of models."""

import hashlib
import io
import json
import pickle
import pickletools
import shutil
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Door, fuzz, require_kept
from hypothesis import given
from hypothesis import strategies as st
from odd import ODD_JSON, ODD_TEXTS, changed, damaged
from torch import nn

from dalle.cli.features import feature_file, folder_features
from dalle.model import DALLE
from dvae import DVAE, DVAEConfig
from dvae.openai import import_openai
from rerank import CLIP
from storage.checkpoints.pickles import READING_ERRORS, Allowed
from storage.checkpoints.torch_files import TENSOR_NAMES, read_torch_file

SMALL = DVAEConfig(n_hid=4, n_init=2, n_groups=1, n_blocks=1, vocab_size=2, image_size=8)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """OpenAI's files of a tiny dVAE: both halves, in both formats of torch.save."""
    dvae = DVAE(SMALL, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("published")
    classes: dict[str, Any] = {}
    for module, name in (("encoder", "Encoder"), ("decoder", "Decoder"), ("utils", "Conv2d")):
        classes[name] = type(name, (nn.Module,), {"__module__": f"dall_e.{module}"})
        sys.modules[f"dall_e.{module}"] = types.ModuleType(f"dall_e.{module}")
        setattr(sys.modules[f"dall_e.{module}"], name, classes[name])
    sys.modules["dall_e"] = types.ModuleType("dall_e")
    found = {}
    for half, name in ((dvae.encoder, "Encoder"), (dvae.decoder, "Decoder")):
        root = classes[name]()
        for parameter, weight in half.named_parameters():
            *path, leaf = parameter.split(".")
            here = root
            for i, part in enumerate(path):
                if part not in here._modules:
                    here.add_module(part, classes["Conv2d"]() if i == len(path) - 1 else nn.Sequential())
                here = here._modules[part]
            here.register_parameter({"weight": "w", "bias": "b"}[leaf], nn.Parameter(weight.detach().clone()))
        for is_zip in (True, False):
            torch.save(root, folder / "x", _use_new_zipfile_serialization=is_zip)
            found[f"{name} {'zip' if is_zip else 'legacy'}"] = (folder / "x").read_bytes()
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        del sys.modules[name]
    return found


@st.composite
def zips(draw: st.DrawFn, whole: bytes) -> bytes:
    """A zip with damaged, renamed, doubled, compressed or missing entries, all checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(file, "w") as new:
        entries = archive.infolist()
        for number in range(draw(st.integers(1, len(entries) + 2))):
            entry = entries[number % len(entries)]
            content = archive.read(entry)
            name = draw(st.sampled_from((*(entry.filename,) * 9, "x/data.pkl", *ODD_TEXTS[:12])))
            how = draw(
                st.sampled_from((*(zipfile.ZIP_STORED,) * 5, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            )
            new.writestr(name.encode("utf-8", "replace").decode() or "_", draw(damaged(content, 2)), how)
    return draw(damaged(file.getvalue(), 1))


def import_dvae(folder: Path, encoder: bytes, decoder: bytes) -> int:
    (folder / "encoder.pkl").write_bytes(encoder)
    (folder / "decoder.pkl").write_bytes(decoder)
    dvae = import_openai(folder / "encoder.pkl", folder / "decoder.pkl")
    assert dvae.encode(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 8)
    return 0


@fuzz(1600)
@given(data=st.data(), form=st.sampled_from(("zip", "zip", "legacy")))
def test_pickles_of_torch(
    data: st.DataObject, form: str, published: dict[str, bytes], tmp_path: Path, door: Door
) -> None:
    encoder, decoder = published[f"Encoder {form}"], published[f"Decoder {form}"]
    encoder = data.draw(st.one_of(damaged(encoder, 4), *([zips(encoder)] if form == "zip" else [])))
    door.knock(lambda: import_dvae(tmp_path, encoder, decoder), names="coder.pkl")


def value_of(code: pickletools.OpcodeInfo, draw: st.DrawFn) -> bytes:
    """Bytes of an argument of an instruction."""
    if code.arg is None:
        return b""
    if code.arg.n >= 0:
        return draw(
            st.one_of(st.binary(min_size=code.arg.n, max_size=code.arg.n), st.just(b"\x01" + bytes(code.arg.n)))
        )[: code.arg.n]
    text = draw(
        st.sampled_from((b"x", b"0", b"12", b"collections", b"OrderedDict", b"torch", b"FloatStorage", b"'a'", b"1.5"))
    )
    kind = code.arg.n
    if kind == pickletools.UP_TO_NEWLINE:
        return text + b"\n" + (text + b"\n") * (code.arg.name == "stringnl_noescape_pair")
    width = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    }.get(kind, 8)
    n = draw(st.sampled_from((len(text), len(text), 2**31 - 1, 2 ** (8 * width) - 1)))
    return (n % (1 << 8 * width)).to_bytes(width, "little") + text


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """Pickles of any instructions."""
    codes = draw(st.lists(st.sampled_from(pickletools.opcodes), max_size=25))
    names = b"ccollections\nOrderedDict\n" * draw(st.booleans())
    return names + b"".join(code.code.encode("latin-1") + value_of(code, draw) for code in codes) + b"."


def bombs() -> dict[str, bytes]:
    """Small pickles that ask for much."""
    nested = b"(" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    return {
        "a number of a part": b"Nr\xff\xff\xff\x7f.",
        "a tuple of itself 2^60 times, as a key": b"})q\x00"
        + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60))
        + b"h\x3cNs.",
        "the same unhashed": b")q\x00" + nested[1:] + b".",
        "bytes": b"\x8e" + b"\xff" * 7 + b"\x7f.",
        "a byte array": b"\x96" + b"\0\0\0\0\x10\0\0\0.",
        "a frame": b"\x95" + b"\xff" * 7 + b"\x7f.",
        "a long number": b"\x8b\xff\xff\xff\x7f.",
        "lists in lists": b"]" * 200_000 + b"a" * 199_999 + b".",
        "marks": b"(" * 1_000_000 + b".",
    }


@fuzz(1600)
@given(
    program=st.one_of(programs(), st.sampled_from(sorted(bombs().items())).map(lambda one: one[1])),
    form=st.sampled_from(("zip", "legacy")),
)
def test_pickles_of_any_instructions(
    program: bytes, form: str, published: dict[str, bytes], tmp_path: Path, door: Door
) -> None:
    decoder = published[f"Decoder {form}"]
    if form == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a/data.pkl", program)
            archive.writestr("a/data/0", bytes(16))
        data = file.getvalue()
    else:
        magic = (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
        )
        data = magic + program + b"]."
    door.knock(lambda: import_dvae(tmp_path, data, decoder), names="encoder.pkl")


NUMBERS = st.sampled_from((0, 1, 2, 4, -1, 2**31, 2**63, 2**70, True, 1.5, None, "a", (1,)))


@fuzz(600)
@given(
    key=st.sampled_from(("0", "1", 0, None, ("0",))),
    offset=NUMBERS,
    shape=st.lists(NUMBERS, max_size=3),
    strides=st.lists(NUMBERS, max_size=3),
)
def test_tensors_of_any_shape(
    key: Any, offset: Any, shape: list[Any], strides: list[Any], tmp_path: Path, door: Door
) -> None:
    class Reference:
        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, tuple(shape), tuple(strides), False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", 4) if isinstance(thing, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(Reference())
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", file.getvalue())
        archive.writestr("a/data/0", bytes(16))

    def check() -> int:
        try:
            found = read_torch_file(tmp_path / "x.pt", Allowed(names=TENSOR_NAMES))
            tensor = found.tensor(found.content, "w")
        except READING_ERRORS as error:
            raise ValueError(f"x.pt: {error!r}") from None
        require_kept(tensor.numel() <= 4, tensor.shape)
        return 0

    door.knock(check, names="x.pt")


# ------------------------------------------------------------------------------------------------ safetensors


def header_and_data(whole: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + n]), whole[8 + n :]


@st.composite
def safetensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """Safetensors with a changed header, or damaged bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(whole))
    header, data = header_and_data(whole)
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(header)))
        if isinstance(header[name], dict) and "dtype" in header[name]:
            header[name]["dtype"] = draw(
                st.sampled_from(("I32", "U32", "F32", "BOOL", "F8_E4M3", "C64", "F4", "X", "I64", "F16"))
            )
    else:
        header = draw(changed(header))
    text = json.dumps(header).encode()
    return struct.pack("<Q", draw(st.sampled_from((*(len(text),) * 9, 0, 2**62)))) + text + data


def with_right_digest(folder: Path, weights: bytes) -> None:
    (folder / "model.safetensors").write_bytes(weights)
    description = json.loads((folder / "config.json").read_text())
    description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "config.json").write_text(json.dumps(description))


LOADERS: dict[str, Callable[[Path], object]] = {"dvae": DVAE.load, "dalle": DALLE.load, "clip": CLIP.load}


@pytest.fixture(scope="module")
def models(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose models may be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return Path(shutil.copytree(bundle, folder))


@fuzz(600)
@given(data=st.data(), part=st.sampled_from(sorted(LOADERS)))
def test_weights_in_safetensors(data: st.DataObject, part: str, bundle: Path, models: Path, door: Door) -> None:
    whole = (bundle / part / "model.safetensors").read_bytes()
    with_right_digest(models / part, data.draw(safetensors(whole)))

    def check() -> int:
        LOADERS[part](models / part)
        return 0

    door.knock(check, names=str(models / part))


@fuzz(100)
@given(data=st.data())
def test_kept_features_of_search(data: st.DataObject, pipe: Any, tmp_path: Path, door: Door) -> None:
    """Features that cannot be used are computed again."""
    from PIL import Image

    folder = tmp_path / "pictures"
    if not folder.exists():
        folder.mkdir()
        for number in range(2):
            Image.new("RGB", (16, 16), (99 * number, 9, 9)).save(folder / f"{number}.png")
    path = feature_file(folder, "0")
    path.unlink(missing_ok=True)
    right = folder_features(pipe.clip, "0", folder)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        header, tensors = header_and_data(whole)
        pictures = json.loads(header["__metadata__"]["pictures"])
        odd = data.draw(st.one_of(changed(pictures), st.sampled_from(ODD_JSON)))
        header["__metadata__"]["pictures"] = json.dumps(odd)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    else:
        path.write_bytes(data.draw(safetensors(whole)))

    def check() -> int:
        found = folder_features(pipe.clip, "0", folder)
        require_kept(found.files == right.files, found.files)
        assert found.features.shape == right.features.shape
        return 0

    door.knock(check, names=folder.name)
