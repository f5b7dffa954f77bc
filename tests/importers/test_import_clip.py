import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import MERGES, OPEN_CLIP_CONFIG, TINY, openai_state, random_clip, script, vocabulary
from PIL import Image
from safetensors.torch import save_file

from dalle.cli.main import main
from dalle.importers.clip import PUBLISHED, import_clip, interpolated_positions
from dalle.importers.clip_configs import hugging_face_unseen
from rerank import CLIP, CLIPConfig
from rerank.pixels import PIXEL_MEAN, PIXEL_STD
from rerank.score import embed_captions, embed_images

CAPTIONS = ["a red cat", "A CAT is  running &amp; 12", "", "猫 ‘quoted’ naïve"]


def same(found: CLIP, expected: CLIP, *, exactly: bool = True) -> None:
    """The same features of captions, and of pictures from their pixels on."""
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    for mine, theirs in (
        (embed_captions(found, CAPTIONS), embed_captions(expected, CAPTIONS)),
        (embed_images(found, images), embed_images(expected, images)),
        (found.exp_logit_scale(), expected.exp_logit_scale()),
    ):
        torch.testing.assert_close(mine, theirs, atol=0 if exactly else 1e-6, rtol=0)


def folder_of(path: Path, config: object = OPEN_CLIP_CONFIG) -> Path:
    path.mkdir()
    vocabulary(path)
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


def test_openais_own_file_is_read_and_computes_the_same(tmp_path: Path) -> None:
    clip = random_clip()
    file = script(openai_state(clip), tmp_path / "ViT.pt")
    vocabulary(tmp_path)
    imported = import_clip(file)
    assert imported.clip.config == TINY
    assert not imported.clip.training
    assert imported.format == "TorchScript"
    assert imported.origin == "as all of OpenAI's"
    assert sorted(imported.left) == ["context_length", "input_resolution", "vocab_size"]
    assert "MIT" in imported.licence
    same(imported.clip, clip)
    imported.clip.save(tmp_path / "clip", metadata=imported.metadata)
    same(CLIP.load(tmp_path / "clip"), clip)
    assert json.loads((tmp_path / "clip/config.json").read_text())["metadata"]["source_sha256"] == imported.sha256


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    clip = random_clip()
    halves = OrderedDict((name, value.half()) for name, value in openai_state(clip).items())
    vocabulary(tmp_path)
    imported = import_clip(script(halves, tmp_path / "ViT.pt")).clip
    assert {weight.dtype for weight in imported.parameters()} == {torch.float32}
    same(imported, clip.half().float())


@pytest.mark.parametrize("kind", ["safetensors", "bin", "trainer", "text."])
def test_open_clips_files_are_read_with_their_configuration(tmp_path: Path, kind: str) -> None:
    config = replace(TINY, activation="gelu", pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.3, 0.4))
    clip = random_clip(config)
    folder = folder_of(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    state = openai_state(clip)
    left = []
    if kind == "text.":
        state = OrderedDict(
            (name if "visual" in name or "scale" in name else f"text.{name}", value) for name, value in state.items()
        )
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    elif kind == "trainer":
        modules = {f"module.{name}": value for name, value in state.items()}
        content = {"epoch": 3, "state_dict": modules, "optimizer": {"state": {0: torch.ones(2)}}}
        torch.save(content, folder / "open_clip_pytorch_model.bin")
        left = ["optimizer.state.0"]
    else:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    imported = import_clip(folder)
    assert imported.clip.config == config
    assert list(imported.left) == left
    assert imported.licence == "mit, as README.md says"
    same(imported.clip, clip)


def test_the_activation_is_never_guessed(tmp_path: Path) -> None:
    clip = random_clip()
    torch.save(openai_state(clip), tmp_path / "state.pt")
    vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"does not show which activation .* say --activation quick_gelu .* or gelu"):
        import_clip(tmp_path / "state.pt")
    same(import_clip(tmp_path / "state.pt", activation="quick_gelu").clip, clip)
    assert import_clip(tmp_path / "state.pt", activation="gelu").clip.config.activation == "gelu"
    with pytest.raises(ValueError, match="OpenAI's, all of which have quick_gelu, not gelu"):
        import_clip(script(openai_state(clip), tmp_path / "x.pt"), activation="gelu")
    folder = folder_of(tmp_path / "model")
    torch.save(openai_state(clip), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"open_clip_config\.json says gelu, but .* was given as quick_gelu"):
        import_clip(folder, activation="quick_gelu")


