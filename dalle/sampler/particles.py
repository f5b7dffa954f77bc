"""Image tokens of which any may be known: sequential Monte Carlo in raster order.

A candidate that is sampled in raster order does not know which tokens are given further on. So candidates are
particles: known tokens are forced, and weigh a particle by their probability after what it has drawn; when few
particles hold most of the weight, all go on from particles drawn by weight. With the weights, the particles are a
sample of p(unknown | known, caption), the better the more there are.

What is drawn follows the settings (temperature, top-k, top-p, guidance); the weights are of the unmodified model, which
rules out no known token. So the distribution is that of the settings, times the model's likelihood of the known tokens;
at the paper's settings it is the model's own.

Source: Doucet, de Freitas & Gordon 2001, Sequential Monte Carlo Methods in Practice, §1.3 (bootstrap filter, effective
sample size); systematic resampling: Kitagawa 1996. Not in the paper.

Legend: N particles  I image positions  J positions so far  T text positions  V image vocabulary
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.family.transformers import Transformer
from dalle.sampler.draw import guide, uniforms
from dalle.sampling import Sampling, check_top_k, choose, decoder_of, undisturbed
from dalle.stream import check_ids, start_of_image_id

RESAMPLE_BELOW = 0.5
"""Share of the particles that the effective number falls below before they are resampled."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Particles:
    """A population."""

    tokens: Tensor
    """int64 (N, I), raster order."""
    log_weights: Tensor
    """float64 (N,): the mean of their exponentials estimates, without bias, p(known tokens after the first unknown one
    | those before it, caption). So populations are joined by joining these."""
    log_likelihoods: Tensor
    """float32 (N,), nats: log p of all tokens from the first unknown one on, under the unmodified model."""
    n_resamplings: int
    """How often all went on from particles drawn by weight."""

    def __repr__(self) -> str:
        effective = effective_number(self.log_weights)
        return f"Particles({len(self.tokens)}, {effective:.1f} effective, resampled {self.n_resamplings} times)"


def effective_number(log_weights_N: Tensor) -> float:
    """Return how many equally weighted particles weights are worth, (Σw)² / Σw²: 1 to N."""
    return float((2 * log_weights_N.logsumexp(0) - (2 * log_weights_N).logsumexp(0)).exp())


def ancestors(log_weights_N: Tensor, uniform: float) -> Tensor:
    """Draw N particles by weight, as evenly as can be: number i by where (i + uniform) / N falls in the weights' sums.

    Returns:
        int64 (N,), ascending, with repetition; of weight w, ⌊wN⌋ or ⌈wN⌉ times.
    """
    sums_N = log_weights_N.softmax(0).cumsum(0)
    places_N = (torch.arange(len(sums_N), device=sums_N.device, dtype=sums_N.dtype) + uniform) / len(sums_N)
    return torch.searchsorted(sums_N / sums_N[-1], places_N, right=True).clamp(max=len(sums_N) - 1)


def fill(
    model: Transformer,
    text: Tensor,
    known: Tensor,
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    resample_below: float = RESAMPLE_BELOW,
    on_step: Callable[[Tensor], None] | None = None,
    compile: bool = False,
) -> Particles:
    """Draw the unknown image tokens of one prompt, with a population of particles.

    If no known token follows an unknown one, the tokens are those that `sample` draws with the same seeds.

    Args:
        model: the transformer; sampling happens on its device and in its dtype.
        text: int64 (1, T), text ids.
        known: int64 (I,), image tokens; -1 where one is unknown.
        seeds: N of them, one for each particle: see `candidate_seed`. A particle that goes on from another keeps its
            own; when to go on from which depends on all.
        sampling: how unknown tokens are drawn; its `seed` is not read.
        resample_below: share of N; at 0 particles are weighted, never resampled.
        on_step: told the tokens so far, int64 (N, J), after each position; what it raises ends the sampling.
        compile: see `Decoder`.

    Returns:
        The particles, on the model's device.

    Raises:
        ValueError: for an argument out of range.
    """
    config = model.config
    check_ids("text", text, config.text_len, config.n_text_ids)
    check_ids("known", known[None].clamp(min=0), config.stream.n_image, config.image_vocab)
    if len(text) != 1 or not seeds or min(seeds) < 0:
        raise ValueError(f"{len(text)} prompts and {len(seeds)} seeds: expected one prompt, and seeds of at least 0")
    check_top_k(sampling.top_k, config.image_vocab)
    text, known = text.to(model.device), known.to(model.device)
    is_known = (known >= 0).tolist()
    first = is_known.index(False) if False in is_known else len(is_known)
    n, generator = len(seeds), _resampling(seeds)
    n_resamplings = 0
    with undisturbed(), torch.inference_mode():
        uniforms_NI = uniforms(seeds, len(is_known)).to(model.device)
        tokens_NI = known.repeat(n, 1)
        log_weights_N, log_likelihoods_N = (torch.zeros(n, dtype=torch.float64, device=model.device) for _ in range(2))
        if first < len(is_known):
            decoder = decoder_of(model, text, [n], known[None, :first], guided=sampling.is_guided, compile=compile)
        for position in range(first, len(is_known)):
            if not is_known[position] and effective_number(log_weights_N) < resample_below * n:
                from_N = ancestors(log_weights_N, generator.random())
                decoder.reorder(torch.cat([from_N, n + from_N]) if sampling.is_guided else from_N)
                tokens_NI, log_likelihoods_N = tokens_NI[from_N], log_likelihoods_N[from_N]
                log_weights_N = torch.full_like(log_weights_N, float(log_weights_N.logsumexp(0)) - math.log(n))
                n_resamplings += 1
            if position > 0:
                inputs_N = tokens_NI[:, position - 1]
            else:
                inputs_N = torch.full_like(tokens_NI[:, 0], start_of_image_id(config.image_vocab))
            logits_NV = decoder.step(inputs_N.repeat(2) if sampling.is_guided else inputs_N)
            conditional_NV = logits_NV[:n]
            if not is_known[position]:
                if sampling.is_guided:
                    logits_NV = guide(logits_NV, sampling.guidance)
                tokens_NI[:, position] = choose(logits_NV, uniforms_NI[:, position], sampling)
            gained_N = -F.cross_entropy(conditional_NV, tokens_NI[:, position], reduction="none")
            log_likelihoods_N += gained_N
            if is_known[position]:
                log_weights_N += gained_N
            if on_step is not None:
                on_step(tokens_NI[:, : position + 1])
    return Particles(
        tokens=tokens_NI.clone(),
        log_weights=log_weights_N.clone(),
        log_likelihoods=log_likelihoods_N.float(),
        n_resamplings=n_resamplings,
    )


def draw_by_weight(log_weights_N: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draw as many particles as there are by weight; returns those drawn, int64, ascending, each once.

    Args:
        log_weights_N: of all populations together.
        seeds: of all particles.
    """
    drawn: Tensor = torch.unique(ancestors(log_weights_N, _resampling(seeds, 1).random()))
    return drawn


def _resampling(seeds: Sequence[int], stage: int = 0) -> np.random.Generator:
    """Return what decides which particles go on, a function of all seeds; another than that of any one's tokens."""
    return np.random.default_rng(np.random.SeedSequence(seeds, spawn_key=(stage,)))
