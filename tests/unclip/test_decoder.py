from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_weights import with_random_weights
from torch import Tensor
from torch.nn import functional as F

from unclip.conditions import Text
from unclip.decoder import Decoder, DecoderConfig, Known
from unclip.decoding import NOTHING_KNOWN, decode, decoder_loss, invert, known_regions, loss_by_quarter
from unclip.sampling import Noise, Predictor, sample, signed, unsigned

TINY = DecoderConfig(
    image_size=8,
    width=32,
    multiples=(1, 2),
    n_blocks=1,
    attention=(1,),
    head_width=16,
    context_width=16,
    dropout=0.0,
    embed_dim=8,
    text_width=12,
    text_len=6,
    prediction="v",
    scale=1.5,
)


def tiny(config: DecoderConfig = TINY) -> Decoder:
    torch.manual_seed(0)
    return with_random_weights(Decoder(config))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_text(count: int = 2, seed: int = 0) -> Text:
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:count, None]
    return Text(F.normalize(normal(count, 8, seed=seed), dim=-1), normal(count, 5, 12, seed=seed + 1), mask)


def embeddings(count: int = 2, seed: int = 5) -> Tensor:
    return F.normalize(normal(count, 8, seed=seed), dim=-1)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_an_embedding_is_told_twice_and_its_null_stands_in_both_places() -> None:
    decoder, text, given = tiny(), some_text(), embeddings()
    nothing, first = torch.tensor([False, False]), torch.tensor([True, False])
    told = decoder.conditions(given, text)
    assert told.context.shape == (2, 4 + 5, 16)
    assert torch.equal(told.mask[1], torch.tensor([True] * 6 + [False] * 3))
    without = decoder.conditions(given, text, first, nothing)
    assert not torch.allclose(without.embedding[0], told.embedding[0])
    assert not torch.allclose(without.context[0, :4], told.context[0, :4])
    assert torch.equal(without.context[0, 4:], told.context[0, 4:])
    assert torch.equal(without.context[1], told.context[1])
    other = decoder.conditions(embeddings(seed=9), text, first, nothing)
    assert torch.equal(other.context[0], without.context[0])
    assert torch.equal(other.embedding[0], without.embedding[0])
    no_text = decoder.conditions(given, text, nothing, first)
    assert torch.equal(no_text.context[0, :4], told.context[0, :4])
    assert not torch.allclose(no_text.context[0, 4:], told.context[0, 4:])
    assert torch.equal(no_text.mask[0], torch.tensor([True] * 5 + [False] * 4))
    assert not torch.allclose(no_text.embedding[0], told.embedding[0])
    torch.testing.assert_close(
        decoder.conditions(given * 2, text).embedding - decoder.text_time(text.features),
        decoder.image_time(given * 3),  # twice the embedding, at a scale of 1.5
    )


def test_the_loss_leaves_out_embeddings_and_captions_by_row_and_each_on_its_own() -> None:
    decoder, text, given = tiny(), some_text(4), embeddings(4)
    loss, metrics = decoder_loss(decoder, images(4), given, text, seed=1)
    assert torch.equal(loss, decoder_loss(decoder, images(4), given, text, seed=1)[0])
    assert loss != decoder_loss(decoder, images(4), given, text, seed=2)[0]
    assert {name: tuple(value.shape) for name, value in metrics.items()} == {"mse": (4,), "vb": (4,), "t": (4,)}

    def parts(no_image: float, no_text: float, given: Tensor = given, text: Text = text) -> Tensor:
        _, metrics = decoder_loss(decoder, images(4), given, text, seed=1, no_image=no_image, no_text=no_text)
        return metrics["mse"]

    other, other_text = embeddings(4, seed=8), some_text(4, seed=20)
    assert torch.equal(parts(1, 0), parts(1, 0, given=other))
    assert torch.equal(parts(0, 1), parts(0, 1, text=other_text))
    assert torch.equal(parts(1, 1), parts(1, 1, given=other, text=other_text))
    assert not torch.equal(parts(0, 1), parts(0, 1, given=other))
    # half of the captions are left out, whichever embeddings are
    changed = torch.stack([parts(0, 0.5, text=other_text) != parts(0, 0.5)])
    assert 0 < changed.sum() < 4


