"""DALL·E mini and mega, from files of min-dalle and of flax."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_files import (
    IMAGE_VOCAB,
    N_IMAGE,
    as_converted,
    dalle_mini,
    flax_tree,
    min_dalle,
    pack,
    published_state,
    random_mini,
)
from PIL import Image

from dalle.cli.main import main
from dalle.family.mini.model import DALLEMini
from dalle.importers.bundles import write_bundle
from dalle.importers.mini.importing import import_dalle_mini, import_min_dalle
from dalle.pipeline import Pipeline
from dvae import DVAE, DVAEConfig
from dvae.vqgan import VQGAN, VQGANConfig


def same(model: DALLEMini, expected: DALLEMini) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("suffix", ["", "_mini"])
def test_min_dalles_files_are_read_to_the_bit(tmp_path: Path, suffix: str) -> None:
    model = random_mini()
    imported = import_min_dalle(min_dalle(tmp_path, model, suffix), image_vocab=IMAGE_VOCAB)
    same(imported.model, model)
    assert imported.model.config == replace(model.config, text_vocab=imported.tokenizer.vocab_size)
    assert [path.name for path in imported.files] == [
        *(f"{name}{suffix}.pt" for name in ("encoder", "decoder")),
        f"vocab{suffix}.json",
        f"merges{suffix}.txt",
    ]
    assert "MIT" in str(imported)


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("norm_scales", [True, False])
def test_flax_files_are_read_to_the_bit(tmp_path: Path, is_stacked: bool, norm_scales: bool) -> None:
    model = random_mini(norm_scales=norm_scales, start_of_image=35)
    imported = import_dalle_mini(dalle_mini(tmp_path, model, is_stacked=is_stacked), image_vocab=IMAGE_VOCAB)
    same(imported.model, model)
    assert imported.model.config.start_of_image == 35
    assert imported.tokenizer.normalises
    for line in ("read:", "flax msgpack", "(encoder + decoder)", "12 positions of text, 16×16", "Apache-2.0"):
        assert line in str(imported)
    assert imported.left == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ln_positions", "swinv2"),
        ("ln_positions", "postln"),
        ("use_cosine_attention", True),
        ("use_swin_position_embeddings", True),
        ("use_deepnet_scaling", True),
        ("tie_word_embeddings", True),
        ("ln_type", "rmsnorm"),
        ("use_bias", True),
        ("use_glu", False),
        ("use_head_scale", True),
        ("activation_function", "smelu"),
        ("scale_embedding", True),
        ("sinkhorn_iters", 3),
        ("use_final_ln_encoder", False),
    ],
)
def test_models_that_are_computed_in_another_way_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    folder = dalle_mini(tmp_path, random_mini(), **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json says {name} {value!r}, which is computed in another way"):
        import_dalle_mini(folder, image_vocab=IMAGE_VOCAB)


@pytest.mark.parametrize("name", ["d_model", "encoder_layers", "decoder_ffn_dim", "max_text_length"])
def test_a_configuration_of_another_model_is_noticed(tmp_path: Path, name: str) -> None:
    folder = dalle_mini(tmp_path, random_mini(), **{name: 999})
    with pytest.raises(ValueError, match=f"says {name} 999, but the weights beside it have"):
        import_dalle_mini(folder, image_vocab=IMAGE_VOCAB)


def test_missing_more_and_other_weights_are_named(tmp_path: Path) -> None:
    folder, model = min_dalle(tmp_path, random_mini()), random_mini()
    for change, message in (
        ({"layers.1.glu.fc2.weight": None}, r"encoder\.layers\.1\.glu\.fc2\.weight is missing"),
        ({"layers.1.glu.fc2.bias": torch.ones(2)}, r"encoder\.layers\.1\.glu\.fc2\.bias is unexpected"),
        ({"layers.1.glu.fc2.weight": torch.ones(2, 2)}, r"fc2\.weight: .* has the shape \(2, 2\) instead of"),
        ({"embed_tokens.weight": None}, r"encoder\.pt is no encoder of a DALL·E mini: it has no embed_tokens"),
    ):
        state = as_converted(published_state(model), "encoder")
        state |= {name: value for name, value in change.items() if value is not None}
        state = {name: value for name, value in state.items() if change.get(name, 0) is not None}
        torch.save(state, folder / "encoder.pt")
        with pytest.raises(ValueError, match=message):
            import_min_dalle(folder, image_vocab=IMAGE_VOCAB)
    (folder / "encoder.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no encoder\.pt in .*: expected the files of kuprel/min-dalle"):
        import_min_dalle(folder, image_vocab=IMAGE_VOCAB)


def test_positions_that_are_no_grid_and_too_few_image_ids_are_refused(tmp_path: Path) -> None:
    folder, model = min_dalle(tmp_path, random_mini()), random_mini()
    state = as_converted(published_state(model), "decoder")
    torch.save({**state, "embed_positions.weight": torch.ones(259, 128)}, folder / "decoder.pt")
    with pytest.raises(ValueError, match="259 image positions, which are no square grid"):
        import_min_dalle(folder, image_vocab=IMAGE_VOCAB)
    torch.save({name: value for name, value in state.items() if "positions" not in name}, folder / "decoder.pt")
    with pytest.raises(ValueError, match=r"has no embed_positions\.weight: it is no DALL·E mini, or cut"):
        import_min_dalle(folder, image_vocab=IMAGE_VOCAB)
    torch.save(state, folder / "decoder.pt")
    with pytest.raises(ValueError, match=rf"n_image_ids \({N_IMAGE}\) must hold the 16384 image tokens"):
        import_min_dalle(folder, image_vocab=16_384)


def test_a_vocabulary_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = min_dalle(tmp_path, random_mini())
    vocab = json.loads((folder / "vocab.json").read_text())
    for changed, message in (
        ({"<pad>x" if name == "<pad>" else name: i for name, i in vocab.items()}, "the vocabulary has no <pad>"),
        ({name: f"{i}" for name, i in vocab.items()}, r"vocab\.json is no vocabulary"),
        (dict.fromkeys(vocab, 1), "are not different whole numbers"),
        ({"a": 0}, r"vocab\.json and merges\.txt of .* do not fit"),
    ):
        (folder / "vocab.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            import_min_dalle(folder, image_vocab=IMAGE_VOCAB)
    (folder / "vocab.json").write_text("[1")
    with pytest.raises(ValueError, match=r"vocab\.json is no JSON"):
        import_min_dalle(folder, image_vocab=IMAGE_VOCAB)
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: expected vocab\.json and merges\.txt, or"):
        import_min_dalle(folder, image_vocab=IMAGE_VOCAB)


WRONG_FILES = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs|LFS"),
    "page": (b"<!doctype html><html></html>", "HTML|web page"),
    "empty": (b"", "empty"),
    "cut": (None, "cut|cannot be read|directory"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
@pytest.mark.parametrize("is_flax", [True, False])
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, kind: str, is_flax: bool) -> None:
    data, message = WRONG_FILES[kind]
    folder = dalle_mini(tmp_path, random_mini()) if is_flax else min_dalle(tmp_path, random_mini())
    file = folder / ("flax_model.msgpack" if is_flax else "decoder.pt")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if data is None else data)
    with pytest.raises(ValueError, match=message):
        (import_dalle_mini if is_flax else import_min_dalle)(folder, image_vocab=IMAGE_VOCAB)


def test_a_file_that_names_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    folder = min_dalle(tmp_path, random_mini())
    state = as_converted(published_state(random_mini()), "encoder")
    torch.save({**state, "z": Touch()}, folder / "encoder.pt")
    with pytest.raises(ValueError, match=r"would run code: it names (posix|nt)\.system"):
        import_min_dalle(folder, image_vocab=IMAGE_VOCAB)
    assert not (tmp_path / "marker").exists()


def test_a_flax_file_with_a_false_length_is_refused(tmp_path: Path) -> None:
    folder = dalle_mini(tmp_path, random_mini())
    tree = flax_tree(random_mini(), is_stacked=True)
    data = pack(tree)
    (folder / "flax_model.msgpack").write_bytes(data.replace(b"\x93\x92\xcd", b"\x93\x92\xce", 1))
    with pytest.raises(ValueError, match="cannot be read"):
        import_dalle_mini(folder, image_vocab=IMAGE_VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("is_flax", [True, False])
def test_importing_a_mini_holds_its_weights_once_and_one_tensor(
    tmp_path: Path, rise_of_memory: Callable[[Callable[[], object]], int], is_flax: bool
) -> None:
    # matrices above 32 MiB, which malloc returns
    sizes = {"d_model": 3072, "n_heads": 48, "d_glu": 2740, "decoder_layers": 1, "encoder_layers": 1}
    model = on_meta(sizes)
    n_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    model = model.to_empty(device="cpu").requires_grad_(False)
    for weight in model.parameters():
        weight.fill_(0.5)
    if is_flax:
        changed = {"d_model": 3072, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": IMAGE_VOCAB}
        changed |= {f"{tower}_ffn_dim": 2740 for tower in ("encoder", "decoder")}
        changed |= {f"{tower}_attention_heads": 48 for tower in ("encoder", "decoder")}
        dalle_mini(tmp_path, model, **changed)
    else:
        min_dalle(tmp_path, model)
    del model
    kept: list[object] = []
    read = import_dalle_mini if is_flax else import_min_dalle
    rise = rise_of_memory(lambda: kept.append(read(tmp_path, image_vocab=IMAGE_VOCAB)))
    assert n_bytes > 200 << 20
    assert n_bytes * 0.8 < rise < n_bytes * 1.4


def on_meta(sizes: dict[str, int]) -> DALLEMini:
    config = replace(random_mini().config, **sizes)  # type: ignore[arg-type]
    with torch.device("meta"):
        return DALLEMini(config)


def codec() -> DVAE:
    config = DVAEConfig(n_hid=8, n_init=8, n_groups=3, n_blocks=1, vocab_size=IMAGE_VOCAB, image_size=64)
    dvae = DVAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        list(dvae.decoder.parameters())[-2].mul_(50)
    return dvae


@pytest.mark.slow
def test_a_bundle_of_an_imported_mini_draws_and_ranks(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = import_dalle_mini(dalle_mini(tmp_path / "files", random_mini()), image_vocab=IMAGE_VOCAB)
    out = tmp_path / "bundle"
    parts = {"tokenizer": imported.tokenizer, "codec": codec(), "transformer": imported.model}
    write_bundle(out, **parts, clip=bundle / "clip", codec_metadata={}, metadata=imported.metadata)  # type: ignore[arg-type]
    pipe = Pipeline.load(out)
    assert pipe.defaults.guidance == 10
    result = pipe.generate("a red cube, on a BLUE cube!", n=3, keep=2)
    assert result.images.shape == (2, 3, 64, 64)
    drawn = ["generate", "a red cube", "--bundle", str(out), "-n", "2", "--keep", "1", "--out", str(tmp_path / "drawn")]
    assert main(drawn) == 0
    assert "empty caption" not in capsys.readouterr().err
    assert list((tmp_path / "drawn").glob("*/*.png"))


def detokenizer(path: Path) -> None:
    """min-dalle's detoker.pt, tiny: a VQGAN's codes and decoder alone."""
    sizes: dict[str, Any] = {"width": 32, "multiples": (1, 1, 1, 1, 1), "n_blocks": 1, "attention": (4,)}
    sizes |= {"z_channels": 8, "code_width": 8, "vocab_size": IMAGE_VOCAB, "image_size": 256, "has_encoder": False}
    torch.manual_seed(0)
    state = VQGAN(VQGANConfig(**sizes)).state_dict()
    torch.save({name.replace("quantize.embedding", "embedding"): weight for name, weight in state.items()}, path)


@pytest.mark.parametrize("is_flax", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_command_writes_a_bundle_and_tells_what_was_read(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_flax: bool
) -> None:
    folder, out = tmp_path / "files", tmp_path / "bundle"
    if is_flax:
        dalle_mini(folder, random_mini())
        kind, more = "dalle-mini", ["--vqgan", str(folder / "detoker.pt")]
    else:
        min_dalle(folder, random_mini(), "_mini")
        kind, more = "min-dalle", []
    detokenizer(folder / "detoker.pt")
    command = ["import-bundle", kind, str(folder), *more, "--clip", str(bundle / "clip"), "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().out
    for line in ("VQGAN f16", "a DALL·E mini of other sizes", "guidance 10", "licence:", f"bundle in {out}: tokenizer"):
        assert line in told
    drawn = ["generate", "a red cube", "--bundle", str(out), "-n", "2", "--keep", "1", "--out", str(tmp_path / "drawn")]
    assert main(drawn) == 0
    png = Image.open(next((tmp_path / "drawn").glob("*/*.png")))
    assert png.size == (256, 256)
    assert main(command) == 1
    assert "is there already" in capsys.readouterr().err
