"""ruDALLE and minDALL-E, from files in their published formats to bundles that draw."""

import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from many_captions import charbpe_files
from torch import Tensor
from variant_files import CONFIGS, mindalle_state, random_model, rudalle_state, saved

from dalle.cli.main import main
from dalle.family.texts.charbpe import CharBPE
from dalle.family.variants.model import VariantDALLE
from dalle.importers.mindalle import MERGES, STAGE_1, STAGE_2, VOCABULARY, import_mindalle, mindalle_files
from dalle.importers.rudalle import Version, import_rudalle
from dalle.importers.variants import ImportedVariant
from dalle.pipeline import Pipeline
from dvae.vqgan import VQGAN, VQGANConfig

YTTM = Path(__file__).parents[1] / "fixtures" / "youtokentome.model"
VARIANTS = tuple(CONFIGS)
State = dict[str, Tensor]


def imported(file: Path, folder: Path, **options: Any) -> ImportedVariant:
    """What is in a file of either format; minDALL-E's has a state_dict."""
    if "minDALL-E" in file.name:
        return import_mindalle(file, CharBPE.read(*charbpe_files(folder)))
    return import_rudalle(file, **{"heads": 2, **options})


def state_of(variant: str, model: VariantDALLE | None = None) -> State:
    model = model or random_model(variant)
    return dict(mindalle_state(model) if variant == "minDALL-E" else rudalle_state(model))


def file_of(variant: str, folder: Path, state: State) -> Path:
    content = {"state_dict": state, "epoch": 3} if variant == "minDALL-E" else state
    return saved(content, folder / f"{variant}.bin")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_files_are_read_to_the_bit(tmp_path: Path, variant: str, half: bool) -> None:
    model = random_model(variant, pad=0)
    if half:
        model = model.half().float()
    state = state_of(variant, model)
    halves = {name: value.half() for name, value in state.items()}
    found = imported(file_of(variant, tmp_path, halves if half else state), tmp_path)
    found.model.save(tmp_path / "dalle", found.metadata)
    loaded = VariantDALLE.load(tmp_path / "dalle")
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.metadata["source"] == variant
    assert loaded.metadata["sampling"]["top_k"] == (256 if variant == "minDALL-E" else 2048)
    told = str(found)
    for line in (
        rf"read: +.*{variant}\.bin, sha256 [0-9a-f]{{16}}…",
        rf"model: +{variant}, torch\.save, \d layers × \d+, [\d,]+ parameters, \d+ positions of text",
        r"assumed: +2 heads, .*GELU by (tanh|erf).*; temperature 1, top-k (256|2048)",
        r"left: +(transformer\.row_mask, transformer\.col_mask, transformer\.conv_mask|nothing)",
        r"licence: +(CC-BY-NC-SA|not stated)",
    ):
        assert re.search(line, told), line


def test_the_masks_in_the_file_tell_the_version_and_nothing_else_does(tmp_path: Path) -> None:
    v2, v3 = (state_of(f"ruDALLE {version}") for version in ("v2", "v3"))
    file = saved(v2, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="has the conv_mask of v2, but the version was given as v3"):
        import_rudalle(file, heads=2, version="v3")
    saved({name: value for name, value in v2.items() if not name.endswith("_mask")}, file)
    with pytest.raises(ValueError, match=r"does not show whether it is of v2 or v3.* say --version v3 \(Malevich"):
        import_rudalle(file, heads=2)
    versions: tuple[Version, ...] = ("v2", "v3")
    for version in versions:
        assert import_rudalle(file, heads=2, version=version).model.config.variant == f"ruDALLE {version}"
    for name in ("transformer.row_mask", "transformer.col_mask", "transformer.conv_mask"):
        with pytest.raises(ValueError, match=rf"another {name.split('.')[1]} than the published v2 and v3"):
            import_rudalle(saved({**v3, name: ~v3[name]}, file), heads=2)


def without(*names: str) -> Callable[[State], Any]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


