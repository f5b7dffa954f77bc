"""What imported DALLE-pytorch models compute: a plain forward pass, the cache, the VAE, the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_pytorch_files import CASES, GRID, TEXT, VAE_PARAMS, T, V, file_of, plain_logits, vae_weights
from torch import Tensor
from torch.nn import functional as F

from dalle.family.dalle_pytorch.cache import DALLEPytorchDecoder
from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.family.losses import training_loss
from dalle.importers.dalle_pytorch.bundle import import_vae
from dalle.importers.dalle_pytorch.transformer import import_transformer
from dvae.discrete import DiscreteVAE
from storage.checkpoints.tensors import open_tensors

GENERATOR = torch.Generator().manual_seed(1)
CAPTIONS = [torch.randint(1, TEXT, (n,), generator=GENERATOR).tolist() for n in (5, T, 0, T + 4)]
IMAGES = torch.randint(0, V, (4, GRID**2), generator=GENERATOR)


def imported(path: Path, **options: Any) -> DALLEPytorch:
    return import_transformer(open_tensors(path), codec_vocab=V, codec_grid=GRID, **options).model


def raw(captions: list[list[int]]) -> Tensor:
    return torch.tensor([(ids + [0] * T)[:T] for ids in captions])


@pytest.mark.parametrize("name", CASES)
def test_a_file_computes_what_its_options_say(tmp_path: Path, name: str) -> None:
    path, content = file_of(tmp_path / "dalle.pt", **CASES[name])
    model = imported(path)
    expected = plain_logits(content, raw(CAPTIONS), IMAGES)
    with torch.no_grad():
        text_logits, image_logits = model(model.config.text_rows(CAPTIONS), IMAGES)
    n_text = model.config.n_text_ids
    torch.testing.assert_close(text_logits, expected[:, :T, :n_text], atol=1e-5, rtol=0)
    torch.testing.assert_close(image_logits, expected[:, T:, n_text:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n_known", [0, 1, 2, GRID + 3])
def test_decoding_with_a_cache_computes_the_same(tmp_path: Path, name: str, n_known: int) -> None:
    model = imported(file_of(tmp_path / "dalle.pt", **CASES[name])[0])
    text = model.config.text_rows(CAPTIONS[:2])
    images = IMAGES[[0, 0, 2, 3, 0]]
    images[:2, :n_known], images[2:, :n_known] = IMAGES[0, :n_known], IMAGES[1, :n_known]
    with torch.no_grad():
        _, expected = model(text[[0, 0, 1, 1, 1]], images)
    decoder = DALLEPytorchDecoder(model, text, [2, 3], IMAGES[:2, :n_known])
    kept = torch.arange(5)
    for i in range(n_known, GRID**2):
        if i == GRID + 8:
            kept = torch.tensor([1, 2, 4])
            decoder.keep(kept)
        assert decoder.position == i
        logits = decoder.step(images[kept, i - 1] if i else torch.full((5,), V))
        torch.testing.assert_close(logits, expected[kept, i], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="all 36 image tokens are decoded"):
        decoder.step(images[kept, -1])
    with pytest.raises(ValueError, match=r"\[0\] are not ascending candidates, at least one of each prompt"):
        decoder.keep(torch.tensor([0]))


def test_one_candidate_is_the_same_alone_and_among_64(tmp_path: Path) -> None:
    model = imported(file_of(tmp_path / "dalle.pt", **CASES["all kinds"])[0])
    text = model.config.text_rows(CAPTIONS[:1])
    images = torch.randint(0, V, (64, GRID**2), generator=torch.Generator().manual_seed(3))
    alone = DALLEPytorchDecoder(model, text, [1])
    among = DALLEPytorchDecoder(model, text, [64])
    for i in range(GRID**2):
        one = alone.step(images[7:8, i - 1])
        torch.testing.assert_close(one, among.step(images[:, i - 1])[7:8], atol=1e-5, rtol=0)


def test_a_model_is_the_same_after_it_was_saved(tmp_path: Path) -> None:
    for name in ("rotary and shift", "sparse", "shared"):
        model = imported(file_of(tmp_path / "dalle.pt", **CASES[name])[0])
        model.save(tmp_path / name, {"a": 1})
        loaded = DALLEPytorch.load(tmp_path / name)
        assert loaded.config == model.config
        assert loaded.metadata == {"a": 1}
        text = model.config.text_rows(CAPTIONS)
        with torch.no_grad():
            expected = model(text, IMAGES)[1]
            assert torch.equal(loaded(text, IMAGES)[1], expected)
            half = DALLEPytorchDecoder(loaded.bfloat16(), text, [1] * 4)
            half.step(IMAGES[:, 0])
            # angles in bfloat16 would be off by whole turns
            torch.testing.assert_close(half.step(IMAGES[:, 0]), expected[:, 1], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["all kinds", "one pad for all"])
def test_its_loss_counts_words_and_image_tokens(tmp_path: Path, name: str) -> None:
    path, content = file_of(tmp_path / "dalle.pt", **CASES[name])
    model = imported(path)
    loss = training_loss(model, model.config.text_rows(CAPTIONS), IMAGES)
    log_p = plain_logits(content, raw(CAPTIONS), IMAGES)
    n_text = model.config.n_text_ids
    words = [
        log_p[b, t, :n_text].log_softmax(-1)[ids[t]] for b, ids in enumerate(CAPTIONS) for t in range(min(T, len(ids)))
    ]
    image = log_p[:, T:, n_text:].log_softmax(-1).gather(2, IMAGES[:, :, None]).mean()
    assert loss.text is not None
    torch.testing.assert_close(loss.text, -torch.stack(words).mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.image, -image, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss.image_by_row.mean(), loss.image)


def test_id_0_is_the_pad_of_its_position_wherever_it_is() -> None:
    sizes = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_head": 8, "text_len": 4, "grid": 2, "text_vocab": 9}
    sizes |= {"image_vocab": 5, "kinds": ("full",), "attention_of_layer": (0,), "mlp_of_layer": (0,)}
    config = DALLEPytorchConfig(**sizes)  # type: ignore[arg-type]
    assert config.text_rows([[3, 0, 2], [1, 2, 3, 4, 5]]).tolist() == [[3, 10, 2, 12], [1, 2, 3, 4]]
    assert config.null_caption().tolist() == [9, 10, 11, 12]
    assert (config.n_text_ids, config.max_caption) == (13, 4)
    old = DALLEPytorchConfig(**sizes, has_own_pads=False)  # type: ignore[arg-type]
    assert old.text_rows([[3, 0, 2]]).tolist() == [[3, 0, 2, 0]]


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "kinds": ({"kinds": ("full",)}, "kinds has 1 entries for 2 layers"),
    "unknown": ({"kinds": ("full", "dense")}, "unknown attention 'dense'"),
    "order": ({"mlp_of_layer": (1, 0)}, r"mlp_of_layer is \(1, 0\)"),
    "mixed": ({"attention_of_layer": (0, 0), "kinds": ("full", "axial_row")}, "layers of different attention share"),
    "rotary": ({"rotary": 12}, r"rotary \(12\) must be even and at most d_head \(8\)"),
    "blocks": ({"kinds": ("full", "sparse")}, r"a sequence \(8\) of whole blocks of 16"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_that_do_not_go_together_are_refused(name: str) -> None:
    sizes = {"n_layers": 2, "d_model": 8, "n_heads": 1, "d_head": 8, "text_len": 4, "grid": 2, "text_vocab": 9}
    sizes |= {"image_vocab": 5, "kinds": ("full", "full"), "attention_of_layer": (0, 1), "mlp_of_layer": (0, 1)}
    changed, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        DALLEPytorchConfig(**(sizes | changed))


def test_its_vae_computes_what_its_layers_say(tmp_path: Path) -> None:
    w = vae_weights()
    torch.save({"hparams": VAE_PARAMS, "weights": w}, tmp_path / "vae.pt")
    found = import_vae(tmp_path / "vae.pt")
    assert found.left == []
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(2))

    def block(x: Tensor, name: str) -> Tensor:
        y = x
        for i in (0, 2, 4):
            y = F.conv2d(
                y if i == 0 else y.relu(), w[f"{name}.net.{i}.weight"], w[f"{name}.net.{i}.bias"], padding=int(i < 4)
            )
        return x + y

    x = images * 2 - 1
    for i in (0, 1):
        x = F.conv2d(x, w[f"encoder.{i}.0.weight"], w[f"encoder.{i}.0.bias"], stride=2, padding=1).relu()
    tokens = F.conv2d(block(x, "encoder.2"), w["encoder.3.weight"], w["encoder.3.bias"]).argmax(1)
    assert torch.equal(found.codec.codec.encode(images), tokens)
    assert len(tokens.unique()) > 5
    x = w["codebook.weight"][tokens].permute(0, 3, 1, 2)
    x = block(F.conv2d(x, w["decoder.0.weight"], w["decoder.0.bias"]), "decoder.1")
    for i in (2, 3):
        x = F.conv_transpose2d(x, w[f"decoder.{i}.0.weight"], w[f"decoder.{i}.0.bias"], stride=2, padding=1).relu()
    pixels = F.conv2d(x, w["decoder.4.weight"], w["decoder.4.bias"])
    torch.testing.assert_close(found.codec.codec.decode(tokens), (pixels / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


def test_a_vae_without_blocks_is_read_and_saved(tmp_path: Path) -> None:
    params = VAE_PARAMS | {"num_resnet_blocks": 0, "num_layers": 3}
    torch.save({"hparams": params, "weights": vae_weights(**params)}, tmp_path / "vae.pt")
    vae = import_vae(tmp_path / "vae.pt").codec.codec
    vae.save(tmp_path / "dvae")
    loaded = DiscreteVAE.load(tmp_path / "dvae")
    images = torch.rand(1, 3, 24, 24)
    assert vae.encode(images).shape == (1, 3, 3)
    assert torch.equal(loaded.decode(vae.encode(images)), vae.decode(vae.encode(images)))
    assert vae.codebook.shape == (V, 12)
    assert vae.decoding_products(3) > 0
