import dataclasses
import logging
import shutil

import pytest
import torch

from dalle import pipeline
from dalle.model import DALLE
from dalle.pipeline import Pipeline
from dalle.tokenizer import Tokenizer
from dvae.directory import directory_hash
from dvae.images import resize_and_crop, to_image, to_tensor

CAPTION = "a red cube on a blue cube"


def same(a: pipeline.Result, b: pipeline.Result) -> bool:
    return a.candidates == b.candidates and torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)):
    return to_image(torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)))


def test_the_result_has_the_kept_pictures_scores_and_tokens(pipe):
    result = pipe.generate(CAPTION, n=6, keep=4)
    assert result.caption == CAPTION
    assert result.images.shape == (4, 3, 16, 16)
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert result.tokens.shape == (4, 16)
    assert result.tokens.dtype == torch.int64
    assert result.scores.dtype == torch.float32
    assert len(set(result.candidates)) == 4
    assert set(result.candidates) <= set(range(6))


def test_the_best_candidates_are_kept_best_first(pipe):
    everything = pipe.generate(CAPTION, n=9, keep=9)
    assert everything.scores.tolist() == sorted(everything.scores.tolist(), reverse=True)
    assert len(set(everything.scores.tolist())) > 1
    best = pipe.generate(CAPTION, n=9, keep=3)
    assert best.candidates == everything.candidates[:3]
    assert torch.equal(best.images, everything.images[:3])


def test_scores_are_those_of_rank_and_images_are_those_of_the_tokens(pipe):
    result = pipe.generate(CAPTION, n=5, keep=5)
    torch.testing.assert_close(pipe.rank([CAPTION], result.images)[0], result.scores, atol=1e-6, rtol=0)
    assert torch.equal(pipe.decode(result.tokens), result.images)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(pipe):
    first = pipe.generate(CAPTION, n=4, keep=4, seed=3)
    assert same(first, pipe.generate(CAPTION, n=4, keep=4, seed=3))
    assert not torch.equal(first.tokens, pipe.generate(CAPTION, n=4, keep=4, seed=4).tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_change_the_result(pipe, batch_size):
    result = pipe.generate(CAPTION, n=5, keep=2, batch_size=batch_size)
    expected = pipe.generate(CAPTION, n=5, keep=2)
    assert result.candidates == expected.candidates
    assert torch.equal(result.tokens, expected.tokens)


def test_the_decoding_batch_size_does_not_change_the_result(pipe, monkeypatch):
    expected = pipe.generate(CAPTION, n=5, keep=3)
    monkeypatch.setattr(pipeline, "CPU_MEMORY_BUDGET", 1)
    result = pipe.generate(CAPTION, n=5, keep=3)
    assert result.candidates == expected.candidates
    assert torch.equal(result.tokens, expected.tokens)


def test_more_candidates_do_not_change_the_first_ones(pipe):
    few, many = pipe.sample_tokens([CAPTION], 2), pipe.sample_tokens([CAPTION], 5)
    assert torch.equal(few, many[:, :2])


def test_captions_sampled_together_are_as_if_sampled_alone(pipe):
    captions = [CAPTION, "一只猫", "🦄"]
    alone = torch.cat([pipe.sample_tokens([caption], 3) for caption in captions])
    for batch_size in (None, 2, 4):
        assert torch.equal(pipe.sample_tokens(captions, 3, batch_size=batch_size), alone)


def test_equal_scores_keep_the_order_of_the_candidates(pipe):
    tokens = pipe.sample_tokens([CAPTION], 1)[0].repeat(4, 1)
    assert pipe.choose(CAPTION, tokens, keep=4).candidates == (0, 1, 2, 3)


def test_completion_keeps_the_given_rows_verbatim(pipe):
    image = picture()
    tokens = pipe.dvae.encode(to_tensor(resize_and_crop(image, 16))[None]).flatten()
    assert len(tokens.unique()) > 1
    result = pipe.generate(CAPTION, n=4, keep=4, prefix=pipe.prefix(image, keep_rows=3))
    assert torch.equal(result.tokens[:, :12], tokens[:12].expand(4, -1))
    assert len({tuple(row.tolist()) for row in result.tokens[:, 12:]}) > 1


def test_keeping_no_rows_is_plain_sampling(pipe):
    completed = pipe.generate(CAPTION, n=2, keep=2, prefix=pipe.prefix(picture(), keep_rows=0))
    assert same(completed, pipe.generate(CAPTION, n=2, keep=2))


@pytest.mark.parametrize("keep_rows", [-1, 4, 15])
def test_at_least_one_row_must_be_left_to_complete(pipe, keep_rows):
    with pytest.raises(ValueError, match=f"keep_rows is {keep_rows}.* 0 to 3"):
        pipe.prefix(picture(), keep_rows)


def test_progress_counts_candidates_up_to_the_total(pipe):
    calls: list[tuple[float, int]] = []
    pipe.generate(CAPTION, n=5, keep=1, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    dones = [done for done, _ in calls]
    assert {total for _, total in calls} == {5}
    assert dones == sorted(dones)
    assert dones[-1] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0, "keep": 1}, "n is 0"),
        ({"n": 2, "keep": 3}, "keep is 3, but 2"),
        ({"n": 2, "keep": 0}, "keep is 0"),
        ({"n": 2, "keep": 1, "batch_size": 0}, "batch_size is 0"),
        ({"n": 2, "keep": 1, "temperature": -1.0}, "temperature"),
        ({"n": 2, "keep": 1, "top_p": 2.0}, "top_p"),
    ],
)
def test_numbers_out_of_range_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate(CAPTION, **options)


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_an_empty_caption_is_refused(pipe, caption):
    with pytest.raises(ValueError, match="caption is empty"):
        pipe.generate(caption, n=1, keep=1)