RUDALLE_FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "another model": (lambda _: {"a.b": torch.ones(1)}, r"is no ruDALLE: it holds a \(1\); expected a ruDALLE"),
    "nothing": (lambda _: {"epoch": 3}, "it holds no tensors"),
    "flat": (lambda state: {**state, "text_pos_embeddings.weight": torch.ones(3)}, "is no ruDALLE"),
    "cut": (without("to_logits.1.bias"), r"has no to_logits\.1\.bias, and 1 weights are missing in all"),
    "no sandwich": (
        without("transformer.layers.0.before_first_addition_layernorm.weight"),
        r"has no transformer\.layers\.0\.before_first_addition_layernorm\.weight",
    ),
    "more": (lambda state: {**state, "x.y": torch.ones(1)}, r"1 tensors that a ruDALLE, .* has not: x\.y"),
    "rows": (
        lambda state: {**state, "to_logits.1.bias": torch.ones(5)},
        r"to_logits\.1\.bias give \w+_head\.bias the shape \(.*\) instead of",
    ),
    "scalar": (lambda state: {**state, "to_logits.1.bias": torch.ones(())}, r"the shape \(\) instead of"),
    "no text": (lambda state: {**state, "text_embeddings.weight": torch.ones(12, 32)}, r"impossible sizes: text_vocab"),
    "depth": (
        lambda state: {name: value for name, value in state.items() if not re.search(r"layers\.[23]\.", name)},
        "has 2 layers, the last of which would attend to columns",
    ),
}


@pytest.mark.parametrize("name", RUDALLE_FAULTS)
def test_a_file_that_is_no_rudalle_or_another_is_named(tmp_path: Path, name: str) -> None:
    change, message = RUDALLE_FAULTS[name]
    with pytest.raises(ValueError, match=message):
        import_rudalle(saved(change(state_of("ruDALLE v3")), tmp_path / "x.bin"), heads=2)


@pytest.mark.parametrize(
    ("heads", "message"), [(None, "say how many heads it has, --heads"), (5, "must be a multiple")]
)
def test_heads_of_an_unpublished_width_are_asked_for(tmp_path: Path, heads: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_rudalle(saved(state_of("ruDALLE v3"), tmp_path / "x.bin"), heads=heads)


MINDALLE_FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "no state dict": (lambda state: state, r"is no minDALL-E: it holds tok_emb_img\.weight"),
    "cut": (lambda state: {"state_dict": without("ln_f.bias")(state)}, r"has no ln_f\.bias"),
    "more": (
        lambda state: {"state_dict": {**state, "sos": torch.ones(1)}},
        r"1 tensors that minDALL-E's .* has not: s",
    ),
    "no square": (
        lambda state: {"state_dict": {**state, "pos_emb_img.weight": torch.ones(15, 128)}},
        "impossible sizes: 15 image positions are no square",
    ),
    "odd parts": (
        lambda state: {"state_dict": {**state, "blocks.0.attn.key.weight": torch.ones(128, 64)}},
        r"attn\.value\.weight have the shapes \(128, 128\) and \(128, 64\)",
    ),
    "short parts": (
        lambda state: {"state_dict": {**state, "blocks.0.attn.key.weight": torch.ones(64, 128)}},
        r"the shape \(320, 128\) instead of \(384, 128\)",
    ),
}


@pytest.mark.parametrize("name", MINDALLE_FAULTS)
def test_a_file_that_is_no_mindalle_or_another_is_named(tmp_path: Path, name: str) -> None:
    change, message = MINDALLE_FAULTS[name]
    tokenizer = CharBPE.read(*charbpe_files(tmp_path))
    with pytest.raises(ValueError, match=message):
        import_mindalle(saved(change(state_of("minDALL-E")), tmp_path / "x.ckpt"), tokenizer)


