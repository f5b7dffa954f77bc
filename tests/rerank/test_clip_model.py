import copy
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dvae.images import to_image
from rerank import CLIP, CLIPConfig, CLIPTokenizer, score
from rerank.blocks import Block, LayerNorm, explicit_attention, fused_attention, quick_gelu
from rerank.loss import contrastive_loss
from rerank.model import MAX_LOGIT_SCALE
from rerank.pixels import PIXEL_MEAN, PIXEL_STD, View, clip_view, normalised_pixels
from storage.models.directory import as_written_before

COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.1, 0.2, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
CAPTIONS = [f"a {colour} square" for colour in COLOURS]
TINY = CLIPConfig(
    image_size=16,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    context_length=10,
    vocab_size=300,
    text_width=32,
    text_layers=2,
    text_heads=4,
    embed_dim=24,
)


def tiny_clip(seed: int = 0) -> CLIP:
    tokenizer = CLIPTokenizer.train(CAPTIONS, 300)
    torch.manual_seed(seed)
    return CLIP(replace(TINY, vocab_size=tokenizer.vocab_size), tokenizer)


def ids_of(clip: CLIP, captions: list[str]) -> torch.Tensor:
    return clip.tokenizer.tokenize(captions, clip.config.context_length)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_default_is_vit_b_32_with_the_published_parameter_count():
    with torch.device("meta"):
        clip = CLIP(CLIPConfig())
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313
    assert not list(clip.buffers())
    assert clip.device.type == "meta"


