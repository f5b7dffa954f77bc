"""DALL·E 2 whole: from captions and pictures to pictures."""

import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import with_random_weights
from torch import Tensor
from torch.nn import functional as F

from dalle.best_of_n import Ranked, Request
from dalle.unclip.components import Components
from dalle.unclip.cost import unet_bytes
from dalle.unclip.parts import kind_of
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing
from dalle.unclip.work import Work
from dvae.images import to_image
from rerank import CLIP, score
from storage.models.directory import directory_hash
from unclip import Decoder, Upsampler
from unclip.decoding import decode, invert, start_noise
from unclip.latents import monotone_path, slerp, slerp_noise, text_difference
from unclip.sampling import Noise
from unclip.unet import UNet, UNetConfig
from unclip.upsampler import UpsamplerConfig, upsample

CAPTION = "a red cube on a blue cube"
QUICK: dict[str, Any] = {"steps": 3, "prior_steps": 2, "upsampler_steps": 2}
DRAWING = Drawing(**QUICK)
Pictures = tuple[Image.Image, Image.Image]


def drawn_again(unclip: UnCLIP, picture: Image.Image) -> Tensor:
    """A picture's reconstruction from its embedding and its own noise, by the functions of the models alone."""
    seen, text = unclip.seen(picture), unclip.uncaptioned()
    start = invert(unclip.decoder, seen.pixels, seen.embedding, text, steps=3)
    noise = Noise.of(0, "", [0])
    return decode(unclip.decoder, seen.embedding, text, noise, start=start, steps=3, guidance=1)[0]


# captions


def test_a_candidate_is_the_same_in_any_batch_and_among_any_number(unclip: UnCLIP) -> None:
    whole = unclip.generate(CAPTION, n=5, keep=5, seed=3, **QUICK)
    assert whole.images.shape == (5, 3, 16, 16)
    assert sorted(whole.candidates) == list(range(5))
    assert whole.scores.tolist() == sorted(whole.scores.tolist(), reverse=True)
    for n, keep, batch_size in ((5, 2, 1), (5, 3, 2), (3, 3, 3)):
        some = unclip.generate(CAPTION, n=n, keep=keep, seed=3, batch_size=batch_size, **QUICK)
        order = [k for k in whole.candidates if k < n][:keep]
        assert list(some.candidates) == order
        rows = [whole.candidates.index(k) for k in order]
        torch.testing.assert_close(some.images, whole.images[rows], atol=2e-3, rtol=0)  # half of 1/255
        torch.testing.assert_close(some.scores, whole.scores[rows], atol=1e-5, rtol=0)
    other = unclip.generate(CAPTION, n=5, keep=5, seed=4, **QUICK)
    assert not torch.allclose(other.images[other.candidates.index(0)], whole.images[whole.candidates.index(0)])


def test_scores_are_clips_of_the_pictures_before_they_are_enlarged(unclip: UnCLIP, small_unclip: UnCLIP) -> None:
    small = small_unclip.generate(CAPTION, n=3, keep=2, **QUICK)
    large = unclip.generate(CAPTION, n=3, keep=2, **QUICK)
    assert small.images.shape == (2, 3, 8, 8)
    assert torch.equal(small.scores, large.scores)
    torch.testing.assert_close(small.scores, score(unclip.clip, [CAPTION], small.images)[0])
    noise = Noise.of(0, CAPTION, small.candidates)
    expected = upsample(unclip.upsamplers[0], small.images, noise, steps=2)
    torch.testing.assert_close(large.images, expected, atol=1e-5, rtol=0)
    assert large.described()[1] == {
        "rank": 2,
        "ranked_by": "clip",
        "score": float(large.scores[1]),
        "candidate": large.candidates[1],
    }