def changed(part: str, **values: object) -> dict[str, object]:
    config = json.loads(json.dumps(OPEN_CLIP_CONFIG))
    (config["model_cfg"] if part == "model_cfg" else config.get(part) or config["model_cfg"][part]).update(values)
    return config


OTHER_CLIPS = {
    "timm": (
        changed("vision_cfg", timm_model_name="vit_base"),
        "timm_model_name is 'vit_base': such a CLIP is not read",
    ),
    "CoCa": (changed("model_cfg", multimodal_cfg={"width": 4}), "multimodal_cfg is"),
    "SigLIP": (changed("model_cfg", init_logit_bias=-10), "init_logit_bias is -10"),
    "no mask": (changed("text_cfg", no_causal_mask=True), "no_causal_mask is True"),
    "tanh": (changed("text_cfg", act_kwargs={"approximate": "tanh"}), "act_kwargs is"),
    "words": (changed("text_cfg", hf_tokenizer_name="bert"), "hf_tokenizer_name is 'bert'"),
    "new": (changed("vision_cfg", swirl=3), "swirl is unknown here"),
    "fill": (changed("preprocess_cfg", fill_color=3), "another colour than black"),
    "resize": (
        changed("preprocess_cfg", resize_mode="tile"),
        "resize_mode is 'tile'; expected shortest or longest or sq",
    ),
    "mean": (changed("preprocess_cfg", mean=[1]), r"mean or std is \[1\]; expected three numbers"),
    "heads": (changed("vision_cfg", head_width=0), "head_width is 0; expected a whole number above 0"),
    "another": (changed("vision_cfg", width=64), "has vision_width 128, but .* says 64: it is of another model"),
    "wide heads": (changed("vision_cfg", head_width=500), "vision_heads is 0; it must be at least 1"),
    "text": (OPEN_CLIP_CONFIG | {"preprocess_cfg": "x"}, "has no preprocess_cfg: expected the configuration of a CLIP"),
    "half": ({"model_cfg": {}}, "has no vision_cfg"),
    "list": ([], "holds a list: expected a JSON object"),
}


