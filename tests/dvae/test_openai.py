import pickle
import sys
import types
import zipfile
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


def test_a_file_that_names_code_is_refused(package: types.SimpleNamespace, tmp_path: Path) -> None:
    encoder, decoder = publish(small(), package, tmp_path)
    with_pickle(encoder, pickle.dumps(print, 2))
    with pytest.raises(ValueError, match=r"encoder\.pkl would run code: .*print; refused; expected OpenAI's encoder"):
        import_openai(encoder, decoder)


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


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_short_is_refused(package: types.SimpleNamespace, tmp_path: Path, is_zip: bool) -> None:
    encoder, decoder = publish(small(), package, tmp_path, is_zip=is_zip)
    whole = encoder.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        encoder.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"encoder\.pkl cannot be read"):
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