def test_the_caption_and_the_settings_reach_the_models(small_unclip: UnCLIP) -> None:
    def drawn(caption: str = CAPTION, **options: Any) -> Tensor:
        return small_unclip.generate(caption, n=1, keep=1, **{**QUICK, **options}).images

    first = drawn()
    assert torch.equal(first, drawn())
    for changed in (
        drawn("a green sphere"),
        drawn(guidance=1),
        drawn(prior_guidance=2),
        drawn(prior_candidates=1),
        drawn(prior_steps=3),
        drawn(steps=4),
        drawn(sampler="ddpm"),
    ):
        assert not torch.allclose(changed, first)


def test_progress_rises_to_the_number_of_pictures(editing_bundle: Path, pictures: Pictures) -> None:
    unclip = UnCLIP.load(editing_bundle)
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:9, 12:20] = True
    for draw, n in (
        (lambda told: unclip.generate(CAPTION, n=5, keep=2, prior_guidance=2, batch_size=2, progress=told, **QUICK), 5),
        (lambda told: unclip.edit(pictures[0], mask, CAPTION, n=2, keep=1, drawing=DRAWING, progress=told), 2),
        (lambda told: unclip.variations(pictures[0], n=3, drawing=DRAWING, batch_size=2, progress=told), 3),
        (lambda told: unclip.interpolate(*pictures, n=2, drawing=DRAWING, progress=told), 2),
        (lambda told: unclip.interpolate(*pictures, n=2, keep_ends=True, drawing=DRAWING, progress=told), 2),
        (lambda told: unclip.interpolate(*pictures, n=3, candidates=3, drawing=DRAWING, progress=told), 5),
        (lambda told: unclip.text_diff(pictures[0], CAPTION, "a", n=2, drawing=DRAWING, progress=told), 2),
    ):
        told: list[tuple[float, int]] = []
        draw(lambda done, total, told=told: told.append((done, total)))  # type: ignore[misc, no-untyped-call]
        assert all(before[0] < after[0] for before, after in itertools.pairwise(told))
        assert told[-1] == (pytest.approx(n), n)
        assert len(told) > 4


def test_as_many_are_drawn_at_once_as_fit_the_memory(unclip_bundle: Path) -> None:
    def sizes(memory: int | None, **how: Any) -> list[int]:
        models = UnCLIP.load(unclip_bundle, memory=memory)
        work = Work(models=models, drawing=DRAWING, guidance=3.0, drawn=40, enlarged=8, **how)
        return [len(some) for some in work.batches()]

    each = unet_bytes(UnCLIP.load(unclip_bundle).decoder.unet, 8)
    assert sizes(1) == [1] * 40
    assert sizes(20 * each) == [10] * 4  # with guidance, a picture is computed twice
    assert sizes(None) == [20, 20]
    assert sizes(1, batch_size=30) == [30, 10]
    assert max(sizes(20 * each, of_captions=True)) <= 10


def test_the_bytes_of_a_pass_are_about_what_it_takes(rise_of_memory: Callable[[Callable[[], object]], int]) -> None:
    config = UNetConfig(
        image_size=64, width=32, multiples=(1, 2), n_blocks=1, attention=(), middle_attention=False, dropout=0.0
    )
    unet, x = UNet(config).eval().requires_grad_(False), torch.zeros(16, 3, 64, 64)
    unet(x[:1], torch.zeros(1))
    taken = rise_of_memory(lambda: unet(x, torch.zeros(16)))
    assert 0.8 * taken < 16 * unet_bytes(unet, 64) < 3 * taken


# pictures


def test_without_new_noise_all_variations_are_the_picture_drawn_again(small_unclip: UnCLIP, pictures: Pictures) -> None:
    expected = drawn_again(small_unclip, pictures[0])
    same = small_unclip.variations(pictures[0], n=3, eta=0, drawing=DRAWING, batch_size=2)
    for image in same.images:
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
    varied = small_unclip.variations(pictures[0], n=3, eta=0.7, drawing=DRAWING)
    assert [said["candidate"] for said in varied.described()] == [0, 1, 2]
    distances = (varied.images - expected).abs().mean(dim=(1, 2, 3))
    assert distances.min() > 0.01
    assert not torch.allclose(varied.images[0], varied.images[1])
    again = small_unclip.variations(pictures[0], n=2, eta=0.7, drawing=DRAWING, batch_size=1)
    torch.testing.assert_close(again.images, varied.images[:2], atol=1e-4, rtol=0)
    less = small_unclip.variations(pictures[0], n=3, eta=0.1, drawing=DRAWING)
    assert ((less.images - expected).abs().mean(dim=(1, 2, 3)) < distances).all()


