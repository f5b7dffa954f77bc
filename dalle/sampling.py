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

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.family.transformers import Decoding, Transformer, decoding
from dalle.sampler.draw import draw, filter_logits, guide, uniforms
from dalle.stream import check_ids, start_of_image_id
from storage.errors import check_number, check_whole

DRAWING_BYTES = 64
"""Peak memory of a candidate per entry of the image vocabulary while a token is drawn: logits as they come, guided,
divided by the temperature and sorted (float32), their order (int64), probabilities and their sums (float64, and once
sorted)."""
MIN_TEMPERATURE = 1e-20
"""Lower ones count as 0: a logit divided by them could be infinite, and no token but the likeliest has a chance."""
MAX_GUIDANCE = 1e6
"""With more, logits could be infinite; long before, the likeliest token is always taken."""

OnStep = Callable[[Tensor], Tensor | None]
"""Called after each sampled position with the tokens so far, int64 (B, J), a view; returns the rows to continue with,
int64 in ascending order, or None for all."""

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


def candidate_seed(seed: int, caption: str, k: int, row: int | None = None) -> int:
    """Return the seed of candidate `k` of a caption in a run with `seed`: 63 bits, equal on every machine.

    Args:
        seed: of the run.
        caption: as it is given.
        k: the candidate's number.
        row: the caption's number in a list of captions, of which some may be equal and yet are to have candidates of
            their own; None where equal captions mean the same.
    """
    run = f"{seed}" if row is None else f"{seed}\0row {row}"
    digest = blake2b(f"{run}\0{k}\0{caption}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def choose(logits: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Return one token per row of logits (B, V), int64 (B,): the likeliest at temperature 0, else a drawn one."""
    if sampling.temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    return draw(filter_logits(logits, sampling.top_k, sampling.top_p), uniforms_B)


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
    """Sample the same number of candidates for each prompt; otherwise as `sample_each`.

    Args:
        model: see `sample_each`, also for the others.
        text: int64 (P, T).
        seeds: of the candidates, n for each prompt, prompt by prompt: see `candidate_seed`.
        sampling: the settings.
        prefix: the first image tokens.
        on_step: may drop candidates of a single prompt only.
        compile: see `Decoder`.

    Returns:
        The candidates that were not dropped, on the model's device.

    Raises:
        ValueError: for an argument out of range.
    """
    n, missing = divmod(len(seeds), len(text))
    if n < 1 or missing:
        raise ValueError(f"{len(seeds)} seeds for {len(text)} prompts: expected equally many for each, at least 1")

    def watched(tokens_BJ: Tensor) -> Tensor | None:
        kept_B = None if on_step is None else on_step(tokens_BJ)
        if kept_B is not None and len(text) != 1:
            raise ValueError(f"on_step may drop candidates of one prompt only, got {len(text)} prompts")
        return kept_B

    each = [seeds[first : first + n] for first in range(0, len(seeds), n)]
    parts = sample_each(model, text, each, sampling, prefix=prefix, on_step=watched, compile=compile)
    return Samples(
        tokens=torch.cat([part.tokens for part in parts]),
        log_likelihoods=torch.cat([part.log_likelihoods for part in parts]),
    )


def sample_each(
    model: Transformer,
    text: Tensor,
    seeds: Sequence[Sequence[int]],
    sampling: Sampling = PAPER_SAMPLING,
    *,
    prefix: Tensor | None = None,
    on_step: OnStep | None = None,
    compile: bool = False,
) -> list[Samples]:
    """Sample any number of candidates for each prompt, all as one batch; the caller decides how many fit.

    Args:
        model: the transformer; sampling happens on its device and in its dtype.
        text: int64 (P, T), text ids of the prompts.
        seeds: those of each prompt's candidates, at least one: see `candidate_seed`.
        sampling: the settings; their `seed` is not read, the candidates have their own.
        prefix: int64 (m,), (1, m) or (P, m): the first m image tokens, kept verbatim. The paper completes pictures
            from 480.
        on_step: watches, and may drop candidates, but not all of a prompt. Survivors of a choice are no sample of the
            model's distribution. What it raises ends the sampling within this position.
        compile: see `Decoder`.

    Returns:
        The image tokens and log-likelihoods of each prompt's candidates that were not dropped, with P = 1, on the
        model's device. A log-likelihood counts the sampled tokens, not those of the prefix.

    Raises:
        ValueError: for an argument out of range.
    """
    config = model.config
    check_ids("text", text, config.text_len, config.n_text_ids)
    counts = [len(some) for some in seeds]
    flat = [seed for some in seeds for seed in some]
    if len(counts) != len(text) or min(counts) < 1:
        raise ValueError(f"{counts} seeds for {len(text)} prompts: expected at least one for each")
    if min(flat) < 0:
        raise ValueError(f"seeds must not be negative, got {min(flat)}")
    check_top_k(sampling.top_k, config.image_vocab)
    text = text.to(model.device)
    n_image = config.stream.n_image
    known = torch.empty(0, dtype=torch.int64, device="cpu") if prefix is None else prefix
    known = known[None] if known.ndim == 1 else known
    _check_prefix(model, known, len(text))
    known = known.to(model.device)
    m = known.shape[1]
    with undisturbed(), torch.inference_mode():
        prompt_B = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(model.device)
        uniforms_BI = uniforms(flat, n_image).to(model.device)
        tokens_BI = torch.zeros((len(flat), n_image), dtype=torch.int64, device=model.device)
        tokens_BI[:, :m] = known.expand(len(text), -1)[prompt_B]
        log_likelihoods_B = torch.zeros(len(flat), dtype=torch.float64, device=model.device)
        decoder = decoder_of(model, text, counts, known, guided=sampling.is_guided, compile=compile)
        sizes = counts
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
                kept_B = kept_B.to(model.device)
                decoder.keep(torch.cat([kept_B, len(tokens_BI) + kept_B]) if sampling.is_guided else kept_B)
                tokens_BI, uniforms_BI, prompt_B = tokens_BI[kept_B], uniforms_BI[kept_B], prompt_B[kept_B]
                log_likelihoods_B = log_likelihoods_B[kept_B]
                sizes = [len(kept_B)] if len(counts) == 1 else prompt_B.bincount(minlength=len(counts)).tolist()
    # Outside inference mode: a caller may feed these to modules that keep them for a backward pass.
    each = zip(torch.split(tokens_BI.clone(), sizes), torch.split(log_likelihoods_B.float(), sizes), strict=True)
    return [Samples(tokens=tokens[None], log_likelihoods=log_likelihoods[None]) for tokens, log_likelihoods in each]


def decoder_of(
    model: Transformer, text_PT: Tensor, counts: list[int], prefix: Tensor, *, guided: bool, compile: bool
) -> Decoding:
    """Return a decoder of the prompts' candidates, followed, if guided, by as many with the empty caption."""
    prefix_Pm = prefix.expand(len(text_PT), -1)
    if guided:
        # The empty caption is read once for all candidates, or once per known prefix.
        null_T = model.config.null_caption().to(text_PT.device)
        text_PT = torch.cat([text_PT, null_T.expand(len(prefix), -1)])
        counts = counts + ([sum(counts)] if len(prefix) == 1 else counts)
        prefix_Pm = torch.cat([prefix_Pm, prefix])
    return decoding(model, text_PT, counts, prefix_Pm, compile=compile)


def _check_prefix(model: Transformer, prefix: Tensor, n_prompts: int) -> None:
    config = model.config
    n_image = config.stream.n_image
    if prefix.ndim != 2 or len(prefix) not in (1, n_prompts) or prefix.shape[1] > n_image:
        raise ValueError(
            f"prefix has shape {tuple(prefix.shape)}, expected (m,), (1, m) or ({n_prompts}, m) with m at most"
            f" {n_image}, the image tokens of a picture"
        )
    check_ids("prefix", prefix, prefix.shape[1], config.image_vocab)
