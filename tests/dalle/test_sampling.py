import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dalle.family.transformers
from dalle.cache import Decoder
from dalle.model import DALLE, DALLEConfig
from dalle.sampler.draw import draw, filter_logits, guide, uniforms
from dalle.sampling import Sampling, SamplingDefaults, candidate_seed, choose, sample, sample_each
from dalle.stream import null_caption, text_row

CONFIG = DALLEConfig(
    n_layers=4, d_model=32, n_heads=2, text_len=6, grid=4, text_vocab=300, image_vocab=20, conv_kernel=3
)
TEXT = torch.tensor([text_row(ids, 300, 6) for ids in ([1, 2, 3], [7])])


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    model = DALLE(CONFIG)
    model.initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def sampled(model, text, seeds, *, prefix=None, on_step=None, compile=False, **settings):
    return sample(model, text, seeds, Sampling(**settings), prefix=prefix, on_step=on_step, compile=compile).tokens


def seeds(n, n_prompts=2, seed=0):
    return [candidate_seed(seed, f"prompt {p}", k) for p in range(n_prompts) for k in range(n)]


def test_candidate_seeds_differ_and_never_change():
    assert candidate_seed(0, "a red circle", 0) == 4359223354186665131
    assert len({candidate_seed(s, c, k) for s in range(5) for c in ("a", "b") for k in range(50)}) == 500


def test_the_same_seed_gives_the_same_tokens(model):
    first = sampled(model, TEXT, seeds(4))
    assert first.shape == (2, 4, 16)
    assert torch.equal(first, sampled(model, TEXT, seeds(4)))
    assert not torch.equal(first, sampled(model, TEXT, seeds(4, seed=1)))


def test_sixteen_candidates_do_not_share_their_first_token(model):
    assert len(sampled(model, TEXT[:1], seeds(16, 1))[0, :, 0].unique()) > 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_candidate_does_not_depend_on_the_batch_it_is_in(model, guidance):
    together = sampled(model, TEXT, seeds(8), guidance=guidance)
    for p in range(2):
        for k in (0, 5):
            seed = candidate_seed(0, f"prompt {p}", k)
            alone = sampled(model, TEXT[p : p + 1], [seed], guidance=guidance)
            assert torch.equal(alone[0, 0], together[p, k])


def test_temperature_0_ignores_the_seed(model):
    cold = sampled(model, TEXT, seeds(3), temperature=0.0)
    assert torch.equal(cold, sampled(model, TEXT, seeds(3, seed=9), temperature=0.0))
    assert torch.equal(cold[:, 0], cold[:, 2])


def test_top_1_is_argmax(model):
    cold = sampled(model, TEXT, seeds(3), temperature=0.0)
    assert torch.equal(cold, sampled(model, TEXT, seeds(3), top_k=1))
    assert torch.equal(cold, sampled(model, TEXT, seeds(3), top_p=1e-9))


def test_temperature_0_takes_the_likeliest_token_of_the_uncached_model(model):
    tokens = sampled(model, TEXT, seeds(1), temperature=0.0)[:, 0]
    with torch.no_grad():
        assert torch.equal(model(TEXT, tokens)[1].argmax(-1), tokens)


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("m", [0, 1, 8, 16])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_prefix_is_kept_verbatim(model, n_rows, m, guidance):
    prefix = torch.randint(20, (n_rows, m), generator=torch.Generator().manual_seed(1))
    tokens = sampled(model, TEXT, seeds(3), prefix=prefix, guidance=guidance)
    assert torch.equal(tokens[:, :, :m], prefix[:, None].expand(2, 3, m))


def test_a_prefix_may_be_one_row_without_batch_dimension(model):
    prefix = torch.arange(5)
    flat = sampled(model, TEXT, seeds(2), prefix=prefix)
    assert torch.equal(flat, sampled(model, TEXT, seeds(2), prefix=prefix[None]))


def test_completing_a_sample_from_its_own_beginning_gives_it_again(model):
    whole = sampled(model, TEXT, seeds(1), guidance=2.0)
    again = sampled(model, TEXT, seeds(1), guidance=2.0, prefix=whole[:, 0, :6])
    assert torch.equal(again, whole)


