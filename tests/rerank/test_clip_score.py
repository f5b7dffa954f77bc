import pytest
import torch

from dvae.images import to_image, to_tensor
from rerank import CLIP, CLIPConfig, CLIPTokenizer, score
from rerank.pixels import MAX_RESIZED_SIDE, View, clip_view, resized_pixels
from rerank.score import embed_captions, embed_images

CAPTIONS = ["a cat", "two dogs on a sofa", "红色的猫", "", "a very long caption about nothing in particular"]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    tokenizer = CLIPTokenizer.train(CAPTIONS, 300)
    torch.manual_seed(0)
    config = CLIPConfig(
        image_size=16,
        patch_size=8,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        context_length=12,
        vocab_size=tokenizer.vocab_size,
        text_width=16,
        text_layers=1,
        text_heads=2,
        embed_dim=8,
    )
    return CLIP(config, tokenizer)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(7, 3, 20, 26, generator=torch.Generator().manual_seed(0))


def test_a_score_is_the_cosine_of_one_caption_and_one_image(clip, images):
    scores = score(clip, CAPTIONS, images)
    assert scores.shape == (5, 7)
    assert scores.dtype == torch.float32
    for c, caption in enumerate(CAPTIONS):
        ids = clip.tokenizer.tokenize([caption], 12)
        for n in range(7):
            expected = torch.cosine_similarity(clip.text(ids), clip.encode_image(images[n : n + 1]))
            torch.testing.assert_close(scores[c, n], expected[0], atol=1e-5, rtol=0)


def test_scores_differ_between_captions_and_between_images(clip, images):
    scores = score(clip, CAPTIONS, images)
    assert scores.std(dim=0).min() > 1e-4
    assert scores.std(dim=1).min() > 1e-6


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_the_batch_size_does_not_change_the_scores(clip, images, batch_size):
    torch.testing.assert_close(
        score(clip, CAPTIONS, images, batch_size=batch_size), score(clip, CAPTIONS, images), atol=1e-6, rtol=0
    )


def test_cached_embeddings_give_the_same_scores(clip, images):
    features_CE, features_NE = embed_captions(clip, CAPTIONS), embed_images(clip, images)
    torch.testing.assert_close(features_CE.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(features_NE.norm(dim=1), torch.ones(7))
    assert (features_CE @ features_NE.T).equal(score(clip, CAPTIONS, images))


@pytest.mark.parametrize("side", [9, 16, 32, 53])
def test_the_view_of_a_picture_is_that_of_its_pixels(clip, side):
    image = to_image(torch.rand(3, side, side, generator=torch.Generator().manual_seed(side)))
    view = clip_view(image, View(16))
    assert view.shape == (3, 16, 16)
    assert view.min() >= 0
    assert view.max() <= 1
    assert embed_images(clip, view[None]).equal(embed_images(clip, to_tensor(image)[None]))


def test_the_view_is_the_centre_square_and_large_pictures_are_reduced_to_it():
    tall = torch.zeros(3, 60, 20)
    tall[:, 20:40] = 1
    assert clip_view(to_image(tall), View(16)).min() > 0.999
    smooth = torch.linspace(0, 1, 4 * MAX_RESIZED_SIDE).expand(3, 8, -1)
    large = to_image(smooth).resize((3 * MAX_RESIZED_SIDE + 1,) * 2)
    expected = resized_pixels(to_tensor(large.resize((512, 512)))[None], 16)[0]
    torch.testing.assert_close(clip_view(large, View(16)), expected, atol=0.01, rtol=0)


def test_scoring_modifies_no_input_and_keeps_no_graph(clip, images):
    captions, pixels = list(CAPTIONS), images.clone()
    weights = {name: value.clone() for name, value in clip.state_dict().items()}
    clip.train()
    scores = score(clip, captions, pixels)
    assert not scores.requires_grad
    assert clip.training
    assert captions == CAPTIONS
    assert pixels.equal(images)
    assert all(value.equal(weights[name]) for name, value in clip.state_dict().items())


def test_gradients_reach_the_pixels_when_features_are_asked_for_directly(clip, images):
    pixels = images.clone().requires_grad_()
    clip.encode_image(pixels)[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_what_cannot_be_scored_is_refused(clip, images):
    with pytest.raises(ValueError, match="no captions"):
        score(clip, [], images)
    with pytest.raises(ValueError, match="single string"):
        score(clip, "a cat", images)
    with pytest.raises(ValueError, match="no images"):
        score(clip, CAPTIONS, images[:0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        score(clip, CAPTIONS, images, batch_size=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        score(clip, CAPTIONS, 255 * images)
    with pytest.raises(ValueError, match="cannot read captions"):
        score(CLIP(clip.config), CAPTIONS, images)
