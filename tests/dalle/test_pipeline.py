import contextlib
import dataclasses
import gc
import logging
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from dalle import best_of_n, budget, pipeline
from dalle.attention import stored_mask
from dalle.best_of_n import Judge, Request, Result, rank_order
from dalle.cache import slot_pattern
from dalle.data import bundle as bundle_module
from dalle.model import DALLE
from dalle.pipeline import Pipeline
from dalle.sampling import PAPER_SAMPLING, Sampling, SamplingDefaults
from dalle.tokenizer import Tokenizer
from dvae.images import resize_and_crop, to_image, to_tensor
from storage.models.directory import directory_hash

CAPTION = "a red cube on a blue cube"


def same(a: Result, b: Result) -> bool:
    return a.candidates == b.candidates and torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


def request(n: int) -> Request:
    return Request(caption=CAPTION, n=n, keep=2)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)):
    return to_image(torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)))


def test_the_result_has_the_kept_pictures_scores_and_tokens(pipe):
    result = pipe.generate(CAPTION, n=6, keep=4)
    assert result.caption == CAPTION
    assert result.images.shape == (4, 3, 16, 16)
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert result.tokens.shape == (4, 16)
    assert result.tokens.dtype == torch.int64
    assert result.scores.dtype == result.log_likelihoods.dtype == torch.float32
    assert result.scores.shape == result.log_likelihoods.shape == (4,)
    assert result.rank == "clip"
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
    monkeypatch.setattr(budget, "CPU_MEMORY_BUDGET", 1)
    result = pipe.generate(CAPTION, n=5, keep=3)
    assert result.candidates == expected.candidates
    assert torch.equal(result.tokens, expected.tokens)


