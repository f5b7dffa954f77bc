import builtins
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dvae import DVAE, DVAEConfig
from dvae.images import map_pixels
from dvae.openai import import_openai

SMALL = DVAEConfig(n_hid=8, n_init=4, n_groups=2, n_blocks=2, vocab_size=16)


def small() -> DVAE:
    return DVAE(SMALL, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def package() -> Iterator[types.SimpleNamespace]:
    """Classes that pickle under OpenAI's names; the modules are importable only while the test saves with them."""
    classes = {}
    for module, name in [("encoder", "Encoder"), ("decoder", "Decoder"), ("utils", "Conv2d")]:
        classes[name] = type(name, (nn.Module,), {"__module__": f"dall_e.{module}"})
        sys.modules[f"dall_e.{module}"] = types.ModuleType(f"dall_e.{module}")
        setattr(sys.modules[f"dall_e.{module}"], name, classes[name])
    sys.modules["dall_e"] = types.ModuleType("dall_e")

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
            del sys.modules[name]

    yield types.SimpleNamespace(**classes, forget=forget)
    forget()


def as_published(module: nn.Module, package: types.SimpleNamespace, kind: str) -> nn.Module:
    """The weights of one of our modules in a module of OpenAI's names."""
    root = getattr(package, kind)()
    for name, weight in module.named_parameters():
        *path, leaf = name.split(".")
        here = root
        for i, part in enumerate(path):
            if part not in here._modules:
                here.add_module(part, package.Conv2d() if i == len(path) - 1 else nn.Sequential())
            here = here._modules[part]
        here.register_parameter({"weight": "w", "bias": "b"}[leaf], nn.Parameter(weight.detach().clone()))
    return root


def publish(dvae: DVAE, package: types.SimpleNamespace, folder: Path, *, is_zip: bool = True) -> tuple[Path, Path]:
    paths = folder / "encoder.pkl", folder / "decoder.pkl"
    for path, module, kind in zip(paths, (dvae.encoder, dvae.decoder), ("Encoder", "Decoder"), strict=True):
        torch.save(as_published(module, package, kind), path, _use_new_zipfile_serialization=is_zip)
    package.forget()
    return paths


def with_pickle(path: Path, data: bytes) -> None:
    """Replace the object in a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_zip", [True, False])
def test_both_formats_of_torch_save_give_back_every_weight(
    package: types.SimpleNamespace, tmp_path: Path, is_zip: bool
) -> None:
    original = small()
    imported = import_openai(*publish(original, package, tmp_path, is_zip=is_zip))
    assert imported.config == SMALL
    assert "dall_e" not in sys.modules
    assert not imported.training
    for (name, weight), (other, found) in zip(original.named_parameters(), imported.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, found)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(imported.encode(images), original.encode(images))
    imported.save(tmp_path / "dvae")
    assert torch.equal(DVAE.load(tmp_path / "dvae").encode(images), original.encode(images))


def test_the_published_package_computes_the_same(tmp_path: Path) -> None:
    dall_e = pytest.importorskip("dall_e")
    torch.manual_seed(0)
    encoder = dall_e.encoder.Encoder(n_hid=32, vocab_size=64)
    decoder = dall_e.decoder.Decoder(n_hid=32, n_init=16, vocab_size=64)
    torch.save(encoder, tmp_path / "encoder.pkl")
    torch.save(decoder, tmp_path / "decoder.pkl")
    dvae = import_openai(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        tokens = logits.argmax(dim=1)
        stats = decoder(nn.functional.one_hot(tokens, 64).permute(0, 3, 1, 2).float())
        assert torch.allclose(dvae.encoder(map_pixels(images)), logits, atol=1e-4)
        assert torch.equal(dvae.encode(images), tokens)
        assert torch.allclose(dvae.decoder.from_tokens(tokens), stats, atol=1e-4)
        expected = dall_e.unmap_pixels(stats[:, :3].sigmoid())
        assert torch.allclose(dvae.decode(tokens), expected, atol=1e-4)


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
def test_a_pickle_that_names_code_is_refused_and_runs_nothing(
    package: types.SimpleNamespace, tmp_path: Path, name: str
) -> None:
    encoder, decoder = publish(small(), package, tmp_path)
    marker = tmp_path / "marker"
    data, refused = attacks(marker)[name]
    with_pickle(encoder, data)
    with pytest.raises(
        ValueError, match=rf"encoder\.pkl would run code: .*({refused}); refused; expected OpenAI's encoder"
    ):
        import_openai(encoder, decoder)
    legacy = tmp_path / "legacy.pkl"
    legacy.write_bytes(data)
    with pytest.raises(ValueError, match=r"legacy\.pkl would run code"):
        import_openai(legacy, decoder)
    assert not marker.exists()


TRICKS = {
    # a stand-in takes whatever it is called with, and does nothing with it
    "call a stand-in": b"cdall_e.encoder\nEncoder\n(S'touch'\ntR.",
    "call the result": b"cdall_e.encoder\nEncoder\n(tR(S'touch'\ntR.",
    "state of a class": b"cdall_e.encoder\nEncoder\n(N}S'origin'\nS'os.system'\nstb.",
    "class of an instance": b"cdall_e.encoder\nEncoder\n)\x81(N}S'__class__'\ncfunctools\npartial\nstb.",
    "append to a stand-in": b"cdall_e.encoder\nEncoder\n)\x81S'x'\na.",
    "unknown kind of reference": b"(S'file'\nS'/etc/passwd'\ntQ.",
    "module in itself": b"cdall_e.encoder\nEncoder\n)\x81p0\n(dS'_parameters'\n(dsS'_modules'\n(dS'a'\ng0\nssb.",
    "parts that are no modules": b"cdall_e.encoder\nEncoder\n)\x81(dS'_parameters'\n(dsS'_modules'\n(dS'a'\nI1\nssb.",
    "parameters that are no tensors": (
        b"cdall_e.encoder\nEncoder\n)\x81(dS'_parameters'\n(dS'w'\nI1\nssS'_modules'\n(dsb."
    ),
    "no state": b"cdall_e.encoder\nEncoder\n)\x81.",
    "a number": b"I1\n.",
    "nothing": b".",
    "half": b"cdall_e.encoder\nEnc",
    "protocol 200": b"\x80\xc8.",
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_pickle_of_another_shape_is_refused(package: types.SimpleNamespace, tmp_path: Path, name: str) -> None:
    encoder, decoder = publish(small(), package, tmp_path)
    with_pickle(encoder, TRICKS[name])
    with pytest.raises(
        ValueError, match=r"encoder\.pkl cannot be read \(.*; expected OpenAI's encoder\.pkl, from http"
    ):
        import_openai(encoder, decoder)


def tensor_file(folder: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], package: object) -> Path:
    """An encoder with one parameter that refers to 4 elements in its own way."""

    class Reference:
        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(thing, Storage) else None

    module = package.Encoder()
    module.__dict__["_parameters"] = {"w": Calls(torch._utils._rebuild_parameter, Reference(), True, OrderedDict())}
    file = io.BytesIO()
    Pickler(file, 2).dump(module)
    path = folder / "tensor.pkl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", file.getvalue())
        archive.writestr("a/data/0", bytes(16))
    return path


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (4,), (1,)),
        (0, (10**12,), (0,)),
        (-1, (1,), (1,)),
        (0, (2, 2), (1, 2)),
        (0, (-4,), (1,)),
        (0, (2, 3), (3, 1)),
    ],
)
def test_a_tensor_outside_of_its_data_is_refused(
    package: types.SimpleNamespace, tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    path = tensor_file(tmp_path, offset, shape, strides, package)
    with pytest.raises(ValueError, match=r"w (of shape .* does not fit its data|has an impossible shape)"):
        import_openai(path, path)
    with pytest.raises(ValueError, match=r"lack the weight 'blocks.input.weight'|expected OpenAI's decoder"):
        import_openai(tensor_file(tmp_path, 0, (2, 2), (2, 1), package), path)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_short_is_refused(package: types.SimpleNamespace, tmp_path: Path, is_zip: bool) -> None:
    encoder, decoder = publish(small(), package, tmp_path, is_zip=is_zip)
    whole = encoder.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        encoder.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"encoder\.pkl cannot be read"):
            import_openai(encoder, decoder)


def test_compressed_data_is_refused(package: types.SimpleNamespace, tmp_path: Path) -> None:
    encoder, decoder = publish(small(), package, tmp_path)
    with zipfile.ZipFile(encoder) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(encoder, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="storage"):
        import_openai(encoder, decoder)


def test_swapped_and_missing_files_are_named(package: types.SimpleNamespace, tmp_path: Path) -> None:
    encoder, decoder = publish(small(), package, tmp_path)
    with pytest.raises(ValueError, match=r"it holds dall_e.decoder.Decoder instead of dall_e.encoder.Encoder"):
        import_openai(decoder, encoder)
    with pytest.raises(FileNotFoundError, match=r"no file .*none.pkl: expected OpenAI's decoder.pkl, from https://"):
        import_openai(encoder, tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="is a folder"):
        import_openai(tmp_path, decoder)


def test_an_encoder_and_a_decoder_of_different_sizes_do_not_fit(package: types.SimpleNamespace, tmp_path: Path) -> None:
    mixed = small()
    mixed.decoder = DVAE(DVAEConfig(n_hid=16, n_init=4, n_groups=2, vocab_size=16)).decoder
    with pytest.raises(ValueError, match=r"decoder\.pkl do not fit its configuration: .* has the shape"):
        import_openai(*publish(mixed, package, tmp_path))
