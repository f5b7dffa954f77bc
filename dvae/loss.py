"""The dVAE's objective: a relaxed ELBO with a logit-Laplace likelihood (Ramesh et al. 2021, 2.1, A.2, A.3).

Shapes: B batch  V vocabulary  H,W picture in pixels  Y,X grid of tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dvae.images import map_pixels
from dvae.model import DVAE


@dataclass(frozen=True, kw_only=True)
class DVAELoss:
    """The loss of a batch and its parts."""

    total: Tensor
    """The objective in nats per dimension, a scalar with a gradient."""
    nll: Tensor
    """Negative log-likelihood of the mapped pixels, in nats per dimension (pixel and colour); may be negative."""
    kl: Tensor
    """KL of the encoder's distribution to the uniform one, in nats per token: 0 … ln V."""
    logits: Tensor
    """(B,V,Y,X) float32 of the encoder."""


def dvae_loss(
    dvae: DVAE, images: Tensor, *, temperature: float, kl_weight: float, generator: torch.Generator | None = None
) -> DVAELoss:
    """Return the loss of pictures: -(E[ln p(x|z)] - β·KL), over the number of dimensions.

    Both terms are sums (over pixels and colours, over positions) divided by H·W·3, so the mean KL per token has the
    weight β/(3 f²): β/192 for f = 8.

    Args:
        dvae: the model.
        images: (B,3,H,W) float32 in [0, 1].
        temperature: τ of the Gumbel-softmax, above 0.
        kl_weight: β: 6.6 in the paper, after a rise from 0.
        generator: of the Gumbel noise; torch's global one if not given.
    """
    x = map_pixels(images)
    logits = dvae.encoder(x).float()
    stats = dvae.decoder(gumbel_softmax(logits, temperature, generator))
    nll = logit_laplace_nll(x, stats).mean()
    kl_BYX = kl_to_uniform(logits)
    positions_per_dimension = kl_BYX[0].numel() / images[0].numel()
    kl = kl_BYX.mean()
    return DVAELoss(total=nll + kl_weight * positions_per_dimension * kl, nll=nll, kl=kl, logits=logits)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a relaxed sample: softmax((logits + g)/τ) over dimension 1, with g ~ Gumbel(0, 1).

    Soft in the forward and the backward pass, as the paper trains it: nothing is rounded to one-hot.

    Args:
        logits: (B,V,Y,X) floats.
        temperature: τ above 0; towards 0 the sample approaches one-hot.
        generator: of the noise; torch's global one if not given.

    Returns:
        (B,V,Y,X) float32 that sums to 1 over V.
    """
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be above 0: towards 0 the sample approaches one-hot")
    # -ln of an exponential variable is a Gumbel variable, and torch never draws an exponential of 0
    gumbel = -torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).log()
    return ((logits.float() + gumbel) / temperature).softmax(dim=1)


def logit_laplace_nll(x: Tensor, stats: Tensor) -> Tensor:
    """Return -ln f(x|μ,b) of the logit-Laplace density f = exp(-|logit x - μ|/b) / (2·b·x·(1-x)) (A.3).

    Args:
        x: (B,3,H,W) float32 strictly inside (0, 1): pictures after `map_pixels`.
        stats: (B,6,H,W): μ of three colours, then ln b of three colours.

    Returns:
        (B,3,H,W) float32 nats per dimension; negative where the density is above 1.
    """
    mu, ln_b = stats.float().chunk(2, dim=1)
    return math.log(2) + ln_b + x.log() + torch.log1p(-x) + (torch.logit(x) - mu).abs() * torch.exp(-ln_b)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Return KL(softmax(logits) ‖ uniform over V) of every position: neither temperature nor noise enter it.

    Args:
        logits: (B,V,Y,X) floats.

    Returns:
        (B,Y,X) float32 nats: from 0 for equal logits to ln V for a certain token.
    """
    ln_q = F.log_softmax(logits.float(), dim=1)
    return (ln_q.exp() * ln_q).sum(dim=1) + math.log(logits.shape[1])