def test_quick_gelu_is_x_sigmoid_1702_x():
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_block_equals_pytorchs_pre_norm_encoder_layer(is_causal):
    torch.manual_seed(0)
    block = Block(32, 4, is_causal=is_causal)
    reference = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation=quick_gelu, norm_first=True, batch_first=True
    )
    names = {
        "self_attn.in_proj_weight": "attention.qkv.weight",
        "self_attn.in_proj_bias": "attention.qkv.bias",
        "self_attn.out_proj": "attention.out",
        "linear1": "mlp_in",
        "linear2": "mlp_out",
    }
    state = {}
    for key in reference.state_dict():
        ours = key
        for theirs, mine in names.items():
            ours = ours.replace(theirs, mine)
        state[key] = block.state_dict()[ours]
    reference.load_state_dict(state)
    h_BSD = rand(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if is_causal else None
    torch.testing.assert_close(block(h_BSD), reference(h_BSD, src_mask=mask), atol=1e-5, rtol=1e-5)


def with_distinct_norms(clip: CLIP) -> CLIP:
    with torch.no_grad():
        for module in clip.modules():
            if isinstance(module, LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return clip


def test_the_image_tower_is_class_token_pre_norm_blocks_post_norm_projection():
    vision = with_distinct_norms(tiny_clip()).vision
    pixels = rand(1, 3, 16, 16)
    tokens = [vision.class_embedding]
    for y in (0, 8):  # patches in reading order
        for x in (0, 8):
            patch = pixels[0, :, y : y + 8, x : x + 8]
            tokens.append((vision.patches.weight * patch).sum(dim=(1, 2, 3)))
    h_BSD = vision.norm_pre(torch.stack(tokens) + vision.position_embedding)[None]
    for block in vision.blocks:
        h_BSD = block(h_BSD)
    expected = vision.projection.weight @ vision.norm_post(h_BSD[0, 0])
    torch.testing.assert_close(vision(pixels)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_text_tower_is_embeddings_blocks_final_norm_projection_at_the_end_of_text():
    clip = with_distinct_norms(tiny_clip())
    text = clip.text
    ids = ids_of(clip, ["red"])[0].tolist()
    tokens = [text.token_embedding.weight[i] + text.position_embedding[s] for s, i in enumerate(ids)]
    h_BSD = torch.stack(tokens)[None]
    for block in text.blocks:
        h_BSD = block(h_BSD)
    expected = text.projection.weight @ text.norm_final(h_BSD[0, ids.index(clip.tokenizer.end_id)])
    torch.testing.assert_close(text(torch.tensor([ids]))[0], expected, atol=1e-5, rtol=1e-5)


def test_what_follows_the_end_of_text_has_no_effect_and_what_precedes_it_has():
    clip = tiny_clip()
    ids_BL = ids_of(clip, ["red", "red"])
    end = ids_BL[0].argmax().item()
    assert end < 7
    ids_BL[1, end + 1 :] = torch.tensor([5, clip.tokenizer.end_id, 250, 7, 9, 11, 3])[: 9 - end]
    features = clip.encode_text(ids_BL)
    assert features[0].equal(features[1])
    ids_BL[1, 1] += 1
    assert (clip.encode_text(ids_BL)[0] - clip.encode_text(ids_BL)[1]).abs().max() > 1e-3


def test_no_text_position_sees_a_later_one():
    clip = tiny_clip()
    h_BSD = rand(1, 10, 32).requires_grad_()
    out = h_BSD
    for block in clip.text.blocks:
        out = block(out)
    for position in range(10):
        (gradient,) = torch.autograd.grad(out[0, position].sum(), h_BSD, retain_graph=True)
        reached = gradient[0].abs().sum(dim=1) > 0
        assert reached.tolist() == [s <= position for s in range(10)]


def test_shorter_rows_of_ids_give_the_same_features():
    clip = tiny_clip()
    ids_BL = ids_of(clip, ["red"])
    end = ids_BL[0].argmax().item()
    torch.testing.assert_close(clip.encode_text(ids_BL[:, : end + 1]), clip.encode_text(ids_BL))


def test_states_of_all_positions_come_with_the_features_of_the_captions():
    clip = with_distinct_norms(tiny_clip()).eval()
    ids = ids_of(clip, CAPTIONS)
    told = clip.text_states(ids)
    assert torch.equal(told.features, clip.encode_text(ids))
    assert told.mask.sum(dim=1).tolist() == [min(10, len(clip.tokenizer.encode(caption)) + 2) for caption in CAPTIONS]
    ends = told.states[torch.arange(len(ids)), told.mask.sum(dim=1) - 1]
    plain = clip.text_states(ids, normalise=False)
    torch.testing.assert_close(clip.text.projection(ends), plain.features)
    assert torch.equal(plain.features, clip.text(ids))
    assert torch.equal(plain.states, told.states)
    images = rand(2, 3, 16, 16)
    raw = clip.encode_image(images, normalise=False)
    assert torch.equal(torch.nn.functional.normalize(raw, dim=-1), clip.encode_image(images))
    assert not torch.allclose(raw.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_float32_of_unit_length(dtype):
    clip = tiny_clip().to(dtype)
    image_features, text_features, scale = clip(rand(4, 3, 20, 31).to(dtype), ids_of(clip, CAPTIONS))
    for features in (image_features, text_features):
        assert features.dtype == torch.float32
        assert features.shape == (4, 24)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(1 / 0.07, rel=5e-3)


def test_layer_norm_computes_in_float32():
    norm = LayerNorm(64).bfloat16()
    x = (1000 + rand(3, 64)).bfloat16()
    expected = nn.functional.layer_norm(x.float(), (64,)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert norm(x).equal(expected)


def test_the_logit_scale_is_clipped_at_100_but_can_come_back():
    clip = tiny_clip()
    assert clip.exp_logit_scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        clip.logit_scale.fill_(6.0)
    assert clip.exp_logit_scale().item() == pytest.approx(MAX_LOGIT_SCALE)
    for sign, expected in ((-1.0, 0.0), (1.0, MAX_LOGIT_SCALE)):
        clip.logit_scale.grad = None
        (sign * clip.exp_logit_scale()).backward()  # descent on -scale would raise it
        assert clip.logit_scale.grad.item() == pytest.approx(expected)
    assert clip.logit_scale.item() == 6.0


def test_below_its_limit_the_logit_scale_has_the_gradient_of_exp():
    clip = tiny_clip()
    (-clip.exp_logit_scale()).backward()
    assert clip.logit_scale.grad.item() == pytest.approx(-1 / 0.07)


def test_the_loss_equals_a_sum_over_pairs_written_by_hand():
    image = nn.functional.normalize(rand(5, 8, seed=1) - 0.5, dim=1)
    text = nn.functional.normalize(rand(5, 8, seed=2) - 0.5, dim=1)
    scale, total = 7.0, 0.0
    for i in range(5):
        cosines_to_texts = [math.fsum((image[i] * text[j]).tolist()) for j in range(5)]
        cosines_to_images = [math.fsum((image[j] * text[i]).tolist()) for j in range(5)]
        for cosines in (cosines_to_texts, cosines_to_images):
            total -= math.log(math.exp(scale * cosines[i]) / sum(math.exp(scale * c) for c in cosines))
    assert contrastive_loss(image, text, torch.tensor(scale)).item() == pytest.approx(total / 10, rel=1e-5)


def unit(*shape, seed):
    return nn.functional.normalize(rand(*shape, seed=seed) - 0.5, dim=-1)


def test_wrong_captions_of_an_image_are_more_to_choose_from_for_it_alone():
    image, text, wrong = unit(5, 8, seed=1), unit(5, 8, seed=2), unit(5, 3, 8, seed=3)
    is_wrong = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]]).bool()
    scale, total = 7.0, 0.0
    for i in range(5):
        own = math.exp(scale * float(image[i] @ text[i]))
        texts = sum(math.exp(scale * float(image[i] @ text[j])) for j in range(5))
        texts += sum(math.exp(scale * float(image[i] @ wrong[i, m])) for m in range(3) if is_wrong[i, m])
        images = sum(math.exp(scale * float(image[j] @ text[i])) for j in range(5))
        total -= math.log(own / texts) + math.log(own / images)
    cosines = torch.einsum("be,bme->bm", image, wrong)
    loss = contrastive_loss(image, text, torch.tensor(scale), cosines, is_wrong)
    assert loss.item() == pytest.approx(total / 10, rel=1e-5)


def test_wrong_captions_that_are_masked_change_neither_loss_nor_gradient():
    gradients = []
    for is_given in (False, True):
        image = unit(4, 8, seed=1).requires_grad_()
        scale = torch.tensor(7.0, requires_grad=True)
        wrong = unit(4, 2, 8, seed=3).requires_grad_()
        cosines = torch.einsum("be,bme->bm", image, wrong)
        more = (cosines, torch.zeros(4, 2, dtype=torch.bool)) if is_given else ()
        loss = contrastive_loss(image, unit(4, 8, seed=2), scale, *more)
        loss.backward()
        gradients.append((loss.detach(), image.grad, scale.grad))
        assert wrong.grad is None or not wrong.grad.any()
    for without, masked in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, without)


def test_wrong_captions_without_their_mask_are_refused():
    image, text, scale = rand(4, 8, seed=1), rand(4, 8, seed=2), torch.tensor(1.0)
    for is_wrong in (None, torch.ones(4, 3, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="need an is_wrong of the same shape"):
            contrastive_loss(image, text, scale, torch.zeros(4, 2), is_wrong)


def test_the_loss_is_ln_b_when_all_features_are_equal_and_symmetric_in_the_two_sides():
    same = torch.ones(6, 4) / 2
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(6))
    image, text = rand(6, 4, seed=3), rand(6, 4, seed=4)
    scale = torch.tensor(3.0)
    torch.testing.assert_close(contrastive_loss(image, text, scale), contrastive_loss(text, image, scale))
    with pytest.raises(ValueError, match="same shape"):
        contrastive_loss(image, text[:5], scale)


def test_initial_weights_have_the_published_deviations():
    torch.manual_seed(0)
    config = replace(TINY, vision_width=128, text_width=96, vocab_size=2000, context_length=60, text_layers=3)
    clip = CLIP(config)
    text, vision = clip.text, clip.vision
    for weights, std in (
        (text.token_embedding.weight, 0.02),
        (text.position_embedding, 0.01),
        (text.projection.weight, 96**-0.5),
        (vision.projection.weight, 128**-0.5),
        (vision.position_embedding, 128**-0.5),
        (text.blocks[2].attention.qkv.weight, 96**-0.5),
        (text.blocks[0].attention.out.weight, 96**-0.5 * 6**-0.5),
        (text.blocks[1].mlp_out.weight, 96**-0.5 * 6**-0.5),
        (text.blocks[1].mlp_in.weight, (2 * 96) ** -0.5),
        (vision.blocks[0].attention.qkv.weight, (2 / (4 * 128)) ** 0.5),
    ):
        assert weights.std().item() == pytest.approx(std, rel=0.08)
    for block in (*text.blocks, *vision.blocks):
        assert not block.attention.qkv.bias.any()
        assert not block.attention.out.bias.any()


def test_only_the_embeddings_are_drawn_at_another_scale():
    clips = [CLIP(TINY)]
    clips.append(copy.deepcopy(clips[0]))
    for clip, scale in zip(clips, (1.0, 8.0), strict=True):
        torch.manual_seed(0)
        clip.initialise(embedding_scale=scale)
    for (name, plain), scaled in zip(clips[0].named_parameters(), clips[1].parameters(), strict=True):
        torch.testing.assert_close(scaled, 8 * plain if "embedding" in name else plain)
    with pytest.raises(ValueError, match="embedding_scale must be a number above 0, got 0"):
        clips[0].initialise(embedding_scale=0)


def pil_reference(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    """CLIP's own order, per channel in float: PIL's bicubic, clip, centre crop, mean and deviation."""
    _, height, width = image_CHW.shape
    resized = (size * width // min(height, width), size * height // min(height, width))
    planes = []
    for channel_HW, mean, std in zip(image_CHW, PIXEL_MEAN, PIXEL_STD, strict=True):
        plane = Image.fromarray(channel_HW.numpy(), mode="F").resize(resized, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in plane.size)
        pixels = np.asarray(plane).clip(0, 1)[top : top + size, left : left + size]
        planes.append((torch.tensor(pixels) - mean) / std)
    return torch.stack(planes)


@pytest.mark.parametrize("shape", [(40, 40), (16, 16), (53, 37), (20, 61), (7, 9), (1, 1)])
def test_pixels_are_prepared_as_pil_would(shape):
    images = rand(2, 3, *shape).round()  # black and white, so that bicubic overshoots
    pixels = normalised_pixels(images, View(16))
    assert pixels.shape == (2, 3, 16, 16)
    for image, prepared in zip(images, pixels, strict=True):
        torch.testing.assert_close(prepared, pil_reference(image, 16), atol=2e-5, rtol=1e-5)


def as_published(image: Image.Image, size: int, resize: str, interpolation: Image.Resampling) -> Image.Image:
    """What torchvision and open_clip make of a picture, step by step."""
    width, height = image.size
    if resize == "squash":
        return image.resize((size, size), interpolation)
    if resize == "longest":
        ratio = max(width, height) / size
        small = image.resize((round(width / ratio), round(height / ratio)), interpolation)
        square = Image.new("RGB", (size, size))
        square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
        return square
    if width < height:
        image = image.resize((size, int(size * height / width)), interpolation)
    else:
        image = image.resize((int(size * width / height), size), interpolation)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_published_clips_see_the_pixels_of_pillow_to_the_bit(resize, interpolation):
    view = View(24, resize, interpolation)
    for shape in [(40, 40), (24, 24), (53, 37), (20, 61), (9, 100), (8, 8), (301, 200), (25, 24)]:
        pixels = rand(3, *shape)
        image = to_image(pixels)
        expected = as_published(image, 24, resize, Image.Resampling[interpolation.upper()])
        found = clip_view(image, view)
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1).float() / 255)
        # a candidate has the score of its PNG
        mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
        assert torch.equal(normalised_pixels(pixels[None], view)[0], (found - mean) / std)
        assert torch.equal(normalised_pixels(found[None], view)[0], (found - mean) / std)


def test_a_strip_is_not_resized_as_a_whole():
    strip = to_image(rand(3, 8, 400))
    view = clip_view(strip, View(16, "shortest"))
    whole = as_published(strip, 16, "shortest", Image.Resampling.BICUBIC)
    assert (view * 255 - torch.from_numpy(np.array(whole)).permute(2, 0, 1)).abs().max() <= 1
    assert clip_view(Image.new("RGB", (4_000_000, 8)), View(224, "shortest")).shape == (3, 224, 224)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 16, 16),
        torch.zeros(1, 1, 16, 16),
        torch.zeros(1, 16, 16, 3),
        torch.zeros(0, 3, 16, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), 255.0),
        torch.full((1, 3, 16, 16), -0.01),
        torch.full((1, 3, 16, 16), float("nan")),
    ],
)
def test_images_of_another_shape_dtype_or_range_are_refused(images):
    with pytest.raises(ValueError, match=r"images .* expected .*\[0, 1\]"):
        tiny_clip().encode_image(images)