@pytest.mark.parametrize("name", OTHER_CLIPS)
def test_a_clip_that_computes_otherwise_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    config, message = OTHER_CLIPS[name]
    folder = folder_of(tmp_path / "model", config)
    torch.save(openai_state(random_clip()), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        import_clip(folder)


def hugging_face_folder(folder: Path, processor: object) -> Path:
    """The two configurations of a CLIP of Hugging Face with pictures of 32 pixels; returns the model's."""
    config = {"model_type": "clip", "text_config": {}, "vision_config": {"image_size": 32}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_normalize": False}, "do_normalize is False: a CLIP without it"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": 0.5}, r"do_rescale is 0\.5"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor is 0\.0078.*; expected 1/255"),
        ({"size": 36}, "size is 36, but the model's pictures have 32"),
        ({"size": {"shortest_edge": 36}, "crop_size": 32}, "size is 36, but"),
        ({"size": 32, "crop_size": {"height": 28, "width": 28}}, "crop_size is 28, but"),
        ({"size": {"height": 32, "width": 48}}, r"size is .*; expected one side, in pixels"),
        ({"size": {"longest_edge": 32}}, r"size is .*; expected one side, in pixels"),
        ({"size": "large"}, "size is 'large'; expected a whole number above 0"),
    ],
)
def test_other_preprocessing_than_is_done_here_is_refused(tmp_path: Path, processor: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hugging_face_unseen(hugging_face_folder(tmp_path, processor))


@pytest.mark.parametrize(
    ("size", "resize"),
    [
        (32, "shortest"),
        ({"shortest_edge": 32}, "shortest"),
        ({"height": 32, "width": 32}, "squash"),
        (None, "shortest"),
    ],
)
def test_preprocessing_as_it_is_done_here_is_read(tmp_path: Path, size: object, resize: str) -> None:
    flags = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    processor = {**flags, "do_center_crop": None if resize == "squash" else True, "size": size, "crop_size": 32}
    unseen = hugging_face_unseen(hugging_face_folder(tmp_path, {**processor, "rescale_factor": 0.00392156862745098}))
    assert (unseen.resize, unseen.sizes["image_size"]) == (resize, 32)


def test_head_and_mlp_widths_and_the_view_come_from_the_files(tmp_path: Path) -> None:
    wanted = replace(
        TINY,
        vision_heads=4,
        vision_mlp=96,
        text_mlp=100,
        activation="gelu",
        resize="longest",
        interpolation="bilinear",
    )
    config = changed("vision_cfg", head_width=32, mlp_ratio=0.75)
    config["preprocess_cfg"] = {"resize_mode": "longest", "interpolation": "bilinear"}
    folder = folder_of(tmp_path / "model", config)
    torch.save(openai_state(random_clip(wanted)), folder / "open_clip_pytorch_model.bin")
    imported = import_clip(folder).clip
    assert imported.config == wanted
    same(imported, random_clip(wanted))


WRONG_STATES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "VQGAN": (
        lambda _: {"encoder.conv_in.weight": torch.ones(1), "quantize.embedding.weight": torch.ones(1)},
        "a VQGAN",
    ),
    "ruDALLE": (lambda _: {"transformer.layers.0.attention.query_key_value.weight": torch.ones(1)}, "ruDALLE's"),
    "SigLIP": (lambda state: {**state, "logit_bias": torch.ones(1)}, "it looks like a SigLIP"),
    "one half": (lambda _: {"vision_model.embeddings.class_embedding": torch.ones(1)}, "one half of a CLIP"),
    "unknown": (lambda _: {"a.b": torch.ones(1), "a.c": torch.ones(1)}, r"it holds a \(2\); expected a CLIP of OpenAI"),
    "nothing": (lambda _: {"epoch": 3}, "it holds no tensors"),
    "cut": (lambda state: {n: v for n, v in state.items() if n != "ln_final.bias"}, r"has no ln_final\.bias"),
    "more": (
        lambda state: {**state, "visual.extra": torch.ones(1)},
        r"1 weights that no plain CLIP has, visual\.extra",
    ),
    "sizes": (lambda state: {**state, "ln_final.bias": torch.ones(3)}, r"text\.norm_final\.bias has the shape \(3,\)"),
    "no square": (
        lambda state: {**state, "visual.positional_embedding": torch.ones(13, 128)},
        "13 positions of the image",
    ),
    "flat": (lambda state: {**state, "visual.conv1.weight": torch.ones(128)}, "has impossible sizes"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_another_model_and_other_sizes_are_named(tmp_path: Path, name: str) -> None:
    change, message = WRONG_STATES[name]
    vocabulary(tmp_path)
    torch.save(change(openai_state(random_clip())), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        import_clip(tmp_path / "x.pt", activation="gelu")


def test_the_merges_are_found_cut_to_the_model_and_checked(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    torch.save(openai_state(random_clip()), folder / "open_clip_pytorch_model.bin")
    expected = import_clip(folder).clip.tokenizer
    assert expected is not None
    assert expected.vocab_size == TINY.vocab_size
    list_ = folder / "bpe_simple_vocab_16e6.txt.gz"
    list_.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"needs the merges .* there is none of .* get https://github\.com/.* say --vocabulary FILE",
    ):
        import_clip(folder)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines))
    (folder / "vocab.json").write_text(json.dumps(expected.ids | {"<|endoftext|>": 1}))
    assert import_clip(folder).clip.tokenizer.to_json() == expected.to_json()  # type: ignore[union-attr]
    (folder / "vocab.json").write_text(json.dumps(expected.ids | {"red</w>": 1}))
    with pytest.raises(ValueError, match=r"gives 1 symbols other ids than merges\.txt does, 'red</w>' among them"):
        import_clip(folder)
    (folder / "merges.txt").write_text("\n".join(lines[:-2]))
    with pytest.raises(ValueError, match="has 5 merges, but the model needs 7"):
        import_clip(folder)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": [list(pair) for pair in MERGES]}}))
    found = import_clip(folder, vocabulary=tmp_path / "tokenizer.json").clip.tokenizer
    assert found is not None
    assert found.to_json() == expected.to_json()
    for data in (b"\x1f\x8bx", b"{}", b"a b c\nd e f"):
        (tmp_path / "bad.txt").write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.txt (is no list|has 0) .*merges"):
            import_clip(folder, vocabulary=tmp_path / "bad.txt")


def test_a_clip_that_names_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    torch.save({**openai_state(random_clip()), "z": Touch()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"would run code: it names (posix|nt)\.system"):
        import_clip(tmp_path / "x.pt", activation="gelu")
    assert not (tmp_path / "marker").exists()


def test_positions_of_another_grid_keep_the_first_row_and_what_is_smooth() -> None:
    line = torch.linspace(0, 1, 7)
    grid = torch.stack([line.expand(7, 7), line[:, None].expand(7, 7)], dim=-1).reshape(49, 2)
    positions = torch.cat([torch.tensor([[5.0, 6.0]]), grid])
    assert torch.equal(interpolated_positions(positions, 7), positions)
    larger = interpolated_positions(positions, 14)
    assert larger.shape == (197, 2)
    assert larger[0].tolist() == [5, 6]
    inside = larger[1:].reshape(14, 14, 2)[3:-3, 3:-3]
    steps = inside[:, 1:, 0] - inside[:, :-1, 0]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 12), atol=5e-3, rtol=0)


