"""Imported CLIPs beside the packages that wrote them, with random weights; `make references` installs those."""

import copy
import gzip
import json
import random
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_files import MERGES, vocabulary
from references import reference
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from dalle.importers.clip import import_clip
from dalle.importers.clip_configs import open_clip_unseen
from rerank import CLIP, CLIPTokenizer
from rerank.score import embed_captions, embed_images

CAPTIONS = ["a red cat", "it's 12 cats &amp; a bird", "", "naïve ‘猫’", "running " * 20]
VOCAB_SIZE = 514 + len(MERGES)
IMAGES = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float() / 255


def with_random_weights(model: nn.Module) -> Any:
    """The same module with weights, biases and running statistics all of which matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if not weight.is_floating_point() or "mask" in name:
                continue
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
            drawn = torch.randn(weight.shape, generator=generator) * scale
            is_scale = weight.ndim == 1 and not name.endswith(("bias", "running_mean", "class_embedding"))
            weight.copy_(drawn.abs() + 0.5 if is_scale else drawn)
    return model.eval()


@torch.no_grad()
def assert_same(imported: CLIP, model: Any, *, hugging_face: bool = False) -> None:
    """Unit features of captions and pictures agree to 1e-5."""
    config, tokenizer = imported.config, imported.tokenizer
    assert tokenizer is not None
    ids = tokenizer.tokenize(CAPTIONS, config.context_length)
    images = IMAGES[:, :, : config.image_size, : config.image_size]
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.pixel_mean, config.pixel_std))
    pixels = (images - mean) / std
    if hugging_face:
        output = model(input_ids=ids, pixel_values=pixels)
        texts, features = output.text_embeds, output.image_embeds
    else:
        texts, features = model.encode_text(ids), model.encode_image(pixels)
    torch.testing.assert_close(embed_captions(imported, CAPTIONS), F.normalize(texts, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(embed_images(imported, images), F.normalize(features, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(imported.exp_logit_scale(), model.logit_scale.exp().clamp(max=100).reshape(()))


@pytest.mark.parametrize("vision", [2, (1, 2, 2, 1)], ids=["ViT", "ResNet"])
@pytest.mark.parametrize("half", [False, True])
def test_openais_models_compute_the_same(tmp_path: Path, vision: Any, half: bool) -> None:
    module = reference("clip.model")
    size, width = (64, 16) if isinstance(vision, tuple) else (32, 128)
    model = module.CLIP(24, size, vision, width, 8, 16, VOCAB_SIZE, 64, 1, 2)
    model = with_random_weights(model)
    if half:
        module.convert_weights(model)
    for name, value in (("input_resolution", size), ("context_length", 16), ("vocab_size", VOCAB_SIZE)):
        # they are numbers in the package, and tensors in the published files
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    traced = copy.deepcopy(model).float()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        ids = torch.randint(0, VOCAB_SIZE, (2, 16))
        script = torch.jit.trace(traced, (torch.rand(2, 3, size, size), ids))
    stored = dict(script.named_parameters())
    for name, value in model.named_parameters():
        stored[name].data = value.data.clone()
    script.save(str(tmp_path / "model.pt"))
    imported = import_clip(tmp_path / "model.pt", vocabulary=vocabulary(tmp_path)).clip
    assert imported.config.activation == "quick_gelu"
    assert_same(imported, model.float())


OPEN_CLIPS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "quick": {"quick_gelu": True},
    "heads": {"vision_cfg": {"head_width": 32, "mlp_ratio": 3.5}, "text_cfg": {"heads": 4, "mlp_ratio": 2.25}},
    "ResNet": {"vision_cfg": {"layers": [1, 2, 1, 1], "width": 16, "image_size": 64, "patch_size": None}},
    "text apart": {"custom_text": True},
}


@pytest.mark.parametrize("kind", OPEN_CLIPS)
@pytest.mark.parametrize("is_safe", [True, False])
def test_open_clips_models_compute_the_same(tmp_path: Path, kind: str, is_safe: bool) -> None:
    module = reference("open_clip.model")
    given = OPEN_CLIPS[kind]
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32} | given.get("vision_cfg", {})
    vision = {key: value for key, value in vision.items() if value is not None}
    text = {"context_length": 16, "vocab_size": VOCAB_SIZE, "width": 64, "heads": 1, "layers": 2}
    text |= given.get("text_cfg", {})
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": given.get("quick_gelu", False)}
    kind_of_model = module.CustomTextCLIP if given.get("custom_text") else module.CLIP
    model = with_random_weights(kind_of_model(**copy.deepcopy(config)))
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    vocabulary(tmp_path)
    if is_safe:
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    else:
        torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    imported = import_clip(tmp_path).clip
    assert imported.config.resize == "squash"
    assert_same(imported, model)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("is_old", [False, True])
def test_hugging_faces_folders_compute_the_same(tmp_path: Path, activation: str, is_old: bool) -> None:
    transformers = pytest.importorskip("transformers")
    both = {"hidden_act": activation, "num_hidden_layers": 2, "projection_dim": 24}
    text = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 16}
    text |= {
        "num_attention_heads": 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "bos_token_id": VOCAB_SIZE - 2,
        "pad_token_id": 1,
    }
    vision = {"hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=24)
    model = with_random_weights(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    if is_old:  # files of before 2023
        state = model.state_dict()
        state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
        written = json.loads((tmp_path / "config.json").read_text())
        written |= {"text_config_dict": written["text_config"], "vision_config_dict": written["vision_config"]}
        written["text_config"] = written["text_config"] | {"hidden_act": "gelu_new"}
        (tmp_path / "config.json").write_text(json.dumps(written))
    processor = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
        "size": {"shortest_edge": 32},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES)]))
    imported = import_clip(tmp_path).clip
    assert imported.config.activation == activation
    assert imported.config.vision_mlp == 300
    assert_same(imported, model, hugging_face=True)


def captions(n: int) -> list[str]:
    """Texts of all kinds, of characters that have a meaning in Unicode."""
    drawn = random.Random(0)
    words = ["It's", "DON'T", "a", "&amp;amp;", "<b>", "’s", "'ſ", "naïve", "â€™", "ΣΑΣ", "ﬁ", "2024", "½", "\x1c"]
    words += [
        "\u200b",
        "猫",
        "👩‍👩‍👧",
        "İ",
        "'LL",
        "ǅ",
        "we've",
        "&lt;p&gt;",
        "\u3000",
        "ᾳ",
        "🏳️‍🌈",
        "x" * 70,
        "α\u0345",
    ]
    ranges = [(32, 127), (32, 1500), (0x900, 0x1100), (0x2000, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1FA00)]
    texts = [""]
    while len(texts) < n:
        if len(texts) % 3:
            texts.append(" ".join(drawn.choices(words, k=drawn.randrange(1, 30))))
        else:
            letters = (chr(drawn.randrange(*drawn.choice(ranges))) for _ in range(drawn.randrange(1, 40)))
            texts.append("".join(letter for letter in letters if unicodedata.category(letter)[0] != "C"))
    return texts


@pytest.mark.parametrize("name", ["open_clip.tokenizer", "clip.simple_tokenizer"])
def test_the_published_tokenizers_give_the_same_ids(name: str) -> None:
    module = reference(name)
    path = Path(module.default_bpe())
    if not path.is_file():
        pytest.skip("the package is installed without its merges")
    theirs = module.SimpleTokenizer()
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:48895]
    ours = CLIPTokenizer.openai([(left, right) for left, right in map(str.split, lines)])
    assert ours.vocab_size == 49408
    different = [text for text in captions(600) if ours.encode(text) != theirs.encode(text)]
    assert not different
    assert ours.decode(ours.encode("A red  Cat, 12!")) == theirs.decode(theirs.encode("A red  Cat, 12!")).strip()
    if hasattr(theirs, "eot_token_id"):
        texts = captions(60)
        assert torch.equal(ours.tokenize(texts, 77), theirs(texts, 77))


def test_interpolated_positions_are_open_clips(tmp_path: Path) -> None:
    module = reference("open_clip.model")
    text = {"context_length": 16, "vocab_size": VOCAB_SIZE, "width": 64, "heads": 1, "layers": 1}
    models = [
        with_random_weights(
            module.CLIP(24, {"layers": 1, "width": 128, "patch_size": 8, "image_size": size}, dict(text))
        )
        for size in (32, 48)
    ]
    state = models[0].state_dict()
    torch.save(state, tmp_path / "x.pt")
    module.resize_pos_embed(state, models[1])
    models[1].load_state_dict(state)
    given = {"vocabulary": vocabulary(tmp_path), "activation": "gelu"}
    assert_same(import_clip(tmp_path / "x.pt", image_size=48, **given).clip, models[1])


def test_the_plain_configurations_of_open_clip_are_read_and_no_others() -> None:
    module = reference("open_clip.model")
    read, refused = [], []
    for path in sorted(Path(module.__file__).with_name("model_configs").glob("*.json")):
        try:
            open_clip_unseen(path)
            read.append(path.stem)
        except ValueError as error:
            assert "not read" in str(error)  # noqa: PT017
            refused.append(path.stem)
    assert len(read) == 41
    assert {"ViT-B-32", "ViT-L-14-336-quickgelu", "RN50x64", "ViT-bigG-14", "ViT-e-14"} <= set(read)
    assert {"coca_ViT-B-32", "ViT-B-16-SigLIP", "ViT-H-14-CLIPA", "convnext_base"} <= set(refused)