def test_losses_are_told_by_quarter_of_the_noise() -> None:
    t = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    batches = [loss_by_quarter((1 + (part * 4).long()).float(), part) for part in t.split(4)]
    torch.testing.assert_close(torch.stack(batches).mean(dim=0), torch.tensor([1.0, 2.0, 3.0, 4.0]), atol=0.15, rtol=0)
    assert torch.equal(
        loss_by_quarter(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.99])), torch.tensor([2.0, 0, 0, 6])
    )


def test_a_picture_depends_on_neither_the_batch_nor_its_other_rows() -> None:
    decoder, text, given = tiny(), some_text(3), embeddings(3)
    noise = Noise.of(0, "a", [0]) + Noise.of(0, "b", [0, 1])
    settings = {"steps": 4, "sampler": "ddim", "eta": 0.5, "guidance": 2.0}
    together = decode(decoder, given, text, noise, **settings)  # type: ignore[arg-type]
    one = Text(*(tensor[2:] for tensor in text))
    alone = decode(decoder, given[2:], one, Noise.of(0, "b", [1]), **settings)  # type: ignore[arg-type]
    assert together.shape == (3, 3, 8, 8)
    assert 0 <= together.min() < together.max() <= 1
    torch.testing.assert_close(alone[0], together[2], atol=1e-4, rtol=0)
    other = decode(decoder, given, text, Noise.of(1, "b", range(3)), **settings)  # type: ignore[arg-type]
    assert not torch.allclose(other, together, atol=1e-2)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_1_is_no_guidance_bit_for_bit_and_0_is_no_condition(sampler: str) -> None:
    decoder, text, given, noise = tiny(), some_text(), embeddings(), Noise.of(0, "", range(2))

    def drawn(guidance: float, given: Tensor = given, text: Text = text) -> Tensor:
        return decode(decoder, given, text, noise, steps=3, sampler=sampler, guidance=guidance)  # type: ignore[arg-type]

    plain = Predictor(
        network=lambda x, timesteps: decoder(x, timesteps, given, text),
        prediction="v",
        process=decoder.process.respaced(3),
        clamp=1.0,
    )
    start = noise.normal("decoder, start", [3, 8, 8])
    expected = sample(
        plain,
        start,
        lambda step: noise.normal(f"decoder, step {step}", [3, 8, 8]),
        sampler=sampler,  # type: ignore[arg-type]
    )
    assert torch.equal(drawn(1.0), unsigned(expected))
    if sampler == "ddim":  # the conditional variance stays
        other = drawn(0.0, embeddings(seed=8), some_text(seed=20))
        torch.testing.assert_close(drawn(0.0), other, atol=1e-5, rtol=0)
    assert not torch.allclose(drawn(3.0), drawn(1.0), atol=1e-3)


@pytest.mark.slow
def test_decoding_what_was_inverted_gives_the_picture_back() -> None:
    # weights that are all random make no denoiser; a few steps of training do
    torch.manual_seed(0)
    decoder, text, given = Decoder(replace(TINY, out_channels=3)), some_text(), embeddings()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for step in range(12):
        many = Text(*(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in text))
        optimizer.zero_grad()
        decoder_loss(decoder, images().repeat(2, 1, 1, 1), given.repeat(2, 1), many, seed=step)[0].backward()
        optimizer.step()
    decoder.eval()
    noise = Noise.of(0, "", range(2))
    errors = []
    for corrections in (0, 3):
        start = invert(decoder, images(), given, text, steps=6, corrections=corrections)
        assert start.shape == (2, 3, 8, 8)
        again = decode(decoder, given, text, noise, start=start, steps=6, guidance=1.0)
        errors.append(float((again - images()).square().mean()))
    assert errors[1] < errors[0]
    assert errors[1] < 1e-3
    varied = decode(decoder, given, text, noise, start=start, steps=6, guidance=1.0, eta=1.0)
    assert float((varied - images()).square().mean()) > 10 * errors[1]