def test_ids_that_are_not_from_the_tokenizer_are_refused():
    clip = tiny_clip()
    good = ids_of(clip, ["red"])
    without_end = good.masked_fill(good == clip.tokenizer.end_id, 3)
    negative = good.masked_fill(good == clip.tokenizer.start_id, -1)
    too_high = good.masked_fill(good == clip.tokenizer.start_id, clip.config.vocab_size)
    for ids, words in (
        (without_end, "end-of-text"),
        (too_high, "end-of-text"),
        (negative, "end-of-text"),
        (good[0], "int64"),
        (good.int(), "int64"),
        (good[:0], "int64"),
        (torch.cat([good, good], dim=1), "at most 10"),
    ):
        with pytest.raises(ValueError, match=words):
            clip.encode_text(ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 7}, r"image_size \(16\) must be a multiple of patch_size \(7\)"),
        ({"text_heads": 5}, "text_heads"),
        ({"vision_heads": 3}, "vision_heads"),
        ({"activation": "relu"}, "activation is 'relu'; it must be one of quick_gelu, gelu"),
        ({"resize": "tile"}, "resize is 'tile'"),
        ({"pixel_std": (1, 1, 0)}, "pixel_mean and pixel_std must be three numbers"),
        ({"vision_mlp": 0}, "vision_mlp is 0"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"context_length": 2}, "context_length is 2"),
        ({"vocab_size": 2}, "vocab_size is 2"),
    ],
)
def test_a_config_that_cannot_work_does_not_construct(change, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


def test_a_tokenizer_of_another_size_is_refused():
    tokenizer = CLIPTokenizer.train(CAPTIONS, 270)
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} ids but vocab_size is 300"):
        CLIP(TINY, tokenizer)


