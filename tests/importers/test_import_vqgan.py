import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from vqgan_files import (
    TINY,
    detoker,
    flax,
    lightning,
    plain_decode,
    plain_encode,
    random_images,
    random_vqgan,
    taming_state,
)

from dalle.cli.main import main
from dalle.importers.vqgan import import_vqgan
from dvae.codec import load_codec
from dvae.images import to_image
from dvae.vqgan import VQGAN, VQGANConfig

GUMBEL = replace(TINY, multiples=(1, 2), attention=(1,), quantiser="gumbel", z_channels=24, code_width=24)
UNIT = replace(TINY, pixels="unit")


def assert_reads(vqgan: VQGAN, file: Path, **given: Any) -> None:
    """The file must become a VQGAN of the same sizes and weights."""
    imported = import_vqgan(file, image_size=vqgan.config.image_size, **given).vqgan
    assert imported.config == vqgan.config
    expected = vqgan.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in imported.state_dict().items())


@pytest.mark.parametrize("config", [TINY, GUMBEL, replace(TINY, n_blocks=1, attention=(0, 2)), UNIT])
def test_the_graph_computes_what_its_plainest_form_does(config: VQGANConfig) -> None:
    vqgan = random_vqgan(config)
    images, state, is_signed = random_images(3, 32, 64), taming_state(vqgan), config.pixels == "signed"
    tokens = vqgan.encode(images)
    assert torch.equal(tokens, plain_encode(state, images * 2 - 1 if is_signed else images))
    pixels = plain_decode(state, tokens)
    expected = (pixels / 2 + 0.5 if is_signed else pixels).clamp(0, 1)
    torch.testing.assert_close(vqgan.decode(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [TINY, GUMBEL])
def test_checkpoints_of_taming_and_rudalle_are_read_without_their_losses(tmp_path: Path, config: VQGANConfig) -> None:
    vqgan = random_vqgan(config)
    file = lightning(taming_state(vqgan), tmp_path / "last.ckpt")
    assert_reads(vqgan, file)
    left = import_vqgan(file, image_size=32).left
    assert [name.split(".")[0] for name in left].count("optimizer_states") == 1
    assert len([name for name in left if name.startswith("state_dict.loss.")]) == 2


@pytest.mark.parametrize("kind", ["plain", "minDALL-E", "legacy", "safetensors", "half", "parallel"])
def test_every_way_in_which_torch_weights_are_saved_is_read(tmp_path: Path, kind: str) -> None:
    vqgan, file = random_vqgan(), tmp_path / "x"
    state = taming_state(vqgan)
    if kind == "safetensors":
        save_file(dict(state), file)
    elif kind == "half":
        vqgan = vqgan.half().float()
        torch.save({name: value.half() for name, value in state.items()}, file)
    elif kind == "parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, file)
    else:
        content = {"state_dict": state} if kind == "minDALL-E" else state
        torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    assert_reads(vqgan, file)


@pytest.mark.parametrize("old_norms", [False, True])
def test_flax_weights_are_read_and_used_with_pixels_from_0_to_1(tmp_path: Path, old_norms: bool) -> None:
    vqgan = random_vqgan(UNIT)
    file = flax(taming_state(vqgan), tmp_path / "flax_model.msgpack", old_norms=old_norms)
    assert_reads(vqgan, file)
    assert_reads(random_vqgan(TINY), file, pixels="signed")


def test_a_decoder_alone_decodes_and_refuses_to_encode(tmp_path: Path) -> None:
    vqgan = random_vqgan(UNIT)
    imported = import_vqgan(detoker(taming_state(vqgan), tmp_path / "detoker.pt"), image_size=32).vqgan
    assert imported.config == replace(UNIT, has_encoder=False)
    tokens = vqgan.encode(random_images())
    assert torch.equal(imported.decode(tokens), vqgan.decode(tokens))
    with pytest.raises(ValueError, match="has no encoder, it only decodes: to turn pictures into tokens, import one"):
        imported.encode(random_images())
    imported.save(tmp_path / "vqgan")
    assert torch.equal(load_codec(tmp_path / "vqgan").decode(tokens), vqgan.decode(tokens))


def test_a_vqgan_in_a_file_of_several_models_is_found_or_named(tmp_path: Path) -> None:
    first, second = random_vqgan(), random_vqgan(seed=1)
    other = {"text_emb.weight": torch.ones(2, 3)}
    inside = {f"vae.model.{name}": value for name, value in taming_state(first).items()}
    torch.save(
        {"hparams": {"dim": 3}, "weights": {**other, **inside, "vae.model.loss.x": torch.ones(1)}}, tmp_path / "a"
    )
    assert_reads(first, tmp_path / "a")
    assert_reads(first, tmp_path / "a", prefix="weights.vae.model.")
    assert list(import_vqgan(tmp_path / "a").left) == ["weights.text_emb.weight", "weights.vae.model.loss.x"]
    torch.save({"a": taming_state(first), "b": taming_state(second)}, tmp_path / "b")
    with pytest.raises(ValueError, match=r"holds 2 VQGANs: say which by --prefix a\. or b\."):
        import_vqgan(tmp_path / "b")
    assert_reads(second, tmp_path / "b", prefix="b.")
    with pytest.raises(ValueError, match=r"has no VQGAN under 'c\.'; leave out the prefix"):
        import_vqgan(tmp_path / "b", prefix="c.")


def without(state: dict[str, torch.Tensor], *starts: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(starts)}


WRONG_STATES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "remap": (lambda s: {**s, "quantize.used": torch.ones(3)}, r"a subset of its codes \(`remap`\)"),
    "maps": (lambda s: {**s, "colorize": torch.ones(3, 5, 1, 1)}, "a VQGAN of segmentation maps, not of pictures"),
    "maps in Lightning": (lambda s: {"state_dict": {**s, "colorize": torch.ones(3)}}, "segmentation maps"),
    "DWT": (
        lambda s: {
            "state_dict": {f"model.{name.replace('decoder.', 'decoder.decoder.')}": value for name, value in s.items()}
        },
        r"ruDALLE's variant that ends in a wavelet transform \(DWT\): not read here",
    ),
    "LlamaGen": (
        lambda s: {"model": {**without(s, "encoder."), "encoder.conv_blocks.0.res.0.norm1.weight": torch.ones(3)}},
        "LlamaGen's, whose codes have unit length",
    ),
    "LlamaGen's codes": (lambda s: {**s, "quantize.codebook_used": torch.ones(3)}, "LlamaGen's"),
    "Stable Diffusion": (lambda s: without(s, "quantize."), "an autoencoder without codes, such as Stable Diffusion's"),
    "cut": (
        lambda s: without(s, "decoder.mid.block_2.conv2.bias"),
        r"has no decoder\.mid\.block_2\.conv2\.bias: it is",
    ),
    "no levels": (lambda s: without(s, "decoder.up."), "has impossible sizes"),
    "half an encoder": (lambda s: without(s, "encoder.mid."), r"has no encoder\.mid\.block_1\.norm1\.weight"),
    "no proj": (lambda s: {**s, "quantize.proj.weight": torch.ones(2, 2)}, "an autoencoder without codes"),
    "more": (
        lambda s: {**s, "encoder.extra": torch.ones(1)},
        r"1 weights that no plain VQGAN has, encoder\.extra among",
    ),
    "beside": (
        lambda s: {"state_dict": s, "teacher": {"a": torch.ones(1)}},
        r"1 tensors beside those of a VQGAN, teacher\.a among them",
    ),
    "sizes": (
        lambda s: {**s, "encoder.conv_out.bias": torch.ones(5)},
        r"encoder\.conv_out\.bias has the shape \(5,\) instead of \(24,\)",
    ),
    "two numbers": (
        lambda s: {**s, "quantize.embedding.weight": torch.ones(5)},
        r"impossible sizes: quantize\.embedding\.weight has the shape \(5,\)",
    ),
    "no width": (lambda s: {**s, "encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}, "has impossible sizes"),
    "odd width": (
        lambda s: {**s, "encoder.conv_in.weight": torch.ones(48, 3, 3, 3)},
        "32 channels, .* no multiple of 48",
    ),
    "CLIP": (lambda _: {"visual.conv1.weight": torch.ones(1)}, "is no VQGAN that is read here: it looks like a CLIP"),
    "dVAE": (
        lambda _: {"weights": {"codebook.weight": torch.ones(1)}},
        r"it holds weights \(1\); expected a VQGAN of t",
    ),
    "transformer": (lambda _: {"state_dict": {"transformer.wte.weight": torch.ones(1)}}, "it looks like a transformer"),
    "nothing": (lambda _: {"epoch": 3}, "it holds no tensors"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_other_models_and_impossible_sizes_are_named(tmp_path: Path, name: str) -> None:
    change, message = WRONG_STATES[name]
    torch.save(change(dict(taming_state(random_vqgan()))), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        import_vqgan(tmp_path / "x.pt", image_size=32)


def test_an_image_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    torch.save(taming_state(random_vqgan()), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"image_size \(30\) must be a multiple of 4, by which 3 levels shrink"):
        import_vqgan(tmp_path / "x.pt", image_size=30)


WRONG_FILES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS"),
    "page": (b"<!DOCTYPE html><html></html>", "is a web page"),
    "empty": (b"", "empty"),
    "cut": (None, r"cut|cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_what_is_no_checkpoint_is_named_by_the_command(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, message = WRONG_FILES[name]
    file = tmp_path / "last.ckpt"
    if data is None:
        lightning(taming_state(random_vqgan()), file)
        data = file.read_bytes()[:-5000]
    file.write_bytes(data)
    assert main(["import-vqgan", str(file), "--out", str(tmp_path / "vqgan")]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error)
    assert not (tmp_path / "vqgan").exists()


def test_a_vqgan_that_names_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    torch.save({"state_dict": taming_state(random_vqgan()), "callbacks": Touch()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"would run code: it names (posix|nt)\.system"):
        import_vqgan(tmp_path / "x.ckpt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch.save", "flax msgpack"])
def test_importing_a_vqgan_holds_the_weights_once_and_a_tensor(
    tmp_path: Path, kind: str, rise_of_memory: Callable[[Callable[[], object]], int]
) -> None:
    large = replace(TINY, width=256, multiples=(4,), n_blocks=1, attention=())
    with torch.device("meta"):
        meta = VQGAN(large).state_dict()
    state = {name: torch.zeros(value.shape) for name, value in meta.items()}
    n_bytes = 4 * sum(value.numel() for value in meta.values())
    file = tmp_path / "x"
    if kind == "torch.save":
        torch.save(state, file)
    else:
        flax(state, file)
    state.clear()
    kept: list[object] = []
    rise = rise_of_memory(lambda: kept.append(import_vqgan(file, image_size=32)))
    # A tensor is held twice while it is read, and the allocator keeps what it freed; the file or another copy is twice.
    assert n_bytes * 0.9 < rise < n_bytes * 1.6


COUNTS = {
    "f16 1024": ({"vocab_size": 1024}, 29_298_176, 42_449_795, 72_141_699),
    "f16 16384": ({}, 29_298_176, 42_449_795, 76_073_859),
    "gumbel f8": (
        {"multiples": (1, 1, 2, 4), "attention": (3,), "vocab_size": 8192, "quantiser": "gumbel"},
        26_345_728,
        38_316_163,
        68_995_971,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_vqgans_have_the_published_numbers_of_parameters(name: str) -> None:
    sizes, *expected = COUNTS[name]
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig(**sizes))
    assert vqgan.encoder is not None
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (vqgan.encoder, vqgan.decoder, vqgan)]
    assert counts == expected
    assert (vqgan.config.downsampling, vqgan.config.grid) == ((8, 32) if "f8" in name else (16, 16))


def test_the_command_imports_a_vqgan_that_reconstruct_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vqgan, out, sheets = random_vqgan(), tmp_path / "vqgan", tmp_path / "sheets"
    file = lightning(taming_state(vqgan), tmp_path / "last.ckpt")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["import-vqgan", str(file), "--out", str(out), "--image-size", "32"]) == 0
    told = capsys.readouterr().out
    for line in (
        r"read: +.*last\.ckpt, torch\.save, as taming-transformers has it, sha256 [0-9a-f]{16}…",
        r"model: +VQGAN f4, [\d,]+ parameters, 40 codes, chosen by the smallest distance",
        r"assumed: +pictures of 32 pixels, so 8×8 tokens; pixels in \[-1, 1\] \(as all in this format are used here\)",
        r"left: +callbacks\.ModelCheckpoint \(1\), optimizer_states\.0 \(1\), state_dict\.loss \(2\)",
        r"licence: +mit, as README\.md says",
        r"VQGAN [0-9a-f]{16} in .*vqgan",
    ):
        assert re.search(line, told), line
    metadata = json.loads((out / "config.json").read_text())["metadata"]
    assert metadata["source"] == "last.ckpt"
    assert len(metadata["source_sha256"]) == 64
    for i, image in enumerate(random_images(3)):
        to_image(image).save(tmp_path / f"{i}.png")
    pictures = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert main(["reconstruct", *pictures, "--dvae", str(out), "--out", str(sheets)]) == 0
    report = json.loads((sheets / "metrics.json").read_text())
    decoded = vqgan.decode(vqgan.encode(random_images(3)))
    expected = [
        10 * float(torch.log10(1 / (a - b).square().mean())) for a, b in zip(random_images(3), decoded, strict=True)
    ]
    assert [one["psnr"] for one in report["pictures"]] == pytest.approx(expected, abs=1e-3)
    assert Image.open(sheets / "reconstructions.png").width > 64
    assert main(["reconstruct", *pictures, "--dvae", str(out), "--size", "48", "--out", str(sheets)]) == 0
    assert main(["reconstruct", *pictures, "--dvae", str(out), "--size", "30", "--out", str(sheets)]) == 1
    assert "must be a multiple of 4" in capsys.readouterr().err


def test_a_decoder_alone_cannot_reconstruct_and_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = detoker(taming_state(random_vqgan()), tmp_path / "detoker.pt")
    assert main(["import-vqgan", str(file), "--out", str(tmp_path / "vqgan"), "--image-size", "32"]) == 0
    assert "f4, the decoder alone" in capsys.readouterr().out
    to_image(random_images(1)[0]).save(tmp_path / "a.png")
    argv = ["reconstruct", str(tmp_path / "a.png"), "--dvae", str(tmp_path / "vqgan"), "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "has no encoder, it only decodes" in error
