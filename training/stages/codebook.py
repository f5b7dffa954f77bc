"""The first codebook of a warmed-up dVAE: k-means centres of its bottleneck.

Shapes: B batch  C channels of the codebook  N positions  K codes  Y,X grid of tokens.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from dvae import DVAE
from dvae.images import map_pixels

KMEANS_POSITIONS, KMEANS_ROUNDS = 60_000, 10
"""Positions from which the codebook is made, and Lloyd's rounds."""
RARITY_CELLS, RARITY_PASSES = 256, 2
"""Cells of the clusterings that estimate the density of positions, and number of clusterings."""
ENTROPY_POSITIONS = 4_000
"""Positions on which the posterior's entropy is measured."""
POSTERIOR_ENTROPY = 0.05
"""Nats per position, of the encoder with its first codebook; so little that the Gumbel noise seldom picks another code
than the nearest."""


@torch.no_grad()
def initialise_codebook(model: DVAE, images: Tensor, *, seed: int) -> None:
    """Turn a warmed-up autoencoder into a dVAE that quantises its bottleneck, in place.

    The bottleneck is what the decoder's input convolution makes of the encoder's output: e = E(Wh + b) + c for the
    encoder's last features h. The codebook becomes the centres e_k of a k-means clustering of it, in which rare
    positions weigh as much as common ones: else most codes would be shades of backgrounds, between which tokens
    switch at random. The encoder's output convolution becomes logit k = s · (e · e_k − |e_k|² / 2), which is −s/2
    times the squared distance to a centre, up to a term that all logits share, and is again linear in h. So argmax
    picks the nearest centre; s makes the posterior's mean entropy POSTERIOR_ENTROPY. k-means initialisation of
    codebooks: Zeghidour et al. 2021 (SoundStream), 3.

    Args:
        model: trained by `WarmupStage`.
        images: (N,3,H,W) float32 in [0, 1].
        seed: of the choice of positions and centres.
    """
    generator = torch.Generator().manual_seed(seed)
    read = cast(nn.Conv2d, model.decoder.blocks.get_submodule("input"))
    code = cast(nn.Conv2d, model.encoder.blocks.get_submodule("output.conv"))
    assert read.bias is not None
    assert code.bias is not None
    bottlenecks = [read(model.encoder(map_pixels(chunk))) for chunk in torch.split(images, 64)]
    e_NC = torch.cat([e_BCYX.permute(0, 2, 3, 1).flatten(0, 2) for e_BCYX in bottlenecks])
    e_NC = e_NC[torch.randperm(len(e_NC), generator=generator)[:KMEANS_POSITIONS]]
    centres_KC = _kmeans(e_NC, model.config.vocab_size, _rarity(e_NC, generator), generator)
    half_norms_K = centres_KC.square().sum(dim=1) / 2
    # with fewer distinct positions than codes, some centres coincide: only one of each can be told from the others
    used = torch.bincount((e_NC @ centres_KC.T - half_norms_K).argmax(dim=1), minlength=len(centres_KC)) > 0
    scores_NK = e_NC[:ENTROPY_POSITIONS] @ centres_KC[used].T - half_norms_K[used]
    scale = _scale_for_entropy(scores_NK, POSTERIOR_ENTROPY)
    E, W = read.weight[:, :, 0, 0], code.weight[:, :, 0, 0]
    bias_K = scale * (centres_KC @ (E @ code.bias + read.bias) - half_norms_K)
    code.weight.copy_((scale * centres_KC @ E @ W)[:, :, None, None])
    code.bias.copy_(bias_K)
    read.weight.copy_(centres_KC.T[:, :, None, None])
    read.bias.zero_()


def _rarity(points_NC: Tensor, generator: torch.Generator) -> Tensor:
    """Return a weight for each point, (N,): about the inverse of how densely the points lie there.

    It is one over the number of points in the same cell of a clustering; clustering again with these weights
    makes the cells more even.
    """
    weights_N = points_NC.new_ones(len(points_NC))
    for _ in range(RARITY_PASSES):
        nearest_N = _nearest(points_NC, _kmeans(points_NC, RARITY_CELLS, weights_N, generator))
        weights_N = 1 / torch.bincount(nearest_N, minlength=RARITY_CELLS)[nearest_N]
    return weights_N


def _kmeans(points_NC: Tensor, k: int, weights_N: Tensor, generator: torch.Generator) -> Tensor:
    """Return k centres, (K,C), of weighted points: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds.

    A centre that is nearest to no point stays where it is; with fewer distinct points than k, some coincide.
    """
    chosen = [0]
    distance_N = (points_NC - points_NC[0]).square().sum(dim=1)
    for _ in range(k - 1):
        chosen.append(int(torch.multinomial((weights_N * distance_N).clamp_min(1e-12), 1, generator=generator)))
        distance_N = torch.minimum(distance_N, (points_NC - points_NC[chosen[-1]]).square().sum(dim=1))
    centres_KC = points_NC[chosen].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest_N = _nearest(points_NC, centres_KC)
        weight_K1 = points_NC.new_zeros(k).index_add_(0, nearest_N, weights_N)[:, None]
        sums_KC = torch.zeros_like(centres_KC).index_add_(0, nearest_N, weights_N[:, None] * points_NC)
        centres_KC = torch.where(weight_K1 > 0, sums_KC / weight_K1, centres_KC)
    return centres_KC


def _nearest(points_NC: Tensor, centres_KC: Tensor) -> Tensor:
    """Return the number of the centre that each point is nearest to, (N,)."""
    return (points_NC @ centres_KC.T - centres_KC.square().sum(dim=1) / 2).argmax(dim=1)


def _scale_for_entropy(scores_NK: Tensor, entropy: float) -> float:
    """Return the factor at which the softmax of scores has this mean entropy, in nats; its logarithm is bisected."""
    low, high = 1e-6, 1e9
    for _ in range(60):
        scale = math.sqrt(low * high)
        log_p = (scale * scores_NK).log_softmax(dim=1)
        too_flat = -(log_p.exp() * log_p).sum(dim=1).mean().item() > entropy
        low, high = (scale, high) if too_flat else (low, scale)
    return scale