def test_guidance_1_is_plain_sampling_and_decodes_nothing_more(model, monkeypatch):
    batches = []

    class Watched(Decoder):
        def step(self, inputs_B):
            batches.append(len(inputs_B))
            return super().step(inputs_B)

    monkeypatch.setattr(dalle.family.transformers, "Decoder", Watched)
    plain = sampled(model, TEXT, seeds(2))
    assert torch.equal(plain, sampled(model, TEXT, seeds(2), guidance=1.0))
    assert set(batches) == {4}
    assert not torch.equal(plain, sampled(model, TEXT, seeds(2), guidance=5.0))
    assert set(batches) == {4, 8}


@pytest.mark.parametrize("m", [0, 5])
def test_cached_guided_logits_equal_uncached_ones(model, m):
    n, guidance = 3, 2.5
    image_tokens = sampled(model, TEXT, seeds(n), guidance=guidance).flatten(0, 1)
    image_tokens[:, :m] = image_tokens[0, :m]
    null = null_caption(300, 6)
    with torch.no_grad():
        conditional = model(TEXT.repeat_interleave(n, dim=0), image_tokens)[1]
        unconditional = model(null.repeat(2 * n, 1), image_tokens)[1]
    expected = (unconditional + guidance * (conditional - unconditional))[:, m:]
    decoder = Decoder(model, torch.cat([TEXT, null[None]]), [n, n, 2 * n], image_tokens[:1, :m].repeat(3, 1))
    start = torch.full((2 * n,), 20)
    inputs = [image_tokens[:, i - 1] if i else start for i in range(m, 16)]
    actual = torch.stack([guide(decoder.step(i.repeat(2)), guidance) for i in inputs], dim=1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_inputs_are_never_modified(model):
    text, prefix = TEXT.clone(), torch.arange(4)[None]
    sampled(model, text, seeds(2), guidance=3.0, prefix=prefix, top_k=5, top_p=0.9)
    assert torch.equal(text, TEXT)
    assert torch.equal(prefix, torch.arange(4)[None])
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    filter_logits(logits, top_k=3, top_p=0.5)
    choose(logits, torch.rand(3, dtype=torch.float64), Sampling(temperature=0.7, top_k=3, top_p=0.5))
    assert torch.equal(logits, kept)


def test_steps_are_reported(model):
    steps = []
    sampled(
        model, TEXT, seeds(1), prefix=torch.zeros(1, 13, dtype=torch.int64),
        on_step=lambda tokens: steps.append(tuple(tokens.shape)),
    )  # fmt: skip
    assert steps == [(2, 14), (2, 15), (2, 16)]


def test_sampled_tokens_can_be_trained_on(model):
    tokens = sampled(model, TEXT, seeds(1))
    model(TEXT, tokens[:, 0])[1].sum().backward()
    model.zero_grad()


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log().repeat(4000, 1)
    tokens = draw(logits, uniforms([3], 4000)[0])
    frequencies = tokens.bincount(minlength=4) / 4000
    assert frequencies.tolist() == pytest.approx([0.5, 0.25, 0.0, 0.25], abs=0.03)


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20), st.sampled_from([0.0, 0.3, 1 - 2**-53]))
def test_impossible_tokens_are_never_drawn(values, uniform):
    logits = torch.tensor([[-torch.inf, *values, -torch.inf]])
    token = draw(logits, torch.tensor([uniform], dtype=torch.float64)).item()
    assert 1 <= token <= len(values)


def test_filters_keep_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def kept(**options):
        return filter_logits(logits, **options)[0].isfinite().nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.65) == [1, 3]
    assert kept(top_p=0.75) == [1, 2, 3]
    assert kept(top_p=1.0) == [0, 1, 2, 3]
    assert kept(top_k=3, top_p=0.4) == [1]
    assert filter_logits(torch.zeros(1, 4), top_k=2)[0].isfinite().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "0 seeds for 2 prompts"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 prompts: expected equally many for each"),
        ({"seeds": [1, -2]}, "must not be negative"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 21}, r"top_k \(21\) must be at most the image vocabulary, 20"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"guidance": -1.0}, "guidance"),
        ({"prefix": torch.zeros(3, 4, dtype=torch.int64)}, r"prefix has shape \(3, 4\)"),
        ({"prefix": torch.zeros(1, 17, dtype=torch.int64)}, "at most 16"),
        ({"prefix": torch.full((1, 4), 20)}, "expected 0 to 19"),
        ({"text": TEXT[:, :4]}, "text has shape"),
    ],
)
def test_options_out_of_range_are_named(model, options, message):
    text = options.pop("text", TEXT)
    with pytest.raises(ValueError, match=message):
        sampled(model, text, **{"seeds": [1, 2], **options})


