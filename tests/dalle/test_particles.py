from itertools import product

import pytest
import torch

from dalle.cache import Decoder
from dalle.family.dalle_pytorch.cache import DALLEPytorchDecoder
from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.family.mini.cache import MiniDecoder
from dalle.family.mini.config import MiniConfig
from dalle.family.mini.model import DALLEMini
from dalle.model import DALLE, DALLEConfig
from dalle.sampler.particles import ancestors, draw_by_weight, effective_number, fill
from dalle.sampling import Sampling, candidate_seed, sample
from dalle.stream import text_row

UNKNOWN = -1
CONFIG = DALLEConfig(n_layers=2, d_model=32, n_heads=2, text_len=4, grid=2, text_vocab=10, image_vocab=3, conv_kernel=3)
TEXT = torch.tensor([text_row([1, 2], 10, 4)])


def decided(config, strength):
    """A model whose tokens depend on each other."""
    generator = torch.Generator().manual_seed(3)
    model = DALLE(config)
    model.initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=strength)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return decided(CONFIG, 0.35)


@pytest.fixture(scope="module")
def larger():
    config = DALLEConfig(
        n_layers=4, d_model=32, n_heads=2, text_len=4, grid=4, text_vocab=10, image_vocab=20, conv_kernel=3
    )
    return decided(config, 0.1)


def seeds(n, seed=0):
    return [candidate_seed(seed, "a caption", k) for k in range(n)]


def log_likelihood(model, tokens):
    """Of each token, by the model without a cache: float64 (N, I)."""
    with torch.no_grad():
        logits = model(TEXT.expand(len(tokens), -1), tokens)[1].double()
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def posterior(model, known, sampling):
    """Marginals (unknown, V) of the unknown tokens, by enumeration of all pictures."""
    n_image, vocab = model.config.stream.n_image, model.config.image_vocab
    pictures = torch.tensor(list(product(range(vocab), repeat=n_image)))
    with torch.no_grad():
        logits = model(TEXT.expand(len(pictures), -1), pictures)[1].double()
    drawn, weighing = (
        (logits / t).log_softmax(-1).gather(-1, pictures[..., None])[..., 0] for t in (sampling.temperature, 1.0)
    )
    is_known = known >= 0
    fits = (pictures == known)[:, is_known].all(1)
    joint = torch.where(is_known, weighing, drawn).sum(1).exp() * fits
    joint /= joint.sum()
    return torch.stack(
        [
            torch.stack([joint[pictures[:, i] == v].sum() for v in range(vocab)])
            for i in range(n_image)
            if not is_known[i]
        ]
    )


def estimates(model, known, sampling, *, populations, n, naive=False):
    """Marginals of the unknown tokens by several independent populations, (populations, unknown, V)."""
    found = []
    for population in range(populations):
        below = 0.0 if naive else 0.5
        particles = fill(model, TEXT, known, seeds(n, population), sampling, resample_below=below)
        weights = particles.log_weights.softmax(0)
        if naive:
            weights = torch.full_like(weights, 1 / n)
        shown = torch.nn.functional.one_hot(particles.tokens[:, known < 0], model.config.image_vocab).double()
        found.append((shown * weights[:, None, None]).sum(0))
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("known", [(-1, 2, -1, 0), (-1, -1, -1, 1), (0, -1, 2, 1)], ids=str)
def test_marginals_are_those_of_the_posterior(model, known, temperature):
    known, sampling = torch.tensor(known), Sampling(temperature=temperature)
    exact = posterior(model, known, sampling)
    found = estimates(model, known, sampling, populations=24, n=512)
    # five standard errors of the mean of the populations, and their bias, which is of the order 1/n
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 5 * error + 2 / 512).all()


@pytest.mark.slow
def test_naive_forcing_has_other_marginals(model):
    known, sampling = torch.tensor([UNKNOWN, 2, UNKNOWN, 0]), Sampling()
    exact = posterior(model, known, sampling)
    naive = estimates(model, known, sampling, populations=24, n=512, naive=True)
    by_weight = estimates(model, known, sampling, populations=24, n=512)
    off = (naive.mean(0) - exact).abs().max()
    assert off > 0.1
    assert (by_weight.mean(0) - exact).abs().max() < 0.1 * off


def test_weights_estimate_the_probability_of_what_is_known(model):
    known = torch.tensor([UNKNOWN, 2, UNKNOWN, 0])
    pictures = torch.tensor([[a, 2, b, 0] for a in range(3) for b in range(3)])
    exact = log_likelihood(model, pictures).sum(1).exp().sum()
    found = torch.stack(
        [fill(model, TEXT, known, seeds(256, s), Sampling()).log_weights.exp().mean() for s in range(24)]
    )
    assert (found.mean() - exact).abs() < 5 * found.std() / 24**0.5


def test_nothing_known_is_plain_sampling_of_the_same_seeds(larger):
    unknown = torch.full((16,), UNKNOWN)
    for sampling in (Sampling(), Sampling(temperature=0.5, top_k=7, guidance=2.0)):
        particles = fill(larger, TEXT, unknown, seeds(6), sampling)
        plain = sample(larger, TEXT, seeds(6), sampling)
        assert torch.equal(particles.tokens, plain.tokens[0])
        assert torch.equal(particles.log_likelihoods, plain.log_likelihoods[0])
        assert torch.equal(draw_by_weight(particles.log_weights, seeds(6)), torch.arange(6))