def test_another_image_size_is_imported_with_interpolated_positions(tmp_path: Path) -> None:
    clip = random_clip()
    vocabulary(tmp_path)
    file = script(openai_state(clip), tmp_path / "ViT.pt")
    imported = import_clip(file, image_size=48).clip
    assert imported.config.image_size == 48
    assert embed_images(imported, torch.rand(1, 3, 20, 60)).shape == (1, 24)
    with pytest.raises(ValueError, match=r"image_size \(50\) must be a multiple of patch_size"):
        import_clip(file, image_size=50)


def test_importing_holds_the_weights_once_and_one_tensor(
    tmp_path: Path, rise_of_memory: Callable[[Callable[[], object]], int]
) -> None:
    large = replace(
        TINY, vision_width=512, vision_heads=8, vision_layers=6, text_width=512, text_heads=8, text_layers=6
    )
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in openai_state(CLIP(large)).items()}
    vocabulary(tmp_path)
    torch.save({name: torch.ones(shape, dtype=torch.half) for name, shape in shapes.items()}, tmp_path / "x.pt")
    n_bytes = 4 * sum(shape.numel() for shape in shapes.values())
    assert n_bytes > 100 << 20
    kept: list[object] = []
    rise = rise_of_memory(lambda: kept.append(import_clip(tmp_path / "x.pt", activation="gelu")))
    # with the file of half that size, or with another copy, it would be more
    assert n_bytes * 0.9 < rise < n_bytes * 1.4