def test_inpainting_begins_as_the_decoder_it_was_made_of_and_keeps_known_pixels() -> None:
    decoder, text, given = tiny(), some_text(), embeddings()
    inpainting = decoder.inpainting()
    assert inpainting.config.inpaints
    x, timesteps = normal(2, 3, 8, 8), torch.tensor([3, 900])
    mask = torch.ones(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 0
    known = Known(signed(images()), mask)
    expected = decoder(x, timesteps, given, text)
    torch.testing.assert_close(inpainting(x, timesteps, given, text, known=known), expected, atol=1e-6, rtol=1e-5)
    trained = with_random_weights(inpainting)
    assert not torch.allclose(trained(x, timesteps, given, text, known=known), trained(x, timesteps, given, text))
    hidden = known._replace(x0=torch.where(mask == 0, 9.0, known.x0))
    assert torch.equal(
        trained(x, timesteps, given, text, known=hidden), trained(x, timesteps, given, text, known=known)
    )
    drawn = decode(trained, given, text, Noise.of(0, "", range(2)), steps=3, known=known)
    kept = (drawn - images()).abs().amax(dim=1, keepdim=True) < 1e-6
    assert torch.equal(kept.float(), mask)
    loss, _ = decoder_loss(trained, images(), given, text, seed=0)
    assert loss.isfinite()
    with pytest.raises(ValueError, match="does not inpaint"):
        decoder(x, timesteps, given, text, known=known)
    with pytest.raises(ValueError, match="inpaints already"):
        inpainting.inpainting()


def test_of_most_pictures_a_rectangle_is_unknown_and_of_some_all() -> None:
    masks = known_regions(torch.Size([400, 3, 8, 12]), torch.Generator().manual_seed(0))
    assert masks.shape == (400, 1, 8, 12)
    unknown = (1 - masks).sum(dim=(1, 2, 3))
    assert float((unknown == 96).float().mean()) == pytest.approx(NOTHING_KNOWN, abs=0.07)
    assert (unknown >= 6).all()
    for mask in 1 - masks[:, 0]:
        rows, columns = mask.amax(dim=1), mask.amax(dim=0)
        assert torch.equal(torch.outer(rows, columns), mask)
        assert int(rows.diff().abs().sum()) <= 2
        assert int(columns.diff().abs().sum()) <= 2


def test_pixels_are_noised_in_signed_form() -> None:
    assert torch.equal(signed(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.equal(unsigned(torch.tensor([-2.0, 0.0, 1.5])), torch.tensor([0.0, 0.5, 1.0]))


def test_a_saved_decoder_is_the_same_and_wrong_conditions_are_refused(tmp_path: Path) -> None:
    decoder, text, given = tiny(), some_text(), embeddings()
    decoder.save(tmp_path / "decoder", {"clip_hash": "0"})
    loaded = Decoder.load(tmp_path / "decoder")
    assert loaded.config == TINY
    x, timesteps = normal(2, 3, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(loaded(x, timesteps, given, text), decoder(x, timesteps, given, text))
    with pytest.raises(ValueError, match="one for each caption"):
        loaded(x, timesteps, given[:1], text)
    with pytest.raises(ValueError, match="1 rows of noise for 2"):
        decode(loaded, given, text, Noise.of(0, "", [0]))


@pytest.mark.parametrize(
    "wrong", [{"in_channels": 4}, {"out_channels": 5}, {"prediction": "x"}, {"scale": 0.0}, {"context_width": 0}]
)
def test_impossible_decoders_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(TINY, **wrong)  # type: ignore[arg-type]


# ---- codes ------------------------------------------------------------------------------------------------


class Greys:
    """A codec of eight greys, of which each stands for 2×2 pixels."""

    greys = torch.linspace(0, 1, 8)

    def encode(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images.mean(dim=1, keepdim=True), 2)
        return (means - self.greys[:, None, None]).abs().argmin(dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.greys[tokens][:, None].expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)


CODES = replace(TINY, image_size=4, codes=8, code_side=2, in_channels=7, out_channels=3)


def of_codes(config: DecoderConfig = CODES) -> Decoder:
    decoder = tiny(config)
    decoder.vectors.copy_(normal(8, 3, seed=8))
    decoder.use_codec(Greys())
    return decoder.eval()


def test_codes_are_the_vectors_of_tokens_and_come_back_as_the_codecs_pictures() -> None:
    decoder, pictures = of_codes(), images()
    tokens = Greys().encode(pictures)
    x0 = decoder.encoded(pictures)
    assert decoder.config.picture_size == 8
    assert x0.shape == (2, 3, 4, 4)
    assert torch.equal(x0[1, :, 2, 3], decoder.vectors[tokens[1, 2, 3]])
    assert torch.equal(decoder.pictures(x0 + 0.01 * normal(2, 3, 4, 4)), Greys().decode(tokens))


def test_a_decoder_of_codes_trains_and_draws_pictures_that_the_codec_makes() -> None:
    decoder, text, given = of_codes().requires_grad_(True), some_text(), embeddings()
    loss, parts = decoder_loss(decoder, images(), given, text, 0)
    loss.backward()
    assert parts["mse"].shape == (2,)
    assert all(weight.grad is not None for weight in decoder.unet.parameters())
    drawn = decode(decoder, given, text, Noise.of(0, "", range(2)), steps=4)
    assert torch.equal(drawn, Greys().decode(Greys().encode(drawn)))


@pytest.mark.slow
def test_a_picture_of_codes_is_drawn_again_exactly_from_its_own_noise() -> None:
    decoder, text, given = of_codes(replace(CODES, in_channels=3)), some_text(), embeddings()
    pictures = Greys().decode(Greys().encode(images()))
    start = invert(decoder, pictures, given, text, steps=20, corrections=8)
    drawn = decode(decoder, given, text, Noise.of(0, "", range(2)), start=start, steps=20, guidance=1)
    assert torch.equal(drawn, pictures)


def test_a_code_is_known_only_where_all_its_pixels_are() -> None:
    decoder, pictures = of_codes(), images(1)
    is_known = torch.ones(1, 8, 8, dtype=torch.bool)
    is_known[0, 2, 5] = False
    known = decoder.known(pictures, is_known)
    assert known.mask.shape == (1, 1, 4, 4)
    assert known.mask.sum() == 15
    assert known.mask[0, 0, 1, 2] == 0
    drawn = decode(decoder, embeddings(1), some_text(1), Noise.of(0, "", [0]), steps=4, known=known)
    kept, asked = (Greys().encode(each)[0] for each in (drawn, pictures))
    assert torch.equal(kept[known.mask[0, 0] == 1], asked[known.mask[0, 0] == 1])


def test_more_noise_is_drawn_with_a_shift_and_all_of_it_without() -> None:
    decoder, text, given = of_codes(), some_text(), embeddings()
    seen: list[Tensor] = []
    decoder.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for shift in (1.0, 3.0):
        for seed in range(40):
            decoder_loss(decoder, images(), given, text, seed, noise_shift=shift)
    plain, shifted = (torch.cat(seen[first : first + 40]) for first in (0, 40))
    t = (plain + 0.5) / 1000
    assert torch.equal(shifted, (1000 * 3 * t / (1 + 2 * t)).long())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes": -1}, "codes"),
        ({"codes": 0}, r"code_side \(2\) must be 1"),
        ({"in_channels": 4}, "must be 3, or 7 for inpainting"),
    ],
)
def test_impossible_codes_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CODES, **changes)
