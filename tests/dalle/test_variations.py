import copy
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli.main import main
from dalle.editing.variations import drawn_anew
from dalle.family.tokenizers import text_of
from dalle.sampler.particles import fill
from dalle.sampling import SamplingDefaults
from dvae.images import open_image, to_tensor

CAPTION = "a red cube on a blue cube"
SIDE = 16
PAPER = SamplingDefaults()
SEED_OF_EARLY_ONES = 4
"""Its first two tokens that are drawn anew, 0 and 4, have the others behind them."""


def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def tokens_of(pipe):
    return pipe.dvae.encode(to_tensor(picture())[None]).flatten()


@pytest.mark.parametrize("grid", [1, 2, 4, 7, 32])
def test_a_larger_strength_draws_the_same_tokens_anew_and_more(grid):
    strengths = [0.0, 0.05, 0.3, 0.5, 0.75, 0.9, 1.0]
    for seed in range(4):
        sets = [drawn_anew(grid, strength, seed) for strength in strengths]
        assert [int(one.sum()) for one in sets] == [round(strength * grid**2) for strength in strengths]
        for smaller, larger in pairwise(sets):
            assert not (smaller & ~larger).any()


def test_what_is_kept_is_a_lattice_that_the_seed_moves():
    kept = [~drawn_anew(16, 1 - 4.0**-level, seed).reshape(16, 16) for seed in range(20) for level in (1, 2, 3)]
    for number, one in enumerate(kept):
        step = 2 ** (number % 3 + 1)
        rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
        assert torch.equal(one[rows][:, columns], torch.ones(16 // step, 16 // step, dtype=torch.bool))
        assert (rows.diff() == step).all()
        assert (columns.diff() == step).all()
    assert len({tuple(one.nonzero()[0].tolist()) for one in kept[::3]}) == 4


def test_the_order_within_a_level_follows_from_the_seed():
    assert torch.equal(drawn_anew(8, 0.3, 5), drawn_anew(8, 0.3, 5))
    assert len({drawn_anew(8, 0.3, seed).numpy().tobytes() for seed in (-2, -1, 0, 1, 2)}) == 5


def test_without_strength_it_is_the_reconstruction(pipe):
    varied = pipe.variations(picture(), CAPTION, n=4, keep=4, strength=0)
    assert len(varied.images) == 1
    assert torch.equal(varied.tokens[0], tokens_of(pipe))
    assert torch.equal(varied.images[0], pipe.decode(tokens_of(pipe)[None])[0])
    assert torch.equal(varied.images[0], varied.reconstruction)
    assert varied.n_changed == (0,)


@pytest.mark.parametrize("settings", [PAPER, SamplingDefaults(temperature=0.7, guidance=2.0, rank="both")])
def test_at_full_strength_it_is_a_new_sample(pipe, settings):
    varied = pipe.variations(picture(), CAPTION, n=8, keep=8, strength=1, seed=3, settings=settings)
    plain = pipe.generate(CAPTION, n=8, keep=8, seed=3, **vars(settings))
    assert varied.candidates == plain.candidates
    assert torch.equal(varied.tokens, plain.tokens)
    assert torch.equal(varied.images, plain.images)
    assert torch.equal(varied.log_likelihoods, plain.log_likelihoods)


def test_kept_tokens_stay_and_the_others_are_counted(pipe):
    varied = pipe.variations(picture(), CAPTION, n=12, keep=12, strength=0.6, settings=PAPER)
    is_new = drawn_anew(4, 0.6, 0)
    assert varied.n_unknown == int(is_new.sum()) == 10
    assert torch.equal(varied.is_new, is_new)
    differs = varied.tokens != tokens_of(pipe)
    assert not differs[:, ~is_new].any()
    assert varied.n_changed == tuple(differs.sum(1).tolist())
    assert torch.equal(varied.images, pipe.decode(varied.tokens))
    assert len({tuple(tokens) for tokens in varied.tokens.tolist()}) == len(varied.tokens)


@pytest.mark.slow
def test_tokens_that_are_drawn_anew_have_the_marginals_of_the_posterior(pipe, monkeypatch):
    # with two tokens drawn anew, the 1,024 pictures that are possible can be listed
    pipe = copy.copy(pipe)
    pipe.dalle = copy.deepcopy(pipe.dalle)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # so that tokens depend on each other
        for parameter in pipe.dalle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    populations = []

    def watched(*arguments, **options):
        populations.append(fill(*arguments, **options))
        return populations[-1]

    monkeypatch.setattr("dalle.editing.redraw.fill", watched)
    varied = pipe.variations(
        picture(), CAPTION, n=32 * 128, keep=1, strength=2 / 16, seed=SEED_OF_EARLY_ONES, settings=PAPER, batch_size=128
    )
    unknown = varied.is_new.nonzero()[:, 0]
    assert len(populations) == 32
    pairs = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    pictures = tokens_of(pipe).repeat(len(pairs), 1)
    pictures[:, unknown] = pairs
    text = text_of(pipe.tokenizer, [CAPTION], pipe.dalle).expand(len(pairs), -1)
    with torch.no_grad():
        logits = pipe.dalle(text, pictures)[1].double()
    posterior = logits.log_softmax(-1).gather(-1, pictures[..., None])[..., 0].sum(1).softmax(0)
    exact = torch.stack([posterior.new_zeros(32).index_add(0, drawn, posterior) for drawn in pairs.T])
    shown = torch.nn.functional.one_hot(torch.stack([one.tokens[:, unknown] for one in populations]), 32).double()
    weights = torch.stack([one.log_weights for one in populations])
    weights = (weights - weights.max()).exp()
    naive = shown.mean((0, 1))
    sums, of_all = (weights[..., None, None] * shown).sum(1), weights.sum(1)[:, None, None]
    found = sums.sum(0) / of_all.sum()
    # the error of a ratio of sums over independent populations; and what five particles are worth
    error = (sums - of_all * found).square().sum(0).sqrt() / of_all.sum()
    bound = 5 * error + 5 / varied.effective
    assert varied.effective > 1000
    assert ((found - exact).abs() < bound).all()
    assert ((naive - exact).abs() > 2 * bound).any()  # what forcing without weights would draw


def test_what_is_drawn_anew_is_shown_in_grey(pipe):
    varied = pipe.variations(picture(), CAPTION, n=1, keep=1, strength=0.5)
    grey = (np.asarray(varied.shown()) == 128).all(-1).reshape(4, 4, 4, 4)
    assert np.array_equal(grey.all((1, 3)), varied.is_new.reshape(4, 4).numpy())
    assert np.array_equal(grey.any((1, 3)), varied.is_new.reshape(4, 4).numpy())


def test_the_same_seed_makes_the_same_variations(pipe):
    first, again, other = (
        pipe.variations(picture(), CAPTION, n=6, keep=3, seed=seed, settings=PAPER) for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.is_new, other.is_new)


def test_without_a_caption_they_are_ranked_by_likelihood(pipe, caplog):
    pipe._warnings._told.clear()
    guided = SamplingDefaults(guidance=3.0, rank="both")
    varied = pipe.variations(picture(), n=8, keep=8, settings=guided)
    assert "give a caption that says what the picture shows" in caplog.text
    assert varied.caption == ""
    assert varied.rank == "likelihood"
    assert (varied.log_likelihoods.diff() <= 0).all()
    plain = pipe.variations(picture(), n=8, keep=8, settings=PAPER)
    assert "guidance" not in caplog.text
    assert torch.equal(varied.tokens, plain.tokens)  # with nothing to be guided towards, guidance is off


def test_batches_and_progress(pipe):
    told = []
    pipe.variations(
        picture(), CAPTION, n=7, keep=2, batch_size=3, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (7, 7)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 1.01}, r"strength is 1.01: give the share .* from 0 \(none\) to 1 \(all\)"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": "half"}, "strength is 'half', of type str; expected a number"),
        ({"image": "picture.png"}, "a picture, opened by"),
        ({"caption": " "}, "the caption is empty"),
        ({"caption": None}, "expected a string"),
        ({"n": 4, "keep": 5}, "keep is 5, but 4 candidates"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_what_cannot_be_varied_is_refused_in_words(pipe, change, message):
    arguments = {"image": picture(), "caption": CAPTION, "n": 1, "keep": 1} | change
    with pytest.raises(ValueError, match=message):
        pipe.variations(**arguments)


def command(bundle, folder, *more):
    picture().save(folder / "picture.png")
    given = ["variations", folder / "picture.png", *more, "--bundle", bundle, "--out", folder / "out"]
    return [*map(str, given), "-n", "6", "--keep", "3", "--device", "cpu"]


@pytest.mark.parametrize("caption", [(), (CAPTION,)], ids=["none", "caption"])
def test_dalle_variations_writes_pictures_sheet_and_results(bundle, pipe, tmp_path, capsys, caption):
    assert main(command(bundle, tmp_path, *caption, "--strength", "0.4", "--seed", "2")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d pictures? in .*out: see sheet.png and results.jsonl \(6 of 16 tokens drawn anew", printed)
    expected = pipe.variations(picture(), *caption, n=6, keep=3, strength=0.4, seed=2)
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [line["candidate"] for line in lines] == list(expected.candidates)
    assert [line["changed_tokens"] for line in lines] == list(expected.n_changed)
    assert {line["ranked_by"] for line in lines} == {"clip" if caption else "likelihood"}
    for line, pixels in zip(lines, expected.images, strict=True):
        assert line["strength"] == 0.4
        assert line["seed"] == 2
        written = open_image(tmp_path / "out" / line["file"])
        assert (to_tensor(written) - pixels).abs().max() < 0.51 / 255
    assert open_image(tmp_path / "out/sheet.png").width > 3 * 128


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strength", "nan"], "strength is nan"),
        (["--rank", "clip"], "--rank clip needs a caption for CLIP to compare the pictures with"),
        (["--guidance", "3"], "--guidance 3 needs a caption to follow"),
        (["--keep", "7"], "keep is 7, but 6 candidates"),
        ([" "], "the caption is empty"),
    ],
)
def test_dalle_variations_tells_what_is_wrong_in_one_line(bundle, tmp_path, capsys, more, message):
    assert main([*command(bundle, tmp_path), *more]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