def test_a_caption_that_is_too_long_is_cut_with_one_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING, "dalle"):
        result = pipe.generate("x" * 10_000, n=3, keep=1, batch_size=1)
    assert len(result.images) == 1
    assert [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()] == [
        f"the caption {'x' * 57 + '...'!r} has 10000 tokens, the model reads 23: the last 9977 were cut"
    ]


@pytest.mark.parametrize("caption", ["一只猫坐在椅子上", "🦄🌈", "../../etc/passwd", "\0"])
def test_any_text_is_a_caption(pipe, caption):
    assert pipe.generate(caption, n=2, keep=1).caption == caption


def test_guidance_without_null_captions_in_training_is_warned_of_once(bundle, caplog):
    pipe = Pipeline.load(bundle)
    pipe.generate(CAPTION, n=1, keep=1)
    assert not caplog.records
    for _ in range(2):
        pipe.generate(CAPTION, n=1, keep=1, guidance=2.0)
    assert len([record for record in caplog.records if "never saw an empty caption" in record.getMessage()]) == 1


def test_guidance_with_null_captions_in_training_is_not_warned_of(bundle_copy, caplog):
    dalle = DALLE.load(bundle_copy / "dalle")
    dalle.save(bundle_copy / "dalle", {**dalle.metadata, "null_caption_probability": 0.1})
    Pipeline.load(bundle_copy).generate("a cube", n=1, keep=1, guidance=2.0)
    assert not caplog.records


def test_the_default_batch_size_fits_the_memory_in_equal_batches(pipe, monkeypatch):
    assert pipe.default_batch_size(100) == 50
    cache = 2 * 3 * 16 * 32 * 4  # keys and values, layers, image positions, width, bytes
    monkeypatch.setattr(pipeline, "CPU_MEMORY_BUDGET", 4 * cache)
    assert pipe.default_batch_size(9) == 3
    assert pipe.default_batch_size(9, guided=True) == 2
    monkeypatch.setattr(pipeline, "CPU_MEMORY_BUDGET", 0)
    assert pipe.default_batch_size(9) == 1


def test_hashes_name_every_part(pipe, bundle):
    assert pipe.hashes == {
        "tokenizer": Tokenizer.load(bundle / "tokenizer.json").hash,
        **{part: directory_hash(bundle / part) for part in ("dvae", "dalle", "clip")},
    }


def test_a_dvae_that_the_transformer_was_not_trained_with_is_refused(bundle_copy, another_dvae):
    trained_with = directory_hash(bundle_copy / "dvae")
    another_dvae(bundle_copy / "dvae")
    found = directory_hash(bundle_copy / "dvae")
    with pytest.raises(ValueError, match=f"trained with the dvae {trained_with}, .* holds {found}"):
        Pipeline.load(bundle_copy)


def test_a_tokenizer_that_the_transformer_was_not_trained_with_is_refused(bundle_copy):
    Tokenizer.train(["quite other captions, other captions"], 270).save(bundle_copy / "tokenizer.json")
    with pytest.raises(ValueError, match="trained with the tokenizer"):
        Pipeline.load(bundle_copy)


def test_a_transformer_that_does_not_say_what_it_was_trained_with_is_refused(bundle_copy):
    DALLE.load(bundle_copy / "dalle").save(bundle_copy / "dalle", {})
    with pytest.raises(ValueError, match="unknown hash"):
        Pipeline.load(bundle_copy)


def test_parts_of_different_sizes_are_refused(pipe):
    config = dataclasses.replace(pipe.dalle.config, image_vocab=64)
    with pytest.raises(ValueError, match="64 image tokens, the dVAE has 32"):
        Pipeline(tokenizer=pipe.tokenizer, dalle=DALLE(config), dvae=pipe.dvae, clip=pipe.clip, hashes={})
    config = dataclasses.replace(pipe.dalle.config, grid=8)
    with pytest.raises(ValueError, match="8 rows of image tokens, the dVAE has 4"):
        Pipeline(tokenizer=pipe.tokenizer, dalle=DALLE(config), dvae=pipe.dvae, clip=pipe.clip, hashes={})


@pytest.mark.parametrize("part", ["tokenizer.json", "dvae", "dalle", "clip"])
def test_a_missing_part_is_named_with_what_makes_it(bundle_copy, part):
    path = bundle_copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {part}: make it with `dalle-train"):
        Pipeline.load(bundle_copy)


def test_a_missing_bundle_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bundle at .*nowhere.*make demo"):
        Pipeline.load(tmp_path / "nowhere")
