"""Sampling image tokens: temperature, top-k, top-p, guidance, and the policy of randomness.

Ramesh et al. 2021 (§2.6, §3.3) sample at temperature 1 without truncation; those are the defaults.

Randomness: a candidate has a seed (`candidate_seed` of the run's seed, the caption and the candidate's number). Its
generator yields one uniform number per image position, all drawn beforehand; position i's token is where the
cumulative distribution passes the i-th. So a candidate depends neither on the others in its batch nor on their
number, up to the rounding of matrix products.

Likelihood: each candidate comes with log p(tokens | caption) under the unmodified model, from the logits that sampling
computes anyway. Not in the paper, which ranks by CLIP alone.

Guidance: logits = unconditional + scale · (conditional - unconditional), Ho & Salimans 2021 applied to token
logits. The unconditional half is the same model given the empty caption, which it must have met in training.
Not in the paper.

Legend: P prompts  n candidates per prompt  B = P·n  I image positions  m known image positions  V image vocabulary
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.family.transformers import Decoding, Transformer, decoding
from dalle.stream import check_ids, start_of_image_id
from storage.errors import check_number, check_whole

DRAW_BLOCK = 128
"""Tokens whose probabilities are summed at a time when one is drawn."""
DRAWING_BYTES = 64
"""Peak memory of a candidate per entry of the image vocabulary while a token is drawn: logits as they come, guided,
divided by the temperature and sorted (float32), their order (int64), probabilities and their sums (float64, and once
sorted)."""
MIN_TEMPERATURE = 1e-20
"""Lower ones count as 0: a logit divided by them could be infinite, and no token but the likeliest has a chance."""
MAX_GUIDANCE = 1e6
"""With more, logits could be infinite; long before, the likeliest token is always taken."""

OnStep = Callable[[Tensor], Tensor | None]
"""Called after each sampled position with the tokens so far, int64 (B, J); returns the rows to continue with, int64 in
ascending order, or None for all."""

Ranking = Literal["clip", "likelihood", "both"]
"""Best first by CLIP's cosine of caption and picture, by the transformer's log p(tokens | caption), or by the mean of
the two places."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings that a candidate's tokens depend on."""

    seed: int = 0
    """Same seed, same candidates, however many are sampled."""
    temperature: float = 1.0
    """Logits are divided by it; below 1 is less varied, and 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only; None, or the size of the vocabulary, for all."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability only; None or 1 for all."""
    guidance: float = 1.0
    """How far to go from "no caption" towards the caption; 1 is plain sampling. Anything else takes a second pass, and
    a model that saw empty captions in training."""

    def __post_init__(self) -> None:
        check_whole("seed", self.seed)
        check_number("temperature", self.temperature)
        check_number("guidance", self.guidance)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature ({self.temperature}) must be at least 0 (0: the likeliest token) and finite")
        if self.top_k is not None:
            check_whole("top_k", self.top_k)
            if self.top_k < 1:
                raise ValueError(f"top_k ({self.top_k}) must be at least 1; leave it out for all tokens")
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1; leave it out for all tokens")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance ({self.guidance}) must be at least 0 (1: none) and at most {MAX_GUIDANCE:g}")

    @property
    def is_guided(self) -> bool:
        """Whether each candidate is computed twice: with its caption and without."""
        return self.guidance != 1