def test_tokens_are_those_of_the_whole_cumulative_distribution():
    generator = torch.Generator().manual_seed(0)
    for vocab in (5, 128, 1000, 8192):
        logits = 4 * torch.randn(64, vocab, generator=generator)
        numbers = torch.rand(64, dtype=torch.float64, generator=generator)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        reference = torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)[:, 0]
        assert torch.equal(draw(logits, numbers), reference)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("m", [0, 5])
def test_abandoned_candidates_leave_the_others_as_they_were(model, guidance, m):
    options = {"seeds": seeds(6, 1), "guidance": guidance, "prefix": torch.arange(m)}
    half = model.config.stream.n_image // 2
    everything = sampled(model, TEXT[:1], **options)
    seen = []

    def better_half(tokens):
        seen.append(tokens)
        return torch.tensor([1, 4, 5]) if tokens.shape[1] == half else None

    kept = sampled(model, TEXT[:1], **options, on_step=better_half)
    assert torch.equal(kept[0], everything[0, [1, 4, 5]])
    assert [tokens.shape for tokens in seen] == [(6 if n <= half else 3, n) for n in range(m + 1, 2 * half + 1)]
    assert torch.equal(seen[half - m - 1], everything[0, :, :half])


@pytest.mark.slow
def test_sampling_compiles_one_step_and_gives_the_same_tokens(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = sampled(model, TEXT[:1], seeds(3, 1), compile=True)
    # one for the trial whether anything can be compiled, unless an earlier test has made it
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert torch.equal(compiled, sampled(model, TEXT[:1], seeds(3, 1)))


def test_only_candidates_of_one_prompt_are_dropped(model):
    with pytest.raises(ValueError, match="one prompt only, got 2"):
        sampled(model, TEXT, seeds(2), on_step=lambda tokens: torch.arange(1))


@pytest.mark.parametrize(
    "options",
    [
        {"settings": Sampling()},
        {"settings": Sampling(guidance=2.0, temperature=0.7)},
        {"settings": Sampling(guidance=2.0), "prefix": torch.tensor([[7, 0, 5], [5, 5, 1]])},
    ],
)
def test_prompts_with_counts_of_their_own_sample_as_alone(model, options):
    settings, prefix = options["settings"], options.get("prefix")
    own = [seeds(3, 1), seeds(5, 1)]
    together = sample_each(model, TEXT, own, settings, prefix=prefix)
    for p, found in enumerate(together):
        known = None if prefix is None else prefix[p]
        alone = sample(model, TEXT[p : p + 1], own[p], settings, prefix=known)
        assert torch.equal(found.tokens, alone.tokens)
        torch.testing.assert_close(found.log_likelihoods, alone.log_likelihoods, atol=1e-5, rtol=0)


def test_a_prompt_whose_candidates_are_dropped_leaves_the_other_as_it_was(model):
    own = [seeds(3, 1), seeds(5, 1)]
    kept = torch.tensor([0, 3, 4, 5, 6, 7])
    dropped = sample_each(model, TEXT, own, on_step=lambda tokens: kept if tokens.shape == (8, 4) else None)
    whole = sample_each(model, TEXT, own)
    assert [found.tokens.shape[1] for found in dropped] == [1, 5]
    assert torch.equal(dropped[0].tokens, whole[0].tokens[:, :1])
    assert torch.equal(dropped[1].tokens, whole[1].tokens)


def test_what_the_watcher_raises_ends_sampling_at_its_position(model):
    positions = []

    def stop(tokens):
        positions.append(tokens.shape[1])
        if len(positions) == 3:
            raise InterruptedError

    before = sampled(model, TEXT, seeds(2))
    with pytest.raises(InterruptedError):
        sampled(model, TEXT, seeds(2), on_step=stop)
    assert positions == [1, 2, 3]
    assert torch.equal(sampled(model, TEXT, seeds(2)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "options"),
    [
        (1, {}),
        (3, {}),
        (3, {"temperature": 0.5}),
        (3, {"temperature": 0.0}),
        (3, {"top_k": 3}),
        (3, {"top_p": 0.7, "temperature": 0.8}),
        (3, {"guidance": 3.0}),
        (3, {"prefix": torch.tensor([7, 0, 19, 3, 11])}),
        (2, {"prefix": torch.tensor([[7, 0], [5, 5]]), "guidance": 2.0, "top_k": 4}),
        (2, {"prefix": torch.arange(16)}),
    ],
)
def test_log_likelihoods_are_those_of_a_full_pass(model, n, options, dtype):
    prefix = options.get("prefix")
    settings = {name: value for name, value in options.items() if name != "prefix"}
    found = sample(model, TEXT, seeds(n), Sampling(**settings), prefix=prefix)
    m = 0 if prefix is None else prefix.shape[-1]
    expected = full_pass(model, TEXT, found.tokens, dtype)[:, :, m:].sum(-1)
    assert found.log_likelihoods.dtype == torch.float32
    torch.testing.assert_close(found.log_likelihoods, expected.float(), atol=1e-4, rtol=0)


def full_pass(model, text, tokens, dtype):
    """log p of every image token, (P, n, I), by the model itself."""
    exact = copy.deepcopy(model).to(dtype)
    n_prompts, n, n_image = tokens.shape
    with torch.no_grad():
        logits = exact(text.repeat_interleave(n, dim=0), tokens.flatten(0, 1))[1]
    log_p = logits.log_softmax(-1).gather(-1, tokens.flatten(0, 1)[:, :, None])[:, :, 0]
    return log_p.view(n_prompts, n, n_image)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_log_likelihoods_stay_with_those_who_are_not_abandoned(model, guidance):
    settings = Sampling(guidance=guidance)

    def drop_half(tokens):
        return torch.tensor([0, 3, 4]) if tokens.shape[1] == 8 else None

    everything = sample(model, TEXT[:1], seeds(6, 1), settings)
    kept = sample(model, TEXT[:1], seeds(6, 1), settings, on_step=drop_half)
    assert everything.log_likelihoods.shape == (1, 6)
    torch.testing.assert_close(kept.log_likelihoods[0], everything.log_likelihoods[0, [0, 3, 4]], atol=1e-5, rtol=0)


def test_a_thousand_tokens_are_summed_without_loss():
    torch.manual_seed(0)
    config = DALLEConfig(n_layers=1, d_model=8, n_heads=1, text_len=4, grid=32, text_vocab=300, image_vocab=500)
    large = DALLE(config)
    torch.nn.init.normal_(large.image_head.weight)
    text = torch.tensor([text_row([1], 300, 4)])
    found = sample(large, text, [3])
    expected = full_pass(large, text, found.tokens, torch.float64).sum(-1)
    assert found.log_likelihoods.item() < -3_000
    torch.testing.assert_close(found.log_likelihoods, expected.float(), atol=5e-3, rtol=0)


def test_filters_that_keep_everything_change_nothing(model):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filter_logits(logits, top_k=20, top_p=1.0), logits)
    plain = sampled(model, TEXT, seeds(3))
    assert torch.equal(plain, sampled(model, TEXT, seeds(3), top_k=20, top_p=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\)"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, r"top_k \(0\)"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance": 1e30}, r"guidance \(1e\+30\) must be .* at most 1e\+06"),
        ({"seed": None}, "seed is None, of type NoneType; expected a whole number"),
        ({"seed": 1.5}, "seed is 1.5, of type float"),
        ({"temperature": "0.5"}, "temperature is '0.5', of type str; expected a number"),
        ({"temperature": 10**400}, "temperature is a number of more than 308 digits"),
        ({"top_k": 2.5}, "top_k is 2.5, of type float"),
        ({"top_p": True}, "top_p is True, of type bool"),
        ({"guidance": None}, "guidance is None"),
    ],
)
def test_sampling_is_valid_once_built(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("guidance", [1.0, 1e6])
@pytest.mark.parametrize("temperature", [-0.0, 5e-324, 1e-46, 1e-38, 1e-21, 1e-19])
def test_the_smallest_temperatures_take_the_likeliest_token(model, temperature, guidance):
    cold = sampled(model, TEXT, seeds(3), temperature=0.0, guidance=guidance)
    assert torch.equal(cold, sampled(model, TEXT, seeds(3), temperature=temperature, guidance=guidance))


@pytest.mark.parametrize("options", [{"temperature": 1e300}, {"temperature": 3e38}, {"guidance": -0.0}])
def test_numbers_at_the_edge_of_their_range_give_tokens(model, options):
    tokens = sampled(model, TEXT, seeds(3), **options)
    assert 0 <= tokens.min() <= tokens.max() < 20


def test_the_smallest_top_p_takes_the_likeliest_token(model):
    cold = sampled(model, TEXT, seeds(3), temperature=0.0)
    assert torch.equal(cold, sampled(model, TEXT, seeds(3), top_p=5e-324))
    whole = sampled(model, TEXT, seeds(3))
    assert torch.equal(whole, sampled(model, TEXT, seeds(3), top_p=1 - 2**-53))


def test_a_seed_may_be_any_whole_number():
    large = [candidate_seed(seed, "a red circle", 0) for seed in (2**64, 2**64 + 1, -1, 10**1000)]
    assert len({*large, candidate_seed(0, "a red circle", 0)}) == 5
    assert all(0 <= seed < 2**63 for seed in large)


def test_zero_is_written_without_a_sign():
    assert str(SamplingDefaults(temperature=-0.0, guidance=-0.0)) == "temperature 0, guidance 0, ranked by CLIP"


def test_samples_have_a_short_text(model):
    assert repr(sample(model, TEXT, seeds(3))) == "Samples(n=3 of 2 captions, 16 tokens each)"


def test_sampling_does_as_the_paper_unless_told():
    assert dataclasses.asdict(Sampling()) == {
        "seed": 0, "temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0
    }  # fmt: skip
    assert not Sampling().is_guided
    assert Sampling(guidance=0.0).is_guided


def test_sampling_defaults_are_the_papers_and_come_back_from_json():
    assert SamplingDefaults().sampling(3) == Sampling(seed=3)
    assert SamplingDefaults().rank == "clip"
    assert SamplingDefaults.from_json({}) == SamplingDefaults()
    chosen = SamplingDefaults(temperature=0.5, top_k=7, top_p=0.9, guidance=2.0, rank="both")
    for defaults in (SamplingDefaults(), chosen):
        assert SamplingDefaults.from_json(json.loads(json.dumps(dataclasses.asdict(defaults)))) == defaults
    assert chosen.sampling(3) == Sampling(seed=3, temperature=0.5, top_k=7, top_p=0.9, guidance=2.0)
    assert str(chosen) == "temperature 0.5, top-k 7, top-p 0.9, guidance 2, ranked by CLIP and likelihood"


def test_only_what_is_given_takes_the_place_of_a_default():
    chosen = SamplingDefaults(temperature=0.5, top_p=0.9, rank="both")
    assert chosen.updated() == chosen
    assert chosen.updated(temperature=0.0, top_p=1.0) == SamplingDefaults(temperature=0.0, top_p=1.0, rank="both")
    assert chosen.updated(rank="likelihood", top_k=3, guidance=1.0) == dataclasses.replace(
        chosen, rank="likelihood", top_k=3
    )
    with pytest.raises(ValueError, match="unknown ranking 'best'"):
        chosen.updated(rank="best")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "expected an object with temperature, top_k, top_p, guidance, rank, got"),
        ({"beam": 3}, "unknown 'beam': expected temperature"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"temperature": None}, "temperature is None, expected a number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": -1}, r"temperature \(-1\) must be"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"rank": 3}, "rank is 3, expected a string"),
        ({"rank": "best"}, "unknown ranking 'best'"),
    ],
)
def test_damaged_sampling_defaults_are_refused_in_words(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingDefaults.from_json(values)