def test_the_inversion_gives_the_picture_back_where_nothing_is_clamped(
    small_unclip: UnCLIP, pictures: Pictures
) -> None:
    """Random networks predict far more than a picture holds, which the decoder clamps; so here they predict little."""
    unclip = UnCLIP(clip=small_unclip.clip, decoder=Decoder(small_unclip.decoder.config), hashes={})
    varied = unclip.variations(pictures[0], n=1, eta=0, drawing=Drawing(steps=10))
    pixels = unclip.seen(pictures[0]).pixels
    assert (varied.images - pixels).abs().max() < 0.02


def test_kept_ends_are_the_pictures_drawn_again(small_unclip: UnCLIP, pictures: Pictures) -> None:
    between = small_unclip.interpolate(*pictures, n=3, keep_ends=True, candidates=2, drawing=DRAWING)
    for place, picture in ((0, pictures[0]), (2, pictures[1])):
        torch.testing.assert_close(between.images[place], drawn_again(small_unclip, picture), atol=1e-4, rtol=0)
    assert [said["theta"] for said in between.described()] == [0, 0.5, 1]
    alone, backwards = (
        small_unclip.interpolate(*two, n=3, keep_ends=True, candidates=1, drawing=DRAWING)
        for two in (pictures, pictures[::-1])
    )
    torch.testing.assert_close(backwards.images.flip(0), alone.images, atol=1e-3, rtol=0)


def test_without_kept_ends_all_are_drawn_from_one_noise(small_unclip: UnCLIP, pictures: Pictures) -> None:
    between = small_unclip.interpolate(*pictures, n=3, candidates=1, seed=5, drawing=DRAWING)
    seen, text = [small_unclip.seen(picture) for picture in pictures], small_unclip.uncaptioned()
    middle = slerp(seen[0].embedding, seen[1].embedding, 0.5)
    expected = decode(small_unclip.decoder, middle, text, Noise.of(5, "", [0]), steps=3, guidance=3)[0]
    torch.testing.assert_close(between.images[1], expected, atol=1e-5, rtol=0)
    unlike = small_unclip.interpolate(*pictures, n=3, candidates=1, seed=6, drawing=DRAWING)
    assert not torch.allclose(unlike.images, between.images)