PAPER_SAMPLING = Sampling()
"""As the paper samples (§2.6, §3.3): temperature 1, all tokens."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a bundle is sampled and ranked unless told otherwise; the defaults are the paper's.

    A recipe has them, a bundle keeps them in the metadata of its transformer.
    """

    temperature: float = 1.0
    """See `Sampling`, also for the next three."""
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    rank: Ranking = "clip"
    """What is best."""

    def __post_init__(self) -> None:
        self.sampling()  # checks the ranges
        check_ranking(self.rank)

    def sampling(self, seed: int = 0) -> Sampling:
        """Return the sampling settings of a run with this seed."""
        return Sampling(
            seed=seed, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, guidance=self.guidance
        )

    def updated(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        rank: Ranking | None = None,
    ) -> Self:
        """Replace the settings that are given; None keeps this one's.

        Raises:
            ValueError: a setting is out of range.
        """
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        options["rank"] = rank
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Read the JSON of `dataclasses.asdict`; missing settings are the paper's.

        Raises:
            ValueError: an unknown setting, a value of another type, or one out of range.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise ValueError(f"expected an object with {', '.join(known)}, got {values!r}")
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"unknown {', '.join(map(repr, unknown))}: expected {', '.join(known)}")
        kinds: dict[str, tuple[type, ...]] = {"top_k": (int, type(None)), "top_p": (int, float, type(None))}
        for name, value in values.items():
            expected = (str,) if name == "rank" else kinds.get(name, (int, float))
            if type(value) not in expected:
                wanted = {"rank": "a string", "top_k": "a whole number"}.get(name, "a number")
                raise ValueError(f"{name} is {value!r}, expected {wanted}")
        return cls(**values)

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature + 0:g}"]  # -0.0 too is 0
        parts += [f"top-k {self.top_k}"] if self.top_k is not None else []
        parts += [f"top-p {self.top_p:g}"] if self.top_p is not None else []
        parts += [f"guidance {self.guidance + 0:g}"] if self.guidance != 1 else []
        ranked_by = {"clip": "CLIP", "likelihood": "likelihood", "both": "CLIP and likelihood"}[self.rank]
        return f"{', '.join(parts)}, ranked by {ranked_by}"


def check_ranking(rank: str) -> None:
    """Raise ValueError for an unknown ranking."""
    if rank not in get_args(Ranking):
        raise ValueError(f"unknown ranking {rank!r}: give {' or '.join(get_args(Ranking))}")


def check_top_k(top_k: int | None, vocab: int) -> None:
    """Raise ValueError if top_k is above the number of image tokens."""
    if top_k is not None and top_k > vocab:
        raise ValueError(f"top_k ({top_k}) must be at most the image vocabulary, {vocab}; give {vocab} for all tokens")


@dataclass(frozen=True, kw_only=True, repr=False)
class Samples:
    """The candidates of P captions, n of each."""

    tokens: Tensor
    """int64 (P, n, I), raster order."""
    log_likelihoods: Tensor
    """float32 (P, n), nats: log p(tokens | caption), summed over the sampled tokens, under the transformer at
    temperature 1, over all tokens and without guidance, whatever they were sampled with."""

    def __repr__(self) -> str:
        return f"Samples(n={self.tokens.shape[1]} of {len(self.tokens)} captions, {self.tokens.shape[2]} tokens each)"


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