def published(name: str) -> CLIPConfig:
    """The sizes of OpenAI's nine, from the table of the CLIP paper (Radford et al. 2021, tables 19 and 20)."""
    sizes = {
        "ViT-B/32": {"patch_size": 32},
        "ViT-B/16": {"patch_size": 16},
        "ViT-L/14": {"patch_size": 14},
        "ViT-L/14@336px": {"patch_size": 14, "image_size": 336},
        "RN50": {"resnet": (3, 4, 6, 3), "embed_dim": 1024},
        "RN101": {"resnet": (3, 4, 23, 3), "embed_dim": 512},
        "RN50x4": {"resnet": (4, 6, 10, 6), "vision_width": 80, "image_size": 288, "text_width": 640, "embed_dim": 640},
        "RN50x16": {
            "resnet": (6, 8, 18, 8),
            "vision_width": 96,
            "image_size": 384,
            "text_width": 768,
            "embed_dim": 768,
        },
        "RN50x64": {
            "resnet": (3, 15, 36, 10),
            "vision_width": 128,
            "image_size": 448,
            "text_width": 1024,
            "embed_dim": 1024,
        },
    }[name]
    if "L/14" in name:
        sizes |= {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "text_width": 768, "embed_dim": 768}
    if "resnet" in sizes:
        width = sizes.setdefault("vision_width", 64)
        sizes |= {"vision_layers": sum(sizes["resnet"]), "vision_heads": width // 2}
    return CLIPConfig(**{**sizes, "text_heads": sizes.get("text_width", 512) // 64})


COUNTS = {
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_sizes_have_the_published_numbers_of_parameters(name: str) -> None:
    assert name in PUBLISHED.values()
    with torch.device("meta"):
        clip = CLIP(published(name))
    assert sum(parameter.numel() for parameter in clip.parameters()) == COUNTS[name]


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for i, size in enumerate([(40, 30), (32, 32), (90, 61), (17, 80)]):
        pixels = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def test_the_command_imports_a_clip_that_rank_and_search_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary(tmp_path)
    file, out = script(openai_state(random_clip()), tmp_path / "ViT.pt"), tmp_path / "clip"
    assert main(["import-clip", str(file), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    for line in (
        r"read: +.*ViT\.pt, TorchScript, sha256 [0-9a-f]{16}…",
        r"model: +CLIP, [\d,]+ parameters, 2 and 1 heads, pictures of 32 pixels, 16 positions of text",
        r"assumed: +quick_gelu; pictures: shortest, bicubic, mean 0\.4815/0\.4578/0\.4082, .*\(as all of OpenAI's\)",
        r"left: +.*input_resolution",
        r"licence: +MIT",
        r"CLIP [0-9a-f]{16} in .*clip",
    ):
        assert re.search(line, told), line
    folder = pictures(tmp_path / "pictures")
    assert main(["rank", "a red cat", str(folder), "--clip", str(out), "--json"]) == 0
    ranked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    clip = random_clip()
    for entry in ranked:
        image = Image.open(folder / Path(entry["picture"]).name)
        n, shorter = 32, min(image.size)
        image = image.resize([int(n * side / shorter) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - n) / 2) for side in image.size)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + n, top + n)))) / 255
        normalised = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        feature = clip.vision(normalised.permute(2, 0, 1)[None])[0].detach()
        text = embed_captions(clip, ["a red cat"])[0]
        assert entry["score"] == pytest.approx(float(feature @ text / feature.norm()), abs=2e-6)
    searched = ["search", "a red cat", str(folder), "--clip", str(out), "--json", "--out", str(tmp_path / "sheets")]
    assert main(searched) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in ranked], abs=1e-6)


@pytest.mark.parametrize("given", ["missing.pt", "."])
def test_the_command_says_in_a_line_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    assert main(["import-clip", str(tmp_path / given), "--out", str(tmp_path / "clip")]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "expected" in error


def test_a_resnet_scores_a_picture_alike_in_any_batch() -> None:
    config = replace(
        TINY, image_size=64, patch_size=32, resnet=(1, 1, 1, 1), vision_width=16, vision_layers=4, vision_heads=8
    )
    clip = random_clip(config)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(embed_images(clip, images)[:1], embed_images(clip, images[:1]))
    with pytest.raises(ValueError, match="four numbers that sum to vision_layers"):
        replace(config, resnet=(1, 2, 3, 4))


def test_a_bundle_ranks_by_an_imported_clip_and_a_png_has_its_candidates_score(
    bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary(tmp_path)
    file, out = script(openai_state(random_clip()), tmp_path / "ViT.pt"), tmp_path / "out"
    assert main(["import-clip", str(file), "--out", str(bundle_copy / "clip")]) == 0
    drawn = ["generate", "a red cat", "--bundle", str(bundle_copy), "-n", "4", "--keep", "4", "--out", str(out)]
    assert main(drawn) == 0
    scores = [json.loads(line)["score"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert scores == sorted(scores, reverse=True)
    capsys.readouterr()
    files = sorted(path for path in out.glob("*/*.png"))
    assert main(["rank", "a red cat", *map(str, files), "--bundle", str(bundle_copy), "--json"]) == 0
    ranked = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert ranked == pytest.approx(scores, abs=1e-6)