def test_known_rows_at_the_top_are_completed_as_a_prefix(larger):
    top = torch.randint(20, (8,), generator=torch.Generator().manual_seed(0))
    particles = fill(larger, TEXT, torch.cat([top, torch.full((8,), UNKNOWN)]), seeds(6), Sampling())
    completed = sample(larger, TEXT, seeds(6), prefix=top)
    assert torch.equal(particles.tokens, completed.tokens[0])
    assert torch.equal(particles.log_likelihoods, completed.log_likelihoods[0])


def test_everything_known_stays(larger):
    tokens = torch.randint(20, (16,), generator=torch.Generator().manual_seed(0))
    particles = fill(larger, TEXT, tokens, seeds(2), Sampling())
    assert torch.equal(particles.tokens, tokens.expand(2, -1))
    assert particles.log_likelihoods.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_likelihoods_after_resampling_are_those_without_a_cache(larger, guidance):
    known = torch.randint(20, (16,), generator=torch.Generator().manual_seed(0))
    known[[2, 5, 6, 9, 10, 12]] = UNKNOWN
    particles = fill(larger, TEXT, known, seeds(16), Sampling(guidance=guidance), resample_below=1.0)
    assert particles.n_resamplings > 0
    assert torch.equal(particles.tokens[:, known >= 0], known[known >= 0].expand(16, -1))
    uncached = log_likelihood(larger, particles.tokens)[:, 2:].sum(1)
    torch.testing.assert_close(particles.log_likelihoods.double(), uncached, atol=1e-3, rtol=1e-4)


def test_weights_without_resampling_are_likelihoods_of_known_tokens(larger):
    known = torch.randint(20, (16,), generator=torch.Generator().manual_seed(0))
    known[[2, 5, 6]] = UNKNOWN
    particles = fill(larger, TEXT, known, seeds(8), Sampling(temperature=0.7), resample_below=0.0)
    of_known = log_likelihood(larger, particles.tokens)[:, (known >= 0) & (torch.arange(16) > 2)].sum(1)
    torch.testing.assert_close(particles.log_weights, of_known, atol=1e-3, rtol=1e-4)


def test_a_population_is_a_function_of_its_seeds(larger):
    known = torch.randint(20, (16,), generator=torch.Generator().manual_seed(0))
    known[[2, 5, 6, 9]] = UNKNOWN
    first, again, other = (fill(larger, TEXT, known, seeds(12, s), Sampling(), resample_below=1.0) for s in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_weights, again.log_weights)
    assert not torch.equal(first.tokens, other.tokens)


def test_resampling_draws_by_weight_as_evenly_as_can_be():
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    for uniform in (0.0, 0.37, 0.999999):
        counts = ancestors(weights.log(), uniform).bincount(minlength=4)
        assert ((counts - 4 * weights).abs() < 1).all()
        assert counts[3] == 0
    assert effective_number(weights.log()) == pytest.approx(1 / 0.38)
    assert effective_number(torch.full((7,), -1000.0, dtype=torch.float64)) == pytest.approx(7)


def paper():
    return decided(CONFIG, 0.35), Decoder, TEXT


def mini():
    config = MiniConfig(
        encoder_layers=1,
        decoder_layers=2,
        d_model=16,
        n_heads=2,
        d_glu=24,
        text_len=4,
        grid=2,
        text_vocab=10,
        image_vocab=3,
    )
    return DALLEMini(config), MiniDecoder, torch.tensor([config.text_rows([[4, 5]])[0].tolist()])


def pytorch():
    config = DALLEPytorchConfig(
        n_layers=2,
        d_model=16,
        n_heads=2,
        d_head=8,
        text_len=4,
        grid=2,
        text_vocab=10,
        image_vocab=3,
        kinds=("full", "axial_row"),
        attention_of_layer=(0, 1),
        mlp_of_layer=(0, 1),
        shifts_tokens=True,
    )
    return DALLEPytorch(config), DALLEPytorchDecoder, config.text_rows([[4, 5]])


@pytest.mark.parametrize("make", [paper, mini, pytorch])
def test_any_decoder_goes_on_from_other_candidates(make):
    torch.manual_seed(0)
    model, kind, text = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tokens = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 1]])
    order = torch.tensor([2, 2, 0])

    def logits(rows, reordered):
        decoder = kind(model, text, [3])
        decoder.step(torch.full((3,), model.config.image_vocab))
        decoder.step(rows[:, 0])
        if reordered is not None:
            decoder.reorder(reordered)
            rows = rows[reordered]
        decoder.step(rows[:, 1])
        return decoder.step(rows[:, 2])

    assert torch.equal(logits(tokens, order), logits(tokens[order], None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"known": torch.zeros(15, dtype=torch.int64)}, "known has shape"),
        ({"known": torch.full((16,), 20)}, "known has ids from"),
        ({"known": torch.zeros(16)}, "expected torch.int64"),
        ({"seeds": []}, "0 seeds"),
        ({"seeds": [-1]}, "seeds of at least 0"),
        ({"sampling": Sampling(top_k=21)}, "top_k"),
        ({"text": TEXT.repeat(2, 1)}, "2 prompts"),
    ],
)
def test_what_cannot_be_filled_is_refused_in_words(larger, change, message):
    arguments = {"text": TEXT, "known": torch.full((16,), UNKNOWN), "seeds": [1], "sampling": Sampling()} | change
    with pytest.raises(ValueError, match=message):
        fill(larger, **arguments)
