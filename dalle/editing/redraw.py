"""Draws the unknown tokens of a picture: particles in batches, drawn by weight, decoded, ranked.

Source: sequential Monte Carlo, see `dalle.sampler.particles`. Not in the paper, which completes pictures from the top.

Letters: N particles  K kept ones  I image positions  H, W pixels
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle.best_of_n import Best, Candidates, Result
from dalle.budget import BatchProgress, OnProgress, batches, sampling_share
from dalle.family.tokenizers import text_of
from dalle.sampler.particles import draw_by_weight, effective_number, fill
from dalle.sampling import SamplingDefaults, candidate_seed

if TYPE_CHECKING:
    from dalle.pipeline import Pipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, repr=False)
class Redrawn(Result):
    """The best K of the particles that were drawn by weight, best first.

    Fewer than were asked for if no more different ones were drawn. `candidates` are the numbers of particles, and
    `log_likelihoods` count all tokens from the first unknown one on, known ones too.
    """

    n_unknown: int
    """Tokens that were drawn."""
    effective: float
    """Of the N particles, how many equally weighted ones they are worth at the end."""
    n_different: int
    """Different candidates that were drawn by weight."""
    n_resamplings: int
    """How often particles went on from others, in all batches together."""


def redraw(
    pipe: "Pipeline",
    known: Tensor,
    caption: str,
    settings: SamplingDefaults,
    *,
    n: int,
    keep: int,
    seed: int,
    batch_size: int | None = None,
    progress: OnProgress | None = None,
    on_tokens: Callable[[Tensor], object] | None = None,
    finish: Callable[[Tensor], Tensor] = lambda images: images,
) -> Redrawn:
    """Draw the unknown tokens of one picture, from arguments that are checked already.

    Every batch is a population of its own; they are joined by their weights.

    Args:
        pipe: the bundle.
        known: int64 (I,), image tokens; -1 where one is unknown.
        caption: of the whole picture; "" for none.
        settings: of sampling and ranking.
        n: N.
        keep: K, at most N.
        seed: same seed, same pictures.
        batch_size: particles of a population.
        progress: told how many particles are done.
        on_tokens: told the tokens so far of a population, int64 (N, J), after each position from the first unknown one
            on; what it raises ends the drawing.
        finish: makes the pictures (N, 3, H, W) of the decoded ones.
    """
    sampling = settings.sampling(seed)
    size = batch_size or pipe.default_batch_size(n, guided=sampling.is_guided)
    text_1T = text_of(pipe.tokenizer, [caption], pipe.dalle) if caption else pipe.dalle.config.null_caption()[None]
    share = 1.0 if settings.rank == "likelihood" else sampling_share(pipe.dalle, pipe.dvae, pipe.clip)
    seeds = [candidate_seed(seed, caption, k) for k in range(n)]
    populations = []
    for _, ks in batches(1, n, size):
        done = BatchProgress(progress, before=ks.start, n=len(ks), total=n, sampling_share=share)

        def on_step(tokens_NJ: Tensor, done: BatchProgress = done) -> None:
            if on_tokens is not None:
                on_tokens(tokens_NJ)
            done.sampled(tokens_NJ.shape[1], len(known))

        here = seeds[ks.start : ks.stop]
        populations.append(fill(pipe.dalle, text_1T, known, here, sampling, on_step=on_step, compile=pipe.compile))
    log_weights_N = torch.cat([particles.log_weights.cpu() for particles in populations])
    tokens_NI = torch.cat([particles.tokens.cpu() for particles in populations])
    log_likelihoods_N = torch.cat([particles.log_likelihoods.cpu() for particles in populations])
    drawn = _different(tokens_NI, draw_by_weight(log_weights_N, seeds))
    if len(drawn) < keep:
        logger.info("different candidates that fit what is kept: %d, fewer than the %d to keep", len(drawn), keep)
    judge, best = pipe.judge(caption, finish), Best(keep, settings.rank)
    judge.judge(best, Candidates(drawn, tokens_NI[drawn], log_likelihoods_N[drawn]), done.judged)
    return Redrawn(
        **vars(judge.result(best)),
        n_unknown=int((known < 0).sum()),
        effective=effective_number(log_weights_N),
        n_different=len(drawn),
        n_resamplings=sum(particles.n_resamplings for particles in populations),
    )


def _different(tokens_NI: Tensor, drawn: Tensor) -> Tensor:
    """Return the numbers of those drawn, without later ones of the same tokens."""
    first: dict[bytes, int] = {}
    for number in drawn.tolist():
        first.setdefault(tokens_NI[number].numpy().tobytes(), number)
    return torch.tensor(list(first.values()))