def choose(logits: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Return one token per row of logits (B, V), int64 (B,): the likeliest at temperature 0, else a drawn one."""
    if sampling.temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    return draw(filter_logits(logits, sampling.top_k, sampling.top_p), uniforms_B)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Return guided logits (B, V) from those of B conditional rows and then B unconditional ones, (2B, V)."""
    conditional_BV, unconditional_BV = logits.chunk(2)
    return unconditional_BV + guidance * (conditional_BV - unconditional_BV)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute without gradients and outside of the caller's inference mode, autocast and default device: these stay."""
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def sample(
    model: Transformer,
    text: Tensor,
    seeds: Sequence[int],
    sampling: Sampling = PAPER_SAMPLING,
    *,
    prefix: Tensor | None = None,
    on_step: OnStep | None = None,
    compile: bool = False,
) -> Samples:
    """Sample the same number of candidates for each prompt, all as one batch; the caller decides how many fit.

    Args:
        model: the transformer; sampling happens on its device and in its dtype.
        text: int64 (P, T), text ids of the prompts.
        seeds: of the candidates, n for each prompt, prompt by prompt: see `candidate_seed`.
        sampling: the settings; their `seed` is not read, the candidates have their own.
        prefix: int64 (m,), (1, m) or (P, m): the first m image tokens, kept verbatim. The paper completes pictures
            from 480.
        on_step: watches, and may drop candidates of a single prompt. Survivors of a choice are no sample of the
            model's distribution.
        compile: see `Decoder`.

    Returns:
        The image tokens and log-likelihoods of the candidates that were not dropped, on the model's device. A
        log-likelihood counts the sampled tokens, not those of the prefix.

    Raises:
        ValueError: for an argument out of range.
    """
    config = model.config
    check_ids("text", text, config.text_len, config.n_text_ids)
    n = _candidates_of_each(len(text), seeds)
    check_top_k(sampling.top_k, config.image_vocab)
    text = text.to(model.device)
    n_image = config.stream.n_image
    known = torch.empty(0, dtype=torch.int64, device="cpu") if prefix is None else prefix
    known = known[None] if known.ndim == 1 else known
    _check_prefix(model, known, len(text))
    known = known.to(model.device)
    m = known.shape[1]
    with undisturbed(), torch.inference_mode():
        uniforms_BI = uniforms(seeds, n_image).to(model.device)
        tokens_BI = torch.zeros((len(seeds), n_image), dtype=torch.int64, device=model.device)
        tokens_BI[:, :m] = known.expand(len(text), -1).repeat_interleave(n, dim=0)
        log_likelihoods_B = torch.zeros(len(seeds), dtype=torch.float64, device=model.device)
        decoder = _decoder(model, text, n, known, guided=sampling.is_guided, compile=compile)
        for position in range(m, n_image):
            if position > 0:
                inputs_B = tokens_BI[:, position - 1]
            else:
                inputs_B = torch.full_like(tokens_BI[:, 0], start_of_image_id(config.image_vocab))
            logits_BV = decoder.step(inputs_B.repeat(2) if sampling.is_guided else inputs_B)
            conditional_BV = logits_BV[: len(tokens_BI)]
            if sampling.is_guided:
                logits_BV = guide(logits_BV, sampling.guidance)
            tokens_B = choose(logits_BV, uniforms_BI[:, position], sampling)
            tokens_BI[:, position] = tokens_B
            log_likelihoods_B -= F.cross_entropy(conditional_BV, tokens_B, reduction="none")
            kept_B = None if on_step is None else on_step(tokens_BI[:, : position + 1])
            if kept_B is not None:
                if len(text) != 1:
                    raise ValueError(f"on_step may drop candidates of one prompt only, got {len(text)} prompts")
                kept_B = kept_B.to(model.device)
                decoder.keep(torch.cat([kept_B, len(tokens_BI) + kept_B]) if sampling.is_guided else kept_B)
                tokens_BI, uniforms_BI = tokens_BI[kept_B], uniforms_BI[kept_B]
                log_likelihoods_B = log_likelihoods_B[kept_B]
    # Outside inference mode: a caller may feed these to modules that keep them for a backward pass.
    tokens_PNI = tokens_BI.clone().reshape(len(text), -1, n_image)
    return Samples(tokens=tokens_PNI, log_likelihoods=log_likelihoods_B.float().reshape(len(text), -1))


def _decoder(model: Transformer, text_PT: Tensor, n: int, prefix: Tensor, *, guided: bool, compile: bool) -> Decoding:
    """Return a decoder of n candidates per prompt, followed, if guided, by as many with the empty caption."""
    n_prompts = len(text_PT)
    counts = [n] * n_prompts
    prefix_Pm = prefix.expand(n_prompts, -1)
    if guided:
        # The empty caption is read once for all candidates, or once per known prefix.
        n_null = len(prefix)
        null_T = model.config.null_caption().to(text_PT.device)
        text_PT = torch.cat([text_PT, null_T.expand(n_null, -1)])
        counts = counts + [n_prompts * n // n_null] * n_null
        prefix_Pm = torch.cat([prefix_Pm, prefix])
    return decoding(model, text_PT, counts, prefix_Pm, compile=compile)


def _candidates_of_each(n_prompts: int, seeds: Sequence[int]) -> int:
    """Return n, the candidates of each prompt.

    Raises:
        ValueError: no seeds, not as many for each prompt, or a negative one.
    """
    n, missing = divmod(len(seeds), n_prompts)
    if n < 1 or missing:
        raise ValueError(f"{len(seeds)} seeds for {n_prompts} prompts: expected equally many for each, at least 1")
    if min(seeds) < 0:
        raise ValueError(f"seeds must not be negative, got {min(seeds)}")
    return n


def _check_prefix(model: Transformer, prefix: Tensor, n_prompts: int) -> None:
    config = model.config
    n_image = config.stream.n_image
    if prefix.ndim != 2 or len(prefix) not in (1, n_prompts) or prefix.shape[1] > n_image:
        raise ValueError(
            f"prefix has shape {tuple(prefix.shape)}, expected (m,), (1, m) or ({n_prompts}, m) with m at most"
            f" {n_image}, the image tokens of a picture"
        )
    check_ids("prefix", prefix, prefix.shape[1], config.image_vocab)