@pytest.mark.parametrize(("keep_ends", "seed"), [(False, 3), (True, 4)])
def test_of_the_candidates_between_the_one_that_leads_on_is_taken(
    keep_ends: bool, seed: int, small_unclip: UnCLIP, pictures: Pictures
) -> None:
    unclip, text = small_unclip, small_unclip.uncaptioned()
    how: dict[str, Any] = {"keep_ends": keep_ends, "seed": seed, "drawing": DRAWING}
    between = unclip.interpolate(*pictures, n=3, candidates=4, **how)
    alone = unclip.interpolate(*pictures, n=3, candidates=1, **how)
    assert [said["candidate"] for said in alone.described()] == [0, 0, 0]
    for end in (0, -1):
        torch.testing.assert_close(between.images[end], alone.images[end], atol=1e-5, rtol=0)

    seen = [unclip.seen(picture) for picture in pictures]
    wanted = torch.cat([slerp(seen[0].embedding, seen[1].embedding, theta) for theta in (0, 0.5, 1)])
    own = start_noise(unclip.decoder, Noise.of(seed, "", [0]))
    if keep_ends:
        own = slerp_noise(*(invert(unclip.decoder, s.pixels, s.embedding, text, steps=3) for s in seen), 0.5)
    others = start_noise(unclip.decoder, Noise.of(seed, "", [1 + 3 * k for k in (1, 2, 3)]), "decoder, candidate")
    starts = [own, *(slerp_noise(own, other[None], 0.5) for other in others)]
    guidance, noise = 1 if keep_ends else 3, Noise.of(seed, "", [0])
    drawn = [
        decode(unclip.decoder, wanted[1:2], text, noise, start=start, steps=3, guidance=guidance) for start in starts
    ]
    ends = [unclip.clip.encode_image(alone.images[place][None]) for place in (0, -1)]
    features = torch.cat([unclip.clip.encode_image(image) for image in drawn])
    [_, chosen, _] = monotone_path([ends[0], features, ends[1]], wanted)
    assert between.described()[1]["candidate"] == chosen == 2  # not the first
    torch.testing.assert_close(between.images[1], drawn[chosen][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(between.scores[1], F.cosine_similarity(features[chosen], wanted[1], dim=0))


def test_an_interpolation_is_the_same_in_any_batch(small_unclip: UnCLIP, pictures: Pictures) -> None:
    whole, parts = (
        small_unclip.interpolate(*pictures, n=5, candidates=4, batch_size=size, drawing=DRAWING) for size in (None, 3)
    )
    assert parts.each == whole.each
    torch.testing.assert_close(parts.images, whole.images, atol=1e-4, rtol=0)


def test_candidates_between_differ_by_ddpm_too(small_unclip: UnCLIP, pictures: Pictures) -> None:
    drawing = Drawing(steps=20, sampler="ddpm")
    drawn: list[Tensor] = []

    def keep(images: Tensor, **how: Any) -> Tensor:
        drawn.append(images)
        return CLIP.encode_image(small_unclip.clip, images, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_unclip.clip, "encode_image", keep)
        small_unclip.interpolate(*pictures, n=3, candidates=3, drawing=drawing)
    candidates = drawn[-1][1:4]  # of the one place between the ends
    assert all((a - b).abs().mean() > 0.01 for a, b in itertools.combinations(candidates, 2))


def test_a_text_difference_begins_with_the_picture_and_goes_to_the_other_caption(
    small_unclip: UnCLIP, pictures: Pictures
) -> None:
    before, after = "a red cube", "a green sphere"
    changed = small_unclip.text_diff(pictures[0], before, after, theta=0.5, n=3, drawing=DRAWING)
    assert changed.caption == after
    torch.testing.assert_close(changed.images[0], drawn_again(small_unclip, pictures[0]), atol=1e-5, rtol=0)
    still = small_unclip.text_diff(pictures[0], before, after, theta=0, n=2, drawing=DRAWING)
    for image in still.images:
        torch.testing.assert_close(image, drawn_again(small_unclip, pictures[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed.images[2], changed_by_hand(small_unclip, pictures[0], before, after, 0.5))


def changed_by_hand(unclip: UnCLIP, picture: Image.Image, before: str, after: str, theta: float) -> Tensor:
    """The last picture of a text difference."""
    seen, text = unclip.seen(picture), unclip.uncaptioned()
    direction = text_difference(unclip.captioned(before).features, unclip.captioned(after).features)
    embedding = slerp(seen.embedding, direction * seen.embedding.norm(), theta)
    torch.testing.assert_close(embedding.norm(), seen.embedding.norm())
    start = invert(unclip.decoder, seen.pixels, seen.embedding, text, steps=3)
    return decode(unclip.decoder, embedding, text, Noise.of(0, "", [0]), start=start, steps=3, guidance=1)[0]


def test_kept_pixels_of_an_edit_are_the_pictures_own(editing_bundle: Path, pictures: Pictures) -> None:
    unclip = UnCLIP.load(editing_bundle)
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:11, 9:17] = True
    edited = unclip.edit(pictures[0], mask, CAPTION, n=3, keep=2, drawing=DRAWING)
    is_new, pixels = edited.region.is_new, edited.region.pixels
    assert edited.images.shape == (2, 3, 16, 16)
    assert 0 < is_new.float().mean() < 0.5
    for image in edited.images:
        assert torch.equal(image[:, ~is_new], pixels[:, ~is_new])
        assert (image[:, is_new] - pixels[:, is_new]).abs().mean() > 0.05
    assert [said["seam"] for said in edited.described()] == edited.seams.tolist()
    alone = unclip.edit(pictures[0], mask, CAPTION, n=3, keep=2, drawing=DRAWING, batch_size=1)
    torch.testing.assert_close(alone.images, edited.images, atol=2e-3, rtol=0)
    elsewhere = unclip.edit(pictures[1], mask, CAPTION, n=3, keep=3, drawing=DRAWING)
    for k, image in zip(edited.candidates, edited.images, strict=True):
        other = elsewhere.images[elsewhere.candidates.index(k)]
        assert not torch.allclose(image[:, is_new], other[:, is_new], atol=1e-2)  # it heeds what is kept


def test_a_picture_is_probed_by_the_components_of_the_bundle(unclip_copy: Path, pictures: Pictures) -> None:
    unclip = UnCLIP.load(unclip_copy, size=8)
    with pytest.raises(FileNotFoundError, match=r"has no components: make it with `UnCLIP.principal_components`"):
        unclip.probe(pictures[0], [2])
    with pytest.raises(ValueError, match="principal components of 1 pictures: give at least 2"):
        unclip.principal_components(pictures[:1])
    drawn = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    unclip.principal_components(map(to_image, drawn)).save(unclip_copy / "components")
    again = UnCLIP.load(unclip_copy, size=8)
    assert set(again.hashes) == {"clip", "prior", "decoder", "components"}
    probed = again.probe(pictures[0], [0, 2, 8], seed=4, drawing=DRAWING)
    assert [said["dimensions"] for said in probed.described()] == [0, 2, 8]
    # of all of its components an embedding is rebuilt whole
    noise, text = Noise.of(4, "", [0]), again.uncaptioned()
    whole = decode(again.decoder, again.seen(pictures[0]).embedding, text, noise, steps=3)[0]
    torch.testing.assert_close(probed.images[2], whole, atol=1e-4, rtol=0)
    mean = again.probe(pictures[1], [0], seed=4, drawing=DRAWING)
    torch.testing.assert_close(mean.images[0], probed.images[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="9 components; expected 0 to 8"):
        again.probe(pictures[0], [9])
    Components.load(unclip_copy / "components").save(unclip_copy / "components", {"clip_hash": "0"})
    with pytest.raises(ValueError, match="are of another CLIP's embeddings: make them again"):
        UnCLIP.load(unclip_copy)


# published weights


def test_embeddings_that_are_not_of_unit_length_are_read_so(
    karlo_bundle: Path, pictures: Pictures, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        unclip = UnCLIP.load(karlo_bundle, size=8)
    for part in ("prior", "decoder"):
        assert f"the {part} does not say which CLIP it was trained with" in caplog.text
    seen = unclip.seen(pictures[0])
    assert abs(float(seen.embedding.norm()) - 1) > 0.01
    assert abs(float(unclip.captioned(CAPTION).features.norm()) - 1) > 0.01
    result = unclip.generate(CAPTION, n=2, keep=2, **QUICK)
    assert result.scores.abs().max() <= 1
    changed = unclip.text_diff(pictures[0], "a red cube", "a sphere", theta=0.5, n=2, drawing=DRAWING)
    torch.testing.assert_close(changed.images[1], changed_by_hand(unclip, pictures[0], "a red cube", "a sphere", 0.5))


def test_an_upsampler_with_a_last_network_takes_karlos_steps(unclip: UnCLIP) -> None:
    ours = unclip.upsamplers[0]
    karlos = Upsampler(UpsamplerConfig(**{**vars(ours.config), "has_last": True}))
    assert [Drawing().enlarging(ours, place) for place in (0, 1, 2)] == [(27, "ddim"), (15, "ddim"), (15, "ddim")]
    assert Drawing().enlarging(karlos, 0) == (7, "ddpm")
    assert Drawing(upsampler_steps=3).enlarging(karlos, 0) == (3, "ddpm")


def test_in_bf16_pictures_are_nearly_the_same(unclip_bundle: Path, small_unclip: UnCLIP) -> None:
    rough = UnCLIP.load(unclip_bundle, size=8, precision="bf16")
    assert next(rough.decoder.parameters()).dtype == torch.bfloat16
    exact, near = (one.generate(CAPTION, n=1, keep=1, guidance=1, **QUICK).images for one in (small_unclip, rough))
    assert near.dtype == torch.float32
    assert 0 < (exact - near).abs().mean() < 0.05


# refusals


def test_parts_that_do_not_belong_together_are_refused(unclip_copy: Path) -> None:
    decoder = Decoder.load(unclip_copy / "decoder")
    decoder.save(unclip_copy / "decoder", {"clip_hash": "0123456789abcdef"})
    held = directory_hash(unclip_copy / "clip")
    with pytest.raises(ValueError, match=rf"decoder was trained with the CLIP 0123456789abcdef, .* holds {held}"):
        UnCLIP.load(unclip_copy)
    shorter = Decoder(type(decoder.config)(**{**vars(decoder.config), "text_len": 12}))
    shorter.save(unclip_copy / "decoder")
    with pytest.raises(ValueError, match="decoder reads embeddings of 8, a text width of 16 and 12 positions"):
        UnCLIP.load(unclip_copy)
    raw = Decoder(type(decoder.config)(**{**vars(decoder.config), "normalised": False}))
    raw.save(unclip_copy / "decoder")
    with pytest.raises(ValueError, match=r"makes embeddings that are of unit length, its decoder reads .* not of unit"):
        UnCLIP.load(unclip_copy)


def test_upsamplers_must_follow_each_other(unclip_copy: Path) -> None:
    config = UpsamplerConfig(
        image_size=64, input_size=32, crop=32, width=32, multiples=(1,), n_blocks=1, dropout=0.0, prediction="v"
    )
    upsampler = Upsampler(config)
    upsampler.save(unclip_copy / "upsampler-64")
    with pytest.raises(ValueError, match=r"upsampler-64 of .* enlarges pictures of 32 pixels, but upsampler-16 makes"):
        UnCLIP.load(unclip_copy)
    assert UnCLIP.load(unclip_copy, size=16).image_size == 16
    assert UnCLIP.load(unclip_copy, size=8).image_size == 8
    with pytest.raises(ValueError, match=r"size is 48; .* it can be 8, 16, 64 pixels"):
        UnCLIP.load(unclip_copy, size=48)
    middle = UpsamplerConfig(**{**vars(config), "image_size": 32, "input_size": 16})
    with_random_weights(Upsampler(middle)).save(unclip_copy / "upsampler-32")
    chained = UnCLIP.load(unclip_copy)
    assert [each.config.image_size for each in chained.upsamplers] == [16, 32, 64]
    assert chained.generate(CAPTION, n=1, keep=1, **QUICK).images.shape == (1, 3, 64, 64)
    assert set(chained.hashes) == {"clip", "prior", "decoder", "upsampler-16", "upsampler-32", "upsampler-64"}
    (unclip_copy / "upsampler-64").rename(unclip_copy / "upsampler-large")
    with pytest.raises(ValueError, match="upsampler-large makes pictures of 64 pixels: rename it to upsampler-64"):
        UnCLIP.load(unclip_copy)


def test_missing_parts_are_named(unclip_copy: Path, pictures: Pictures) -> None:
    shutil.rmtree(unclip_copy / "prior")
    unclip = UnCLIP.load(unclip_copy, size=8)
    assert len(unclip.variations(pictures[0], n=1, drawing=DRAWING).images) == 1
    with pytest.raises(FileNotFoundError, match="has no prior: make it with `dalle-train prior`"):
        unclip.generate(CAPTION)
    shutil.rmtree(unclip_copy / "decoder")
    with pytest.raises(FileNotFoundError, match=r"no prior: make it with .*; and no decoder: make it with"):
        UnCLIP.load(unclip_copy)
    with pytest.raises(FileNotFoundError, match="no bundle at"):
        UnCLIP.load(unclip_copy / "nothing")


def test_the_kind_of_a_bundle_is_dalle_unless_it_has_dalle_2_alone(bundle: Path, unclip_copy: Path) -> None:
    assert kind_of(bundle) == "dalle"
    assert kind_of(unclip_copy) == "unclip"
    (unclip_copy / "dalle").mkdir()
    assert kind_of(unclip_copy) == "dalle"
    assert kind_of(unclip_copy, "unclip") == "unclip"
    assert kind_of(unclip_copy / "nothing") == "dalle"


def test_what_cannot_be_drawn_is_refused_in_words(unclip: UnCLIP, pictures: Pictures) -> None:
    picture, other = pictures
    nothing: Any = None
    for message, draw in {
        "the caption is empty": lambda: unclip.generate(" "),
        "keep is 5, but 4 candidates": lambda: unclip.generate(CAPTION, n=4, keep=5),
        "seed is None": lambda: unclip.generate(CAPTION, seed=nothing),
        "steps is 2000; expected a whole number from 1 to 1000": lambda: unclip.generate(CAPTION, steps=2000),
        "prior_steps is 0; it must be at least 1": lambda: unclip.generate(CAPTION, prior_steps=0),
        "guidance is -1; expected a number from 0 to 1000": lambda: unclip.generate(CAPTION, guidance=-1),
        "sampler is 'euler'; expected one of ddpm, ddim": lambda: Drawing(sampler="euler"),  # type: ignore[arg-type]
        "batch_size is 0": lambda: unclip.generate(CAPTION, batch_size=0),
        "DALL·E 2 draws them whole": lambda: unclip.best(Request(caption=CAPTION, early_abandon=True)),
        "eta is 2; expected a number from 0 to 1": lambda: unclip.variations(picture, eta=2),
        "theta is -1; expected a number from 0 to 1": lambda: unclip.text_diff(picture, "a", "b", theta=-1),
        "n is 1; it must be at least 2": lambda: unclip.interpolate(picture, other, n=1),
        "candidates is 0; it must be at least 1": lambda: unclip.interpolate(picture, other, candidates=0),
        "9 pictures of 100000000 candidates each are too many": lambda: unclip.interpolate(
            picture, other, candidates=10**8
        ),
        "only ddim draws a picture again": lambda: unclip.variations(picture, drawing=Drawing(sampler="ddpm")),
        "both captions have the same embedding": lambda: unclip.text_diff(picture, CAPTION, CAPTION),
        "picture is 'a.png', of type str": lambda: unclip.variations("a.png"),  # type: ignore[arg-type]
        "this decoder cannot edit: it has no channels": lambda: unclip.edit(picture, np.ones((20, 30), bool), CAPTION),
    }.items():
        with pytest.raises(ValueError, match=message):
            draw()


def test_an_edit_of_nothing_is_refused(editing_bundle: Path, pictures: Pictures) -> None:
    with pytest.raises(ValueError, match="the mask keeps the whole picture"):
        UnCLIP.load(editing_bundle).edit(pictures[0], np.zeros((20, 30), bool), CAPTION)


def test_a_result_says_in_short_what_it_is(unclip: UnCLIP, pictures: Pictures) -> None:
    result = unclip.generate(CAPTION, n=1, keep=1, **QUICK)
    assert type(result) is Ranked
    assert repr(result).startswith(f"Ranked(caption={CAPTION!r}, 1 of 16×16 pixels, scores ")
    series = unclip.interpolate(*pictures, n=2, drawing=DRAWING)
    assert repr(series) == "Series(2 of 16×16 pixels, theta 0, theta 1)"