@pytest.mark.parametrize("variant", ["ruDALLE v3", "minDALL-E"])
def test_a_file_that_names_code_or_is_no_checkpoint_is_refused(tmp_path: Path, variant: str) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    file = saved({**state_of(variant), "z": Touch()}, tmp_path / f"{variant}.bin")
    with pytest.raises(ValueError, match=r"would run code: it names (posix|nt)\.system"):
        imported(file, tmp_path)
    assert not (tmp_path / "marker").exists()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs|Git LFS"),
        (b"<!DOCTYPE html><html></html>", "HTML|web page"),
        (b"", "empty"),
        (file.read_bytes()[:5000], "cut|ends"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            imported(file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ruDALLE v3", "minDALL-E"])
def test_importing_a_variant_holds_one_tensor_at_a_time(
    tmp_path: Path, variant: str, rise_of_memory: Callable[[Callable[[], object]], int]
) -> None:
    config = replace(CONFIGS[variant], d_model=1536, n_heads=12, n_layers=4)
    with torch.device("meta"):
        model = VariantDALLE(config)
        shapes = {name: value.shape for name, value in state_of(variant, model).items()}
    state = {name: torch.ones(shape, dtype=torch.half) for name, shape in shapes.items() if "_mask" not in name}
    file = file_of(variant, tmp_path, state)
    del state
    options = {} if variant == "minDALL-E" else {"version": "v3", "heads": 12}
    rise = rise_of_memory(lambda: imported(file, tmp_path, **options).model.save(tmp_path / "dalle", {}))
    largest = 4 * max(shape.numel() for shape in shapes.values())
    assert largest > 32 << 20
    total = (tmp_path / "dalle/model.safetensors").stat().st_size
    # the tensor, what it is made of (in half precision, or in parts), and the one before it
    assert rise < 4 * largest < 0.45 * total


def vqgan_file(file: Path, quantiser: Any, vocab_size: int) -> Path:
    """A tiny VQGAN for 8×8 tokens, as taming-transformers has it."""
    torch.manual_seed(0)
    vqgan = VQGAN(
        VQGANConfig(
            width=32,
            multiples=(1, 1, 1, 1, 1, 1),
            n_blocks=1,
            attention=(5,),
            z_channels=16,
            code_width=16,
            vocab_size=vocab_size,
            image_size=256,
            quantiser=quantiser,
        )
    )
    with torch.no_grad():
        vqgan.state_dict()["quantize.embedding.weight"].normal_(std=3)
    codes = "quantize.embed.weight" if quantiser == "gumbel" else "quantize.embedding.weight"
    state = {
        codes if name == "quantize.embedding.weight" else name: value for name, value in vqgan.state_dict().items()
    }
    return saved({"state_dict": {**state, "loss.logvar": torch.ones(1)}, "global_step": 5}, file)


def mindalle_folder(folder: Path) -> Path:
    """The content of 1.3B.tar.gz, of tiny models."""
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer = CharBPE.read(*charbpe_files(folder / "tokenizer"))
    model = random_model("minDALL-E", grid=8, image_vocab=300, text_vocab=tokenizer.vocab_size, pad=tokenizer.pad)
    saved({"state_dict": mindalle_state(model)}, folder / STAGE_2)
    vqgan_file(folder / STAGE_1, "nearest", 300)
    (folder / "config.yaml").write_text("stage2: !!python/object/apply:os.system [exit]\n")
    return folder


def draws_and_ranks(out: Path, folder: Path, clip: Path, capsys: pytest.CaptureFixture[str], caption: str) -> None:
    """The bundle draws with its own sampling defaults, and its pictures are ranked."""
    drawn = ["generate", caption, "--bundle", str(out), "-n", "3", "--keep", "2", "--out", str(folder / "drawn")]
    assert main(drawn) == 0
    pictures = sorted((folder / "drawn").glob("**/*.png"))
    capsys.readouterr()
    assert main(["rank", caption, *map(str, pictures), "--clip", str(clip), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(pictures) >= 2


def test_files_of_rudalle_become_a_bundle_that_draws_and_ranks(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model("ruDALLE v2", text_vocab=200, image_vocab=2100)
    weights = saved(
        {name: value.half() for name, value in rudalle_state(model).items()}, tmp_path / "pytorch_model.bin"
    )
    vqgan = vqgan_file(tmp_path / "vqgan.ckpt", "gumbel", 2100)
    out = tmp_path / "bundle"
    command = ["import-bundle", "rudalle", str(weights), "--tokenizer", str(YTTM), "--vqgan", str(vqgan)]
    command += ["--clip", str(bundle / "clip"), "--out", str(out)]
    assert main(command) == 1
    assert "say how many heads it has, --heads" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--heads", "2"]) == 0
    told = capsys.readouterr().out
    for line in (
        r"model: +VQGAN f32",
        r"model: +ruDALLE v2, torch\.save",
        r"left: +.*loss",
        r"bundle in .*: tokenizer [0-9a-f]{16}",
    ):
        assert re.search(line, told), line
    pipe = Pipeline.load(out)
    assert (pipe.defaults.top_k, pipe.defaults.top_p) == (2048, 0.995)
    assert json.loads((out / "dalle/config.json").read_text())["metadata"]["source_sha256"].keys() == {weights.name}
    draws_and_ranks(out, tmp_path, bundle / "clip", capsys, "Красный куб на синем шаре")
    image = pipe.generate("кот", n=2, keep=1).images[0]
    assert image.shape == (3, 256, 256)
    assert 0 <= float(image.min()) < float(image.max()) <= 1


@pytest.mark.parametrize("is_packed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_files_of_mindalle_become_a_bundle_that_draws_and_ranks(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_packed: bool
) -> None:
    source = mindalle_folder(tmp_path / "1.3B")
    if is_packed:
        with tarfile.open(tmp_path / "1.3B.tar.gz", "w:gz") as tar:
            tar.add(source, "1.3B")
        source = tmp_path / "1.3B.tar.gz"
    out = tmp_path / "made" / "bundle"
    command = ["import-bundle", "mindalle", str(source), "--clip", str(bundle / "clip"), "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().out
    for line in (r"model: +minDALL-E, torch\.save", r"licence: +CC-BY-NC-SA 4\.0, not for commercial use"):
        assert re.search(line, told), line
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    if is_packed:
        draws_and_ranks(out, tmp_path, bundle / "clip", capsys, "a red CUBE, on the blue sphere")


def packed(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            tar.addfile(info, BytesIO(content))
    return path


def test_a_tar_file_gives_its_wanted_members_alone_and_only_inside_the_folder(tmp_path: Path) -> None:
    names = (VOCABULARY, MERGES, STAGE_1, STAGE_2)
    members = [(f"1.3B/x/../../{name}", name.encode()) for name in names] + [
        ("../evil", b"x"),
        ("1.3B/config.yaml", b""),
    ]
    room = tmp_path / "room"
    room.mkdir()
    with mindalle_files(packed(tmp_path / "x.tar.gz", members), room) as files:
        assert {name: path.read_text() for name, path in files.items()} == {name: name for name in names}
        assert {path.parent.parent for path in files.values()} == {room}
        assert len(list(next(iter(files.values())).parent.iterdir())) == 4
    assert list(room.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["room", "x.tar.gz"]
    large = packed(tmp_path / "y", [*members[:3], (STAGE_2, os.urandom(200_000))]).read_bytes()
    whole = (tmp_path / "x.tar.gz").read_bytes()
    for content, message in (
        (packed(tmp_path / "y", members[1:]).read_bytes(), f"holds no {VOCABULARY}"),
        (packed(tmp_path / "y", [members[0], *members]).read_bytes(), f"has {VOCABULARY} twice"),
        (packed(tmp_path / "y", members, tarfile.SYMTYPE).read_bytes(), "holds no "),
        (whole[: len(whole) // 2], "is no whole tar file|cut off"),
        (large[:150_000], "is no whole tar file"),
        (b"not a tar file at all", "is no whole tar file"),
        (b"", "is no whole tar file"),
    ):
        (tmp_path / "x.tar.gz").write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message), mindalle_files(tmp_path / "x.tar.gz", room):
            pass
        assert list(room.iterdir()) == []
    with (
        pytest.raises(FileNotFoundError, match=r"expected the content of minDALL-E's 1\.3B\.tar\.gz"),
        mindalle_files(room, room),
    ):
        pass
