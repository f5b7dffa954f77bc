import copy
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli.main import main
from dalle.family.captions import caption_model, is_text, next_text_logits
from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.family.mini.config import MiniConfig
from dalle.family.mini.model import DALLEMini
from dalle.family.variants.config import VariantConfig
from dalle.family.variants.model import VariantDALLE
from dalle.model import DALLE, DALLEConfig
from dalle.sampler.captions import complete
from dalle.sampling import Sampling, candidate_seed
from dvae.images import to_tensor
from rerank import score

CAPTIONS = ["a red cube on a blue cube", "a green sphere left of a red cube", "一只猫坐在椅子上"]
SIZES = {"n_layers": 4, "d_model": 32, "n_heads": 2, "text_len": 8, "grid": 4, "text_vocab": 12, "image_vocab": 6}
RUDALLE = VariantConfig(**SIZES, conv_kernel=3)
PYTORCH = DALLEPytorchConfig(
    **SIZES,
    d_head=16,
    kinds=("full", "axial_row", "axial_col", "conv_like"),
    attention_of_layer=(0, 1, 2, 3),
    mlp_of_layer=(0, 1, 2, 3),
    shifts_tokens=True,
)


def decided(model, strength=0.3):
    """The same model with weights all of which matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=strength)
    return model.eval().requires_grad_(False)


MODELS = {
    "paper": lambda: DALLE(DALLEConfig(**SIZES, conv_kernel=3)),
    "ruDALLE v3": lambda: VariantDALLE(RUDALLE),
    "ruDALLE v2": lambda: VariantDALLE(replace(RUDALLE, variant="ruDALLE v2")),
    "minDALL-E": lambda: VariantDALLE(replace(RUDALLE, variant="minDALL-E", pad=1, attention="dense")),
    "DALLE-pytorch": lambda: DALLEPytorch(PYTORCH),
    "DALLE-pytorch, pads hidden": lambda: DALLEPytorch(replace(PYTORCH, has_own_pads=False)),
}
ROW_OF_FIRST = {"ruDALLE v2": 1, "minDALL-E": -1}
"""Row of the text logits that predicts the first token of a caption, where it is not 0."""


@pytest.mark.parametrize("name", MODELS)
def test_text_is_predicted_as_by_the_whole_stream(name):
    torch.manual_seed(0)
    model = decided(MODELS[name]())
    ids = torch.tensor([[4, 5, 9, 4, 7, 6], [8, 4, 4, 11, 5, 10]])
    with torch.no_grad():
        whole = model(model.config.text_rows(ids.tolist()), torch.randint(6, (2, 16)))[0]
        for n in range(max(0, -ROW_OF_FIRST.get(name, 0)), 7):
            found = next_text_logits(model, ids[:, :n])
            torch.testing.assert_close(found, whole[:, n + ROW_OF_FIRST.get(name, 0)], atol=1e-4, rtol=1e-4)


def test_what_is_no_text_ends_a_caption():
    ends = {name: (~is_text(make())).nonzero()[:, 0].tolist() for name, make in MODELS.items()}
    pads = list(range(12, 20))
    assert ends == {
        "paper": [],
        "ruDALLE v3": [0, 2, 3, *pads],
        "ruDALLE v2": [0, 2, 3, *pads],
        "minDALL-E": [1],
        "DALLE-pytorch": [0, *pads],
        "DALLE-pytorch, pads hidden": [0],
    }


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return decided(DALLE(DALLEConfig(**{**SIZES, "text_vocab": 3}, conv_kernel=3)), 0.6)


def exact(model, beginning, n, temperature=1.0):
    """Log-probabilities of all continuations by n tokens, and the continuations."""
    continuations = list(product(range(model.config.text_vocab), repeat=n))
    rows = model.config.text_rows([[*beginning, *each] for each in continuations])
    with torch.no_grad():
        logits = model(rows, torch.zeros(len(rows), 16, dtype=torch.int64))[0].double() / temperature
    places = torch.arange(len(beginning), len(beginning) + n)
    each = logits[:, places].log_softmax(-1).gather(-1, rows[:, places + 1, None])[..., 0]
    return each, continuations


@pytest.mark.parametrize(("beginning", "temperature"), [([2, 0], 1.0), ([], 0.6)])
def test_completions_are_drawn_from_the_models_distribution(small, beginning, temperature):
    n = 4096
    seeds = [candidate_seed(0, "a", k) for k in range(n)]
    drawn = complete(small, beginning, seeds, Sampling(temperature=temperature), n_tokens=2)
    at_temperature, continuations = exact(small, beginning, 2, temperature)
    probabilities = at_temperature.sum(1).exp()
    assert float(probabilities.sum()) == pytest.approx(1)
    counts = torch.zeros(9, dtype=torch.float64)
    for one in drawn:
        counts[continuations.index(one.tokens)] += 1
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((counts / n - probabilities).abs() < 5 * error).all()
    assert probabilities.max() - probabilities.min() > 0.2  # so that it is no uniform draw
    unmodified, _ = exact(small, beginning, 2)
    for one in drawn[:20]:
        expected = unmodified[continuations.index(one.tokens)].tolist()
        assert one.log_likelihoods == pytest.approx(expected, abs=1e-4)


def test_a_completion_depends_on_its_own_seed(small):
    seeds = [candidate_seed(0, "a", k) for k in range(70)]
    together = complete(small, [1], seeds, Sampling(), n_tokens=4)
    apart = [complete(small, [1], [seed], Sampling(), n_tokens=4)[0] for seed in (seeds[0], seeds[69])]
    assert [together[0].tokens, together[69].tokens] == [one.tokens for one in apart]
    assert len({one.tokens for one in together}) > 4


def test_at_temperature_zero_the_likeliest_token_is_taken(small):
    (one,) = complete(small, [1], [0], Sampling(temperature=0), n_tokens=3)
    ids = [1]
    for _ in range(3):
        ids.append(int(next_text_logits(small, torch.tensor([ids]))[0].argmax()))
    assert one.tokens == tuple(ids[1:])
    assert complete(small, [1], [5], Sampling(top_k=1), n_tokens=3)[0].tokens == one.tokens


def test_a_caption_is_filled_at_most(small):
    (one,) = complete(small, [1, 2], [0], Sampling(), n_tokens=100)
    assert len(one.tokens) == 5  # text_len is 8, and the first place is start of text
    assert not one.ended


def test_a_model_that_predicts_ends_ends_captions():
    model = decided(MODELS["ruDALLE v3"](), 0.05)
    with torch.no_grad():
        model.text_head.bias[3] += 3
    seeds = list(range(40))
    found = complete(model, [4], seeds, Sampling(), n_tokens=5)
    lengths = {len(one.tokens) for one in found if one.ended}
    assert 0 in lengths
    assert len(lengths) > 1
    for one in found:
        assert len(one.log_likelihoods) == len(one.tokens) + one.ended
        assert 3 not in one.tokens
    alone = complete(model, [4], [0], Sampling(), n_tokens=5)[0]
    assert (alone.tokens, alone.ended) == (found[0].tokens, found[0].ended)
    assert alone.log_likelihoods == pytest.approx(found[0].log_likelihoods, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 0}, "n_tokens is 0; at least 1 token"),
        ({"n_tokens": 1.5}, "n_tokens is 1.5"),
        ({"beginning": [0] * 7}, "7 tokens leave no room for another: the model reads 7"),
        ({"sampling": Sampling(top_k=4)}, r"top_k \(4\) must be at most 3"),
        ({"sampling": Sampling(guidance=2.0)}, "guidance is 2, but captions are sampled without"),
    ],
)
def test_what_cannot_be_completed_is_refused_in_words(small, change, message):
    arguments = {"beginning": [0], "seeds": [0], "sampling": Sampling(), "n_tokens": 2} | change
    with pytest.raises(ValueError, match=message):
        complete(small, arguments.pop("beginning"), arguments.pop("seeds"), arguments.pop("sampling"), **arguments)


def test_a_caption_from_nothing_needs_a_start_of_text():
    with pytest.raises(ValueError, match="no start of text that a first token follows: give the beginning"):
        complete(MODELS["minDALL-E"](), [], [0], Sampling(), n_tokens=1)


def test_captions_are_completed_in_text(pipe):
    found = pipe.complete_caption("a red", n=5, n_tokens=4, seed=1)
    assert all(one.caption.startswith("a red") for one in found)
    assert len({one.caption for one in found}) > 1
    assert found[0].nats_per_token == pytest.approx(sum(found[0].log_likelihoods) / 4)
    assert pipe.complete_caption("a red", n=2, n_tokens=4, seed=1) == found[:2]
    assert pipe.complete_caption("", n=1, n_tokens=4)[0].caption


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beginning": " "}, "caption is empty"),
        ({"beginning": None}, "expected a string"),
        ({"n": 0}, "n is 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"beginning": "cube " * 50}, "leave no room for another"),
    ],
)
def test_bad_beginnings_are_refused_in_words(pipe, change, message):
    arguments = {"beginning": "a red"} | change
    with pytest.raises(ValueError, match=message):
        pipe.complete_caption(**arguments)


def test_a_model_without_text_predictions_says_so(pipe):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "n_heads": 2, "d_glu": 24, "text_len": 8}
    mini = DALLEMini(MiniConfig(**sizes, grid=4, text_vocab=10, image_vocab=32))
    with pytest.raises(ValueError, match=r"a DALL·E mini: it reads captions with an encoder and predicts no text"):
        caption_model(mini)
    other = copy.copy(pipe)
    other.dalle = mini
    with pytest.raises(ValueError, match="DALL·E mini"):
        other.complete_caption("a red")


def test_dalle_complete_caption_prints_a_table_or_json(bundle, pipe, capsys):
    command = ["complete-caption", "a red", "--bundle", str(bundle), "--device", "cpu", "-n", "3", "--tokens", "4"]
    command += ["--temperature", "0.8", "--top-k", "20", "--seed", "2"]
    expected = pipe.complete_caption("a red", n=3, n_tokens=4, temperature=0.8, top_k=20, seed=2)
    assert main([*command, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["caption"] for record in records] == [one.caption for one in expected]
    assert [record["nats_per_token"] for record in records] == [one.nats_per_token for one in expected]
    assert {(record["tokens"], record["ended"]) for record in records} == {(4, False)}
    assert main(command) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["nats", "per", "token", "tokens", "caption"]
    assert first.split()[:2] == [f"{expected[0].nats_per_token:.3f}", "4"]


def picture(height=16, width=16):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_captions_are_ranked_by_likelihood_clip_or_both(pipe):
    found = pipe.rank_captions(picture(), CAPTIONS, rank="likelihood")
    nats = {caption: pipe.likelihood(caption, [picture()]) for caption in CAPTIONS}
    expected = {caption: float(one.with_caption.sum()) for caption, one in nats.items()}
    assert found.captions == tuple(sorted(CAPTIONS, key=lambda caption: -expected[caption]))
    assert found.log_likelihoods.tolist() == pytest.approx([expected[caption] for caption in found.captions], abs=1e-3)
    assert found.without_caption == pytest.approx(float(nats[CAPTIONS[0]].without_caption.sum()), abs=1e-3)
    cosines = score(pipe.clip, list(found.captions), to_tensor(picture())[None])[:, 0]
    torch.testing.assert_close(found.scores, cosines)
    by_clip = pipe.rank_captions(picture(), CAPTIONS, rank="clip")
    assert (by_clip.scores.diff() <= 0).all()
    assert set(by_clip.captions) == set(CAPTIONS)
    places = {caption: found.captions.index(caption) + by_clip.captions.index(caption) for caption in CAPTIONS}
    both = pipe.rank_captions(picture(), CAPTIONS, rank="both")
    assert [places[caption] for caption in both.captions] == sorted(places.values())
    assert pipe.rank_captions(picture(), CAPTIONS).rank == pipe.defaults.rank


def test_ranked_captions_do_not_depend_on_the_batch(pipe):
    narrow = copy.copy(pipe)
    narrow.memory = 1
    told = []
    whole = pipe.rank_captions(picture(20, 40), CAPTIONS, rank="likelihood")
    each = narrow.rank_captions(
        picture(20, 40), CAPTIONS, rank="likelihood", progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3), (3, 3)]  # and then the empty caption
    assert whole.captions == each.captions
    torch.testing.assert_close(whole.log_likelihoods, each.log_likelihoods)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": []}, "no captions"),
        ({"captions": ["a"]}, "there is one caption: give at least two to rank"),
        ({"captions": ["a", " "]}, "caption is empty"),
        ({"captions": "a b"}, "expected a list of captions"),
        ({"image": "picture.png"}, "a picture, opened by"),
        ({"rank": "best"}, "unknown ranking 'best'"),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_words(pipe, change, message):
    arguments = {"image": picture(), "captions": CAPTIONS} | change
    with pytest.raises(ValueError, match=message):
        pipe.rank_captions(**arguments)


@pytest.fixture
def files(tmp_path):
    picture().save(tmp_path / "picture.png")
    (tmp_path / "captions.txt").write_text("\n".join([*CAPTIONS, "", CAPTIONS[0]]), encoding="utf-8")
    return tmp_path


def command_of(bundle, files):
    given = ["caption", files / "picture.png", "--candidates", files / "captions.txt", "--bundle", bundle]
    return [*map(str, given), "--device", "cpu"]


def test_dalle_caption_prints_a_table_or_json(bundle, pipe, files, capsys):
    expected = pipe.rank_captions(picture(), CAPTIONS, rank="both")
    assert main([*command_of(bundle, files), "--rank", "both", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["caption"] for record in records] == list(expected.captions)
    assert [record["nats"] for record in records] == pytest.approx(expected.log_likelihoods.tolist())
    assert [record["score"] for record in records] == pytest.approx(expected.scores.tolist())
    assert {record["ranked_by"] for record in records} == {"both"}
    assert records[0]["nats_without_caption"] == pytest.approx(expected.without_caption)
    assert main([*command_of(bundle, files), "--rank", "both"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["nats", "per", "token", "against", "none", "CLIP", "caption"]
    nats, against = float(expected.log_likelihoods[0]), float(expected.log_likelihoods[0]) - expected.without_caption
    assert first.split()[:3] == [f"{nats:.1f}", f"{nats / 16:.3f}", f"{against:+.1f}"]
    assert first.endswith(expected.captions[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no captions at"),
        ("", "no captions in"),
        ("\n \n", "no captions in"),
        ("a\na\n", "holds one caption: give at least two to rank"),
    ],
)
def test_dalle_caption_tells_what_is_wrong_in_one_line(bundle, files, capsys, text, message):
    if text is None:
        (files / "captions.txt").unlink()
    else:
        (files / "captions.txt").write_text(text)
    assert main(command_of(bundle, files)) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
