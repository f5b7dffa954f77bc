"""Sampling image tokens: temperature, top-k, top-p, guidance, and the policy of randomness.

Ramesh et al. 2021 (§2.6, §3.3) sample at temperature 1 without truncation; those are the defaults.

Randomness: a candidate has a seed (`candidate_seed` of the run's seed, the caption and the candidate's
number). Its generator yields one uniform number per image position, all drawn beforehand, and position i's
token is where the cumulative distribution passes the i-th of them. So a candidate does not depend on which
others are sampled beside it or on the batch size, up to the rounding of matrix products.

Likelihood: beside its tokens a candidate has log p(tokens | caption) under the model itself, whatever it was sampled
with: a step's logits serve both. Not in the paper, which ranks by CLIP alone.

Guidance: logits = unconditional + scale · (conditional - unconditional), Ho & Salimans 2021 applied to token
logits. The unconditional half is the same model given the empty caption, which it must have met in training.
Not in the paper.

Legend: P prompts  n candidates per prompt  B = P·n  I image positions  m known image positions  V image vocabulary
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.cache import Decoder
from dalle.candidates import Samples, Sampling, check_top_k
from dalle.model import DALLE, check_ids
from dalle.stream import n_text_ids, null_caption, start_of_image_id

DRAW_BLOCK = 128
"""Tokens whose probabilities are summed at a time when one is drawn."""


def candidate_seed(seed: int, caption: str, k: int) -> int:
    """Return the seed of candidate `k` of a caption in a run with `seed`: 63 bits, equal on every machine."""
    digest = blake2b(f"{seed}\0{k}\0{caption}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(seeds: Sequence[int], n_image: int) -> Tensor:
    """Return the random numbers of candidates, float64 in [0, 1), (B, I): row b depends on seeds[b] alone."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(n_image) for seed in seeds]))


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return the logits with -inf where a token is ruled out.

    Args:
        logits: float (B, V).
        top_k: keep the k likeliest tokens; of equally likely ones those with the lower id. None keeps all, as does the
            size of the vocabulary.
        top_p: keep the fewest likeliest tokens whose probability reaches p (Holtzman et al. 2020), at least
            one; applied to what top_k leaves. None keeps all, as does 1.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        kth_B1 = logits.topk(top_k, dim=-1).values[:, -1:]
        n_likelier_B1 = (logits > kth_B1).sum(-1, keepdim=True)
        is_kth_BV = logits == kth_B1
        is_late_BV = is_kth_BV & (is_kth_BV.cumsum(-1) > top_k - n_likelier_B1)
        logits = logits.masked_fill((logits < kth_B1) | is_late_BV, -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = logits.sort(dim=-1, descending=True, stable=True)
        probabilities_BV = sorted_BV.double().softmax(-1)
        likelier_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        likelier_BV[:, 0] = 0.0  # exactly, so that the likeliest token always stays
        sorted_BV = sorted_BV.masked_fill(likelier_BV >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order_BV, sorted_BV)
    return logits


def draw(logits: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return one token per row by inverting the cumulative distribution.

    Args:
        logits: float (B, V); tokens at -inf are never drawn.
        uniforms_B: float64 (B,) in [0, 1).

    Returns:
        int64 (B,).
    """
    # In two steps, over blocks of tokens and within the block. A float32 sum of a block is exact to its last bits; over
    # all 8,192 tokens its rounding would be larger than rare tokens' probabilities, so those sums are float64.
    weights_BV = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    if missing := -weights_BV.shape[1] % DRAW_BLOCK:
        weights_BV = F.pad(weights_BV, (0, missing))
    weights_BXY = weights_BV.view(len(logits), -1, DRAW_BLOCK)
    up_to_BX = weights_BXY.sum(dim=-1).double().cumsum(-1)
    # At most 1 - 2^-53 times the total, which rounds to less than the total: some block is always past it.
    threshold_B1 = uniforms_B[:, None] * up_to_BX[:, -1:]
    block_B1 = torch.searchsorted(up_to_BX, threshold_B1, right=True)
    rest_B1 = threshold_B1 - F.pad(up_to_BX, (1, 0)).gather(1, block_B1)
    within_BY = weights_BXY.take_along_dim(block_B1[:, :, None], dim=1)[:, 0].double().cumsum(-1)
    # The block's sum and the last of its cumulative ones may differ in their last bits.
    rest_B1 = torch.minimum(rest_B1, within_BY[:, -1:].nextafter(torch.zeros_like(rest_B1)))
    tokens_B1 = block_B1 * DRAW_BLOCK + torch.searchsorted(within_BY, rest_B1, right=True)
    return tokens_B1[:, 0]


def choose(logits: Tensor, uniforms_B: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Return one token per row, int64 (B,): the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    return draw(filter_logits(logits, top_k, top_p), uniforms_B)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Return guided logits (B, V) from those of B conditional rows and then B unconditional ones, (2B, V)."""
    conditional_BV, unconditional_BV = logits.chunk(2)
    return unconditional_BV + guidance * (conditional_BV - unconditional_BV)


def sample(
    model: DALLE,
    text: Tensor,
    *,
    seeds: Sequence[int],
    n: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    prefix: Tensor | None = None,
    on_step: Callable[[int, int], None] | None = None,
    abandon: Callable[[Tensor], Tensor] | None = None,
    compile: bool = False,
) -> Samples:
    """Sample n candidates of each prompt, all as one batch; the caller decides how many fit.

    Args:
        model: the transformer; sampling happens on its device and in its dtype.
        text: int64 (P, T), text ids of the prompts.
        seeds: P·n seeds, prompt by prompt; see `candidate_seed`.
        n: candidates per prompt.
        temperature: divides the logits; 0 takes the likeliest token and ignores the seeds.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        guidance: 1 is none and costs nothing; above 1 follows the caption more closely, at twice the
            computation.
        prefix: int64 (m,), (1, m) or (P, m): the first m image tokens, kept verbatim. The paper completes pictures
            from 480.
        on_step: called with (step, total) after each of the `total` sampled positions, from step 1.
        abandon: for one prompt only: called once, when the first half of the grid's rows is sampled, with their tokens
            int64 (n, I/2); returns the int64 numbers, ascending, of the candidates to go on with. Not called if the
            prefix is as long. What is left is no longer a sample of the model's distribution.
        compile: see `Decoder`.

    Returns:
        The image tokens and log-likelihoods of P times n candidates, those that were not abandoned, on the model's
        device. A log-likelihood is that of the sampled tokens: those of the prefix are given, and do not count.

    Raises:
        ValueError: for an argument out of range.
    """
    config = model.config
    check_ids("text", text, config.text_len, n_text_ids(config.text_vocab, config.text_len))
    _check_options(model, len(text), n, seeds, temperature, top_k, top_p, guidance)
    text = text.to(model.device)
    n_image = config.stream.n_image
    known = torch.empty(0, dtype=torch.int64) if prefix is None else prefix
    known = known[None] if known.ndim == 1 else known
    _check_prefix(model, known, len(text))
    known = known.to(model.device)
    guided = guidance != 1.0
    if abandon is not None and len(text) != 1:
        raise ValueError(f"abandon is for one prompt, got {len(text)}")
    m = known.shape[1]
    halfway = config.grid // 2 * config.grid
    with torch.inference_mode():
        uniforms_BI = uniforms(seeds, n_image).to(model.device)
        tokens_BI = torch.zeros((len(text) * n, n_image), dtype=torch.int64, device=model.device)
        tokens_BI[:, :m] = known.expand(len(text), -1).repeat_interleave(n, dim=0)
        log_likelihoods_B = torch.zeros(len(tokens_BI), dtype=torch.float64, device=model.device)
        decoder = _decoder(model, text, n, known, guided=guided, compile=compile)
        inputs_B = torch.full_like(tokens_BI[:, 0], start_of_image_id(config.image_vocab))
        for position in range(m, n_image):
            if abandon is not None and position == halfway > m:
                kept_B = abandon(tokens_BI[:, :halfway].clone()).to(model.device)
                decoder.keep(torch.cat([kept_B, len(tokens_BI) + kept_B]) if guided else kept_B)
                tokens_BI, uniforms_BI = tokens_BI[kept_B], uniforms_BI[kept_B]
                log_likelihoods_B = log_likelihoods_B[kept_B]
            if position > 0:
                inputs_B = tokens_BI[:, position - 1]
            logits_BV = decoder.step(inputs_B.repeat(2) if guided else inputs_B)
            conditional_BV = logits_BV[: len(tokens_BI)]
            if guided:
                logits_BV = guide(logits_BV, guidance)
            tokens_B = choose(logits_BV, uniforms_BI[:, position], temperature, top_k, top_p)
            tokens_BI[:, position] = tokens_B
            log_likelihoods_B -= F.cross_entropy(conditional_BV, tokens_B, reduction="none")
            if on_step is not None:
                on_step(position - m + 1, n_image - m)
    # Outside inference mode: a caller may feed these to modules that keep them for a backward pass.
    tokens_PNI = tokens_BI.clone().reshape(len(text), -1, n_image)
    return Samples(tokens=tokens_PNI, log_likelihoods=log_likelihoods_B.float().reshape(len(text), -1))


def _decoder(model: DALLE, text_PT: Tensor, n: int, prefix: Tensor, *, guided: bool, compile: bool) -> Decoder:
    """Return a decoder of n candidates per prompt, followed, if guided, by as many with the empty caption."""
    n_prompts = len(text_PT)
    counts = [n] * n_prompts
    prefix_Pm = prefix.expand(n_prompts, -1)
    if guided:
        # The empty caption is read once for all candidates, or once per known prefix.
        n_null = len(prefix)
        config = model.config
        null_T = null_caption(config.text_vocab, config.text_len).to(text_PT.device)
        text_PT = torch.cat([text_PT, null_T.expand(n_null, -1)])
        counts = counts + [n_prompts * n // n_null] * n_null
        prefix_Pm = torch.cat([prefix_Pm, prefix])
    return Decoder(model, text_PT, counts, prefix_Pm, compile=compile)


def _check_options(
    model: DALLE,
    n_prompts: int,
    n: int,
    seeds: Sequence[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    guidance: float,
) -> None:
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1: the number of candidates per caption")
    if len(seeds) != n_prompts * n:
        raise ValueError(
            f"{len(seeds)} seeds for {n_prompts} prompts with {n} candidates each: expected {n_prompts * n}"
        )
    if min(seeds) < 0:
        raise ValueError(f"seeds must not be negative, got {min(seeds)}")
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)  # checks their ranges
    check_top_k(top_k, model.config.image_vocab)


def _check_prefix(model: DALLE, prefix: Tensor, n_prompts: int) -> None:
    config = model.config
    n_image = config.stream.n_image
    if prefix.ndim != 2 or len(prefix) not in (1, n_prompts) or prefix.shape[1] > n_image:
        raise ValueError(
            f"prefix has shape {tuple(prefix.shape)}, expected (m,), (1, m) or ({n_prompts}, m) with m at most"
            f" {n_image}, the image tokens of a picture"
        )
    check_ids("prefix", prefix, prefix.shape[1], config.image_vocab)
