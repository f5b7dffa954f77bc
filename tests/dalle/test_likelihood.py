import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.cli.main import main
from dalle.family.tokenizers import text_of
from dalle.sampler.likelihood import log_likelihoods
from dvae.images import resize_and_crop, to_tensor

CAPTION = "a red cube on a blue cube"


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((16, 16), (20, 40), (16, 16))]


def test_likelihoods_by_steps_are_those_of_one_pass(pipe):
    found = pipe.likelihood(CAPTION, pictures())
    text = text_of(pipe.tokenizer, [CAPTION], pipe.dalle)
    for texts, values in ((text, found.with_caption), (pipe.dalle.config.null_caption()[None], found.without_caption)):
        with torch.no_grad():
            logits = pipe.dalle(texts.expand(3, -1), found.tokens)[1]
        whole = logits.log_softmax(-1).gather(-1, found.tokens[..., None])[..., 0]
        torch.testing.assert_close(values, whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.by_row(4)[:, 1], found.with_caption[:, 4:8].sum(1))


def test_pictures_are_seen_as_the_bundle_sees_them(pipe):
    found = pipe.likelihood(CAPTION, pictures())
    pixels = torch.stack([to_tensor(resize_and_crop(image, 16)) for image in pictures()])
    assert torch.equal(found.tokens, pipe.dvae.encode(pixels).flatten(1))


def test_a_candidate_has_the_likelihood_that_it_was_sampled_with(pipe):
    result = pipe.generate(CAPTION, n=4, keep=4, temperature=0.7)
    again = log_likelihoods(pipe.dalle, text_of(pipe.tokenizer, [CAPTION], pipe.dalle), result.tokens).sum(1)
    torch.testing.assert_close(again, result.log_likelihoods, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("caption", "images", "message"), [(" ", [1], "caption is empty"), ("a", [], "no pictures")])
def test_what_has_no_likelihood_is_refused_in_words(pipe, caption, images, message):
    with pytest.raises(ValueError, match=message):
        pipe.likelihood(caption, images)


def test_dalle_score_prints_a_table_or_json(bundle, pipe, tmp_path, capsys):
    for number, image in enumerate(pictures()):
        image.save(tmp_path / f"{number}.png")
    command = ["score", CAPTION, str(tmp_path), "--bundle", str(bundle), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = pipe.likelihood(CAPTION, pictures())
    assert [record["nats"] for record in records] == pytest.approx(found.with_caption.sum(1).tolist(), abs=1e-3)
    assert [sum(record["nats_by_row"]) for record in records] == pytest.approx([r["nats"] for r in records], abs=1e-3)
    assert main([*command, "--rows"]) == 0
    head, first, rows, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["nats", "per", "token", "without", "caption", "difference", "picture"]
    assert first.split()[0] == f"{records[0]['nats']:.1f}"
    assert len(rows.split()) == 4


def test_dalle_score_tells_what_is_wrong_in_one_line(bundle, tmp_path, capsys):
    assert main(["score", CAPTION, str(tmp_path / "none.png"), "--bundle", str(bundle)]) == 1
    told = capsys.readouterr().err
    assert "none.png" in told
    assert "Traceback" not in told