@pytest.mark.parametrize("rank", ["clip", "likelihood", "both"])
@pytest.mark.parametrize("keep", [1, 4, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 11])
def test_streaming_gives_what_scoring_all_candidates_at_once_gives(pipe, monkeypatch, batch_size, keep, rank):
    monkeypatch.setattr(budget, "MAX_PICTURES_AT_ONCE", 3)
    samples = pipe.sample_tokens([CAPTION], 11)
    tokens, log_likelihoods = samples.tokens[0], samples.log_likelihoods[0]
    images = pipe.decode(tokens)
    scores = pipe.rank([CAPTION], images)[0]
    order = rank_order(scores, log_likelihoods, rank)[:keep]
    result = pipe.generate(CAPTION, n=11, keep=keep, batch_size=batch_size, rank=rank)
    assert result.rank == rank
    torch.testing.assert_close(result.log_likelihoods, log_likelihoods[order], atol=1e-4, rtol=0)
    assert result.candidates == tuple(order.tolist())
    assert torch.equal(result.tokens, tokens[order])
    torch.testing.assert_close(result.images, images[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(result.scores, scores[order], atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", ["clip", "likelihood", "both"])
@pytest.mark.parametrize("early_abandon", [False, True])
def test_streaming_on_a_gpu_gives_what_its_candidates_give_all_at_once(bundle, early_abandon, rank):
    pipe = Pipeline.load(bundle, "cuda", memory=100_000_000)
    result = pipe.generate(CAPTION, n=11, keep=4, batch_size=4, early_abandon=early_abandon, rank=rank)
    held = (result.images, result.scores, result.log_likelihoods, result.tokens)
    assert {tensor.device.type for tensor in held} == {"cpu"}
    samples = pipe.sample_tokens([CAPTION], 11)
    tokens, log_likelihoods = samples.tokens[0], samples.log_likelihoods[0]
    assert torch.equal(result.tokens, tokens[list(result.candidates)])
    if not early_abandon:
        chosen = pipe.choose(CAPTION, tokens, log_likelihoods, keep=4, rank=rank)
        assert result.candidates == chosen.candidates


def test_the_caption_is_embedded_once(pipe, monkeypatch):
    calls = []
    embed = best_of_n.embed_captions
    monkeypatch.setattr(best_of_n, "embed_captions", lambda *arguments: calls.append(1) or embed(*arguments))
    pipe.generate(CAPTION, n=6, keep=2, batch_size=2)
    assert len(calls) == 1


def test_ranked_by_likelihood_only_what_is_kept_is_decoded(pipe, monkeypatch):
    decoded = []
    decode = pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    pipe.generate(CAPTION, n=9, keep=2, batch_size=3, rank="likelihood")
    assert sum(decoded) == 2


def test_ranked_by_likelihood_the_numbers_descend_and_may_rise_by_clip(pipe):
    result = pipe.generate(CAPTION, n=9, keep=9, rank="likelihood")
    assert result.log_likelihoods.tolist() == sorted(result.log_likelihoods.tolist(), reverse=True)
    assert result.scores.tolist() != sorted(result.scores.tolist(), reverse=True)
    torch.testing.assert_close(pipe.rank([CAPTION], result.images)[0], result.scores, atol=1e-6, rtol=0)


def test_log_likelihoods_do_not_depend_on_the_sampling(pipe):
    text = pipe.tokenizer.text([CAPTION], pipe.dalle.config.text_len)[0]
    for sampling in (Sampling(temperature=0.5, top_k=9), Sampling(top_p=0.8, guidance=2.0)):
        samples = pipe.sample_tokens([CAPTION], 3, sampling)
        with torch.no_grad():
            log_p = pipe.dalle(text.expand(3, -1), samples.tokens[0])[1].log_softmax(-1)
        expected = log_p.gather(-1, samples.tokens[0][:, :, None]).sum((1, 2))
        torch.testing.assert_close(samples.log_likelihoods[0], expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("rank", ["clip", "likelihood", "both"])
def test_only_what_is_kept_and_one_batch_are_in_memory(pipe, monkeypatch, rank):
    n, keep, batch_size = 15, 4, 5
    held: list[tuple[int, int]] = []
    decode = pipe.decode

    def watched(tokens):
        # before and after: neither the last batch nor anything that was dropped may still be there
        before = rows_in_memory(3 * 16 * 16 * 4, (3, 16, 16)), rows_in_memory(16 * 8, (16,))
        images = decode(tokens)
        held.append(before)
        return images

    outside = rows_in_memory(3 * 16 * 16 * 4, (3, 16, 16)), rows_in_memory(16 * 8, (16,))
    monkeypatch.setattr(pipe, "decode", watched)
    pipe.generate(CAPTION, n=n, keep=keep, batch_size=batch_size, rank=rank)
    assert len(held) == {"clip": n // batch_size, "likelihood": 1, "both": n // batch_size + 1}[rank]
    assert max(pictures for pictures, _ in held) - outside[0] == (keep if rank == "clip" else 0)
    tokens_held = {"clip": keep, "likelihood": 2 * keep, "both": n + keep}[rank]  # those of the best twice at the end
    assert max(tokens for _, tokens in held) - outside[1] <= tokens_held + batch_size


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Lets the garbage collector see only what is made from now on: looking at everything takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def rows_in_memory(row_bytes: int, shape: tuple[int, ...]) -> int:
    """How many rows of a shape all living tensors hold, each storage counted once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape[1:] == shape]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) // row_bytes


def test_more_candidates_do_not_change_the_first_ones(pipe):
    few, many = pipe.sample_tokens([CAPTION], 2), pipe.sample_tokens([CAPTION], 5)
    assert torch.equal(few.tokens, many.tokens[:, :2])
    torch.testing.assert_close(few.log_likelihoods, many.log_likelihoods[:, :2], atol=1e-4, rtol=0)


def test_captions_sampled_together_are_as_if_sampled_alone(pipe):
    captions = [CAPTION, "一只猫", "🦄"]
    alone = torch.cat([pipe.sample_tokens([caption], 3).tokens for caption in captions])
    for batch_size in (None, 2, 4):
        assert torch.equal(pipe.sample_tokens(captions, 3, batch_size=batch_size).tokens, alone)


def test_early_abandon_finishes_the_half_of_each_batch_whose_tops_score_better(pipe, monkeypatch):
    seen = []
    score_tops = Judge.score_tops

    def watched(judge, tokens):
        seen.append((tokens, score_tops(judge, tokens)))
        return seen[-1][1]

    monkeypatch.setattr(Judge, "score_tops", watched)
    whole = pipe.sample_tokens([CAPTION], 10).tokens[0]
    result = pipe.generate(CAPTION, n=10, keep=5, early_abandon=True, batch_size=4)
    assert [len(tokens) for tokens, _ in seen] == [4, 4, 2]
    assert torch.equal(torch.cat([tokens for tokens, _ in seen]), whole[:, :8])
    better = [4 * i + k for i, (_, scores) in enumerate(seen) for k in scores.topk(len(scores) // 2).indices.tolist()]
    assert sorted(result.candidates) == sorted(better)
    # those that go on become what they would have been, and are ranked as always
    assert torch.equal(result.tokens, whole[list(result.candidates)])
    among_them = pipe.choose(CAPTION, whole[sorted(better)], torch.zeros(5), keep=5)
    assert torch.equal(result.tokens, among_them.tokens)
    torch.testing.assert_close(result.scores, among_them.scores, atol=1e-6, rtol=0)


def test_a_top_is_scored_on_a_ground_of_its_own_mean_colour(pipe, monkeypatch):
    shown = []
    embed = best_of_n.embed_images
    monkeypatch.setattr(best_of_n, "embed_images", lambda clip, images: shown.append(images) or embed(clip, images))
    tokens = pipe.sample_tokens([CAPTION], 3).tokens[0]
    judge = Judge(CAPTION, pipe.clip, pipe.decode, lambda n: n)
    assert judge.score_tops(tokens[:, :8]).shape == (3,)
    assert shown[0].shape == (3, 3, 16, 16)
    top, ground = shown[0].split(8, dim=2)
    assert torch.equal(top, pipe.decode(tokens[:, :8]))
    torch.testing.assert_close(ground, top.mean((2, 3), keepdim=True).expand_as(top))
    # what is not known yet has no effect
    other = torch.cat([tokens[:, :8], tokens.flip(0)[:, 8:]], dim=1)
    assert torch.equal(judge.score_tops(other[:, :8]), judge.score_tops(tokens[:, :8]))


def test_early_abandon_ends_its_progress_at_all_candidates(pipe):
    dones: list[float] = []
    pipe.generate(CAPTION, n=10, keep=2, early_abandon=True, batch_size=4, progress=lambda done, _: dones.append(done))
    assert dones == sorted(dones)
    assert dones[-1] == 10


def test_early_abandon_of_single_candidates_drops_none(pipe):
    assert same(
        pipe.generate(CAPTION, n=3, keep=2, early_abandon=True, batch_size=1),
        pipe.generate(CAPTION, n=3, keep=2, batch_size=1),
    )


def test_early_abandon_needs_something_to_choose_and_an_open_top(pipe):
    assert len(pipe.generate(CAPTION, n=5, keep=3, early_abandon=True).candidates) == 3
    with pytest.raises(ValueError, match="keep is 4, but early abandon finishes only 3 of 5"):
        pipe.generate(CAPTION, n=5, keep=4, early_abandon=True)
    one_row = pipe.prefix(picture(), keep_rows=1)
    assert torch.equal(
        pipe.generate(CAPTION, n=4, keep=2, early_abandon=True, prefix=one_row).tokens[:, :4], one_row.expand(2, -1)
    )
    with pytest.raises(ValueError, match="the top 2 of their 4 rows of tokens, but the first 8 tokens are given"):
        pipe.generate(CAPTION, n=4, keep=2, early_abandon=True, prefix=pipe.prefix(picture(), keep_rows=2))


def test_equal_scores_keep_the_order_of_the_candidates(pipe):
    tokens = pipe.sample_tokens([CAPTION], 1).tokens[0].repeat(4, 1)
    for rank in ("clip", "likelihood", "both"):
        assert pipe.choose(CAPTION, tokens, torch.zeros(4), keep=4, rank=rank).candidates == (0, 1, 2, 3)


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


def test_progress_is_even_over_sampling_decoding_and_scoring(pipe, monkeypatch):
    monkeypatch.setattr(budget, "MAX_PICTURES_AT_ONCE", 2)
    dones: list[float] = []
    pipe.generate(CAPTION, n=12, keep=1, batch_size=6, progress=lambda done, _: dones.append(done))
    assert len(dones) == 2 * (16 + 3)
    assert dones == sorted(set(dones))
    assert dones[18] == 6
    assert dones[-1] == 12
    assert 0 < dones[15] < 6  # sampled, but not yet seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0, "keep": 1}, "n is 0"),
        ({"n": 2, "keep": 3}, "keep is 3, but 2"),
        ({"n": 2, "keep": 0}, "keep is 0"),
        ({"n": 2, "keep": 1, "batch_size": 0}, "batch_size is 0"),
        ({"n": 2, "keep": 1, "temperature": -1.0}, "temperature"),
        ({"n": 2, "keep": 1, "top_p": 2.0}, "top_p"),
        ({"n": 2, "keep": 1, "top_k": 0}, "top_k"),
        ({"n": 2, "keep": 1, "top_k": 33}, "top_k"),
        ({"n": 2, "keep": 1, "guidance": -1.0}, "guidance"),
        ({"n": 2, "keep": 1, "rank": "best"}, "unknown ranking 'best'"),
    ],
)
def test_numbers_out_of_range_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate(CAPTION, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption": ["a cube"]}, "the caption is .*of type list; expected a string"),
        ({"caption": b"a cube"}, "of type bytes"),
        ({"caption": None}, "of type NoneType"),
        ({"n": "2"}, "n is '2', of type str; expected a whole number"),
        ({"n": 2.0}, "n is 2.0, of type float"),
        ({"n": 10**18}, "n is 10{18}; .* at most 1,000,000,000"),
        ({"keep": 1.0}, "keep is 1.0"),
        ({"keep": None}, "keep is None"),
        ({"seed": None}, "seed is None"),
        ({"seed": "0"}, "seed is '0'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"rank": 1}, "unknown ranking 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"prefix": [1, 2]}, "prefix is .*, of type list; expected a tensor"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(pipe, options, message):
    arguments = {"caption": CAPTION, "n": 2, "keep": 1, **options}
    with pytest.raises(ValueError, match=message):
        pipe.generate(arguments.pop("caption"), **arguments)


def test_other_methods_name_arguments_of_a_wrong_type(pipe, bundle):
    with pytest.raises(ValueError, match="captions is 'a cube', of type str; expected a list"):
        pipe.sample_tokens("a cube", 2)
    with pytest.raises(ValueError, match=r"image is 'a\.png', of type str; expected a picture"):
        pipe.prefix("a.png", 1)
    with pytest.raises(ValueError, match=r"keep_rows is 1\.5"):
        pipe.prefix(picture(), 1.5)
    with pytest.raises(ValueError, match=r"memory is 4000000000\.0"):
        Pipeline.load(bundle, memory=4e9)


DEVICES = ["mps", "meta", "cuda:7", "cuda:999999", "cuda:-1", "xpu", "privateuseone", "hpu:0", "nonsense", "", None]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_cannot_compute_is_refused(bundle, device):
    with pytest.raises(ValueError, match=f"there is no device '{device}' to compute on: give one of auto, cpu"):
        Pipeline.load(bundle, device)


def test_equal_pictures_are_warned_of_once(bundle, caplog):
    pipe = Pipeline.load(bundle)
    pipe.generate(CAPTION, n=4, keep=4)
    pipe.generate(CAPTION, n=4, keep=1, temperature=0.0)
    assert not caplog.records
    for _ in range(2):
        pipe.generate(CAPTION, n=4, keep=4, temperature=0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "all 4 pictures are equal: sample one, or at a temperature above 0"
    ]


def test_a_result_has_a_short_text(pipe):
    text = repr(pipe.generate("x" * 1000, n=5, keep=4))
    assert text.startswith(f"Result(caption='{'x' * 59}…', 4 of 16×16 pixels, scores ")
    assert text.endswith(", rank='clip')")
    assert len(text) < 160


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "threads": two_threads,
    "device": lambda: torch.device("meta"),
}


def state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().sum().item() if torch.get_default_device().type == "cpu" else None,
    )


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_pictures_are_the_same_in_any_surroundings(bundle, pipe, surroundings):
    options = {"n": 5, "keep": 3, "temperature": 0.9, "top_p": 0.9, "guidance": 1.5, "rank": "both"}
    image = picture()
    expected = pipe.generate(CAPTION, **options, prefix=pipe.prefix(image, 1))
    cosines = pipe.rank([CAPTION], expected.images)
    clear_caches()
    with surroundings():
        before = state()
        inside = Pipeline.load(bundle)
        result = inside.generate(CAPTION, **options, prefix=inside.prefix(image, 1))
        samples = inside.sample_tokens([CAPTION], 2)
        chosen = inside.choose(CAPTION, samples.tokens[0], samples.log_likelihoods[0], keep=2)
        ranked = inside.rank([CAPTION], expected.images)
        assert state() == before
    again = inside.generate(CAPTION, **options, prefix=pipe.prefix(image, 1))  # what was kept inside serves outside
    for found in (result, again):
        assert found.candidates == expected.candidates
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.images, expected.images, atol=1e-6, rtol=0)  # threads round in their own ways
    for value in (result.images, result.scores, result.log_likelihoods, samples.log_likelihoods, ranked):
        assert (value.dtype, value.device.type, value.requires_grad) == (torch.float32, "cpu", False)
        assert not value.is_inference()
    torch.testing.assert_close(result.scores, expected.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(ranked, cosines, atol=1e-6, rtol=0)
    assert len(chosen.images) == 2
    assert not any(parameter.is_inference() for parameter in inside.dalle.parameters())


def clear_caches() -> None:
    """Let everything that is computed once be computed again."""
    slot_pattern.cache_clear()
    stored_mask.cache_clear()


@pytest.mark.parametrize("caption", ["", "  \n", "\0", "\u200b", " \ufeff\u200d"])
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


@pytest.mark.parametrize("caption", ["一只猫坐在椅子上", "🦄🌈", "../../etc/passwd", "a\0"])
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


@pytest.fixture
def with_defaults(bundle_copy) -> Callable[..., Pipeline]:
    """Loads a bundle that says of itself how it is sampled."""

    def load(values: object) -> Pipeline:
        dalle = DALLE.load(bundle_copy / "dalle")
        dalle.save(bundle_copy / "dalle", {**dalle.metadata, "sampling": values})
        return Pipeline.load(bundle_copy)

    return load


def test_a_bundle_that_says_nothing_is_sampled_as_in_the_paper(pipe):
    assert pipe.defaults == SamplingDefaults()
    assert same(pipe.generate(CAPTION, n=4, keep=2), pipe.best(request(4), PAPER_SAMPLING, rank="clip"))


def test_a_bundle_is_sampled_and_ranked_as_it_says(pipe, with_defaults):
    chosen = SamplingDefaults(temperature=0.5, top_k=20, top_p=0.9, rank="likelihood")
    own = with_defaults(dataclasses.asdict(chosen))
    assert own.defaults == chosen
    expected = pipe.best(request(6), chosen.sampling(), rank="likelihood")
    assert not same(expected, pipe.generate(CAPTION, n=6, keep=2))
    for result in (own.generate(CAPTION, n=6, keep=2), own.best(request(6))):
        assert same(result, expected)
        assert result.rank == "likelihood"
    samples = own.sample_tokens([CAPTION], 6)
    assert torch.equal(samples.tokens, pipe.sample_tokens([CAPTION], 6, chosen.sampling()).tokens)
    assert same(own.choose(CAPTION, samples.tokens[0], samples.log_likelihoods[0], keep=2), expected)


def test_what_is_given_goes_before_what_a_bundle_says(pipe, with_defaults):
    own = with_defaults({"temperature": 0.5, "top_k": 3, "top_p": 0.5, "rank": "both"})
    settings = {"temperature": 1.0, "top_k": 32, "top_p": 1.0, "rank": "clip"}
    assert same(own.generate(CAPTION, n=6, keep=2, **settings), pipe.generate(CAPTION, n=6, keep=2))
    assert same(own.best(request(6), PAPER_SAMPLING, rank="clip"), pipe.generate(CAPTION, n=6, keep=2))
    cold = own.generate(CAPTION, n=6, keep=2, temperature=0.0)
    assert same(cold, pipe.best(request(6), Sampling(temperature=0.0), rank="both"))


@pytest.mark.parametrize("values", [None, "hot", {"temperature": -1.0}, {"beams": 3}, {"top_k": 33}, {"rank": "best"}])
def test_sampling_defaults_that_cannot_be_used_are_refused(with_defaults, values):
    with pytest.raises(ValueError, match=r'"sampling" in the metadata of its config\.json, cannot be used: .*correct'):
        with_defaults(values)


def test_the_memory_that_is_given_decides_the_batch_size(bundle):
    few = Pipeline.load(bundle, memory=100_000).default_batch_size(1_000)
    more = Pipeline.load(bundle, memory=1_000_000).default_batch_size(1_000)
    assert 1 <= few < more < 1_000
    assert Pipeline.load(bundle, memory=100_000, precision="bf16").default_batch_size(1_000) > few
    with pytest.raises(ValueError, match="memory is 0 bytes"):
        Pipeline.load(bundle, memory=0)


def test_bf16_is_for_the_transformer_and_not_for_clip(bundle, pipe):
    half = Pipeline.load(bundle, precision="bf16")
    assert (half.dalle.dtype, pipe.dalle.dtype) == (torch.bfloat16, torch.float32)
    assert {parameter.dtype for parameter in half.clip.parameters()} == {torch.float32}
    result = half.generate(CAPTION, n=4, keep=2)
    assert result.images.dtype == result.scores.dtype == torch.float32
    torch.testing.assert_close(half.rank([CAPTION], result.images)[0], result.scores, atol=1e-6, rtol=0)


def test_in_bf16_pictures_are_nearly_those_of_fp32_and_a_given_top_is_encoded_in_fp32(bundle, pipe):
    half = Pipeline.load(bundle, precision="bf16")
    tokens = pipe.sample_tokens([CAPTION], 4).tokens[0]
    torch.testing.assert_close(half.decode(tokens), pipe.decode(tokens), atol=0.05, rtol=0)
    assert torch.equal(half.prefix(picture(), 2), pipe.prefix(picture(), 2))


@pytest.mark.parametrize("compile", [False, True])
def test_compile_is_for_sampling_and_decoding(bundle, monkeypatch, compile):
    told = []
    sample = pipeline.sample
    monkeypatch.setattr(bundle_module, "optimised", lambda dvae, **options: told.append(options) or dvae)
    monkeypatch.setattr(
        pipeline,
        "sample",
        lambda *arguments, **options: told.append(options) or sample(*arguments, **{**options, "compile": False}),
    )
    Pipeline.load(bundle, precision="bf16", compile=compile).generate(CAPTION, n=1, keep=1)
    assert [options["compile"] for options in told] == [compile, compile]
    assert told[0]["dtype"] == torch.bfloat16


def test_an_unknown_precision_is_refused(bundle):
    with pytest.raises(ValueError, match="unknown precision 'fp8': give fp32 or bf16"):
        Pipeline.load(bundle, precision="fp8")


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
