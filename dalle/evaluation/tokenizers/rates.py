"""What the tokens of a picture cost, counted in three ways.

Raw: log2 V bits each. By their frequencies: the entropy of the codes over all pictures, as an ideal code for single
tokens would take. Under the transformer: −log2 p(tokens | caption), as an arithmetic coder that asks it would take. The
first is what other work states; the last is what is left for the second stage to learn.

Letters: N pictures  Y,X grid of tokens  V vocabulary  I = Y·X
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.evaluation.tokenizers.contenders import Prior
from dalle.family.losses import training_loss
from dalle.family.variants.model import VariantDALLE
from dalle.sampler.likelihood import log_likelihoods
from dvae.metrics import CodeUsage, code_usage

TOKENS_PER_CODE = 10
"""With fewer tokens than this for each code, the measured entropy is visibly too low."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bits of a picture; means over pictures."""

    tokens: int
    """Tokens of a picture."""
    raw: float
    """tokens × log2 V."""
    entropy: float
    """tokens × the entropy of the codes' frequencies; too low where there are few tokens for each code."""
    transformer: float | None
    """−log2 p(tokens | caption); None without a transformer."""
    usage: CodeUsage
    """Of all tokens."""

    def per_pixel(self, n_pixels: int) -> dict[str, float | None]:
        """Return the three as bits per pixel."""
        of = {"raw": self.raw, "entropy": self.entropy, "transformer": self.transformer}
        return {name: None if bits is None else bits / n_pixels for name, bits in of.items()}


def rates(tokens: Tensor, vocab_size: int, nats: list[float]) -> Rates:
    """Return what pictures cost.

    Args:
        tokens: integers (N,Y,X) in 0 … vocab_size - 1.
        vocab_size: V.
        nats: −ln p of each picture's tokens under the transformer; empty without one.

    Raises:
        ValueError: there are no tokens, or some are out of range.
    """
    n_tokens = tokens[0].numel() if len(tokens) else 0
    usage = code_usage(tokens, vocab_size)
    return Rates(
        tokens=n_tokens,
        raw=n_tokens * math.log2(vocab_size),
        entropy=n_tokens * usage.entropy / math.log(2),
        transformer=sum(nats) / len(nats) / math.log(2) if nats else None,
        usage=usage,
    )


@torch.no_grad()
def nats_of(prior: Prior, tokens: Tensor, captions: list[str | None]) -> tuple[list[float], int]:
    """Return −ln p(tokens | caption) of pictures, in nats, under the unmodified transformer, and the captions cut.

    A picture is one pass of the losses' forward; transformers that are not trained here are asked token by token.

    Args:
        prior: the transformer; it computes on the device it is on.
        tokens: int64 (N,Y,X).
        captions: one for each picture; None for the empty caption.
    """
    model, found, n_cut = prior.transformer, [], 0
    for tokens_YX, caption in zip(tokens.to(model.device), captions, strict=True):
        ids = None if caption is None else prior.tokenizer.encode(caption)
        n_cut += ids is not None and len(ids) > model.config.max_caption
        text_1T = model.config.null_caption()[None] if ids is None else model.config.text_rows([ids])
        tokens_1I = tokens_YX.flatten()[None]
        if isinstance(model, VariantDALLE):
            found.append(-float(log_likelihoods(model, text_1T, tokens_1I).sum()))
        else:
            loss = training_loss(model, text_1T.to(model.device), tokens_1I)
            found.append(float(loss.image) * tokens_1I.numel())
    return found, n_cut