def test_a_saved_clip_gives_equal_scores(tmp_path):
    clip = tiny_clip()
    images = rand(3, 3, 24, 16)
    clip.save(tmp_path / "clip", metadata={"steps": 5})
    loaded = CLIP.load(tmp_path / "clip")
    assert loaded.config == clip.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert score(loaded, CAPTIONS, images).equal(score(clip, CAPTIONS, images))


def test_a_directory_without_the_tokenizer_is_refused_by_name(tmp_path):
    tiny_clip().save(tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        CLIP.load(tmp_path / "clip")


def test_another_tokenizer_in_the_directory_is_refused_even_if_it_has_the_same_size(tmp_path):
    clip = tiny_clip()
    clip.save(tmp_path / "clip")
    other = CLIPTokenizer.train(["quiet zebras quack quietly"] * 9, clip.config.vocab_size)
    assert other.vocab_size == clip.config.vocab_size
    other.save(tmp_path / "clip" / "tokenizer.json")
    with pytest.raises(ValueError, match="not the tokenizer that was saved with this CLIP"):
        CLIP.load(tmp_path / "clip")


def test_a_clip_without_a_tokenizer_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        CLIP(TINY).save(tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


def test_a_tiny_clip_learns_to_tell_four_colours_apart():
    clip = tiny_clip()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    ids_BL = ids_of(clip, CAPTIONS)
    colours = torch.tensor(list(COLOURS.values()))[:, :, None, None]
    generator = torch.Generator().manual_seed(1)

    def noisy_squares() -> torch.Tensor:
        return (colours + 0.1 * torch.randn(4, 3, 16, 16, generator=generator)).clamp(0, 1)

    for _ in range(50):
        loss = contrastive_loss(*clip(noisy_squares(), ids_BL))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = score(clip, CAPTIONS, noisy_squares())
    assert scores.argmax(dim=1).tolist() == [0, 1, 2, 3]
    others = scores.masked_fill(torch.eye(4, dtype=torch.bool), -1)
    assert (scores.diagonal() - others.amax(dim=1)).min() > 0.2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_explicit_attention_is_fused_attention_forward_and_backward(
    is_causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 3, 7, 8, generator=generator).to(dtype) for _ in range(4))
    results = []
    for attend in (explicit_attention, fused_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attend(*inputs, is_causal=is_causal)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, upstream)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_what_was_added_to_the_configuration_changes_no_older_run():
    older = asdict(TINY)
    for name in (
        "vision_mlp",
        "text_mlp",
        "resnet",
        "activation",
        "pixel_mean",
        "pixel_std",
        "resize",
        "interpolation",
    ):
        older.pop(name)
    assert as_written_before(TINY) == older
    assert as_written_before(replace(TINY, activation="gelu")) == older | {"activation": "gelu"}
