"""What a denoising network minimises: the squared error of its prediction, and a variational term for its variance.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), 3.1, the hybrid objective.

Letters: B batch  C channels  … the other dimensions of a sample
"""

import math

import torch
from torch import Tensor

from unclip.diffusion import Diffusion, Prediction

VARIATIONAL_WEIGHT = 0.001
"""λ of the sum of the variational terms of all steps; one term drawn at random stands for N."""
_BIN = 1 / 255
"""Half of the distance between two of the 256 values of a pixel in [-1, 1]."""
_LEAST = 1e-6
"""Difference of two logarithms below which a bin's probability is not told from 0."""


def denoising_loss(
    process: Diffusion, prediction: Prediction, output: Tensor, x0: Tensor, noise: Tensor, steps: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the hybrid loss of each sample, (B,) float32, and its parts, (B,) each, detached.

    The parts are `mse` and, of a network with a learned variance, `vb` in bits per dimension. The variational term
    trains the variance only: the mean is detached in it.

    Args:
        process: the steps.
        prediction: what the network predicts.
        output: (B, C, …), or (B, 2C, …) with a learned variance, of the network.
        x0: (B, C, …), pixels in [-1, 1] if the variance is learned.
        noise: (B, C, …) that was added.
        steps: int64 (B,).
    """
    output, x0, noise = output.float(), x0.float(), noise.float()
    channels = x0.shape[1]
    mean, fractions = output[:, :channels], output[:, channels:]
    error = _mean_of_sample((mean - process.target(prediction, x0, noise, steps)).square())
    parts = {"mse": error.detach()}
    if fractions.shape[1] == 0:
        return error, parts
    x = process.noised(x0, noise, steps)
    vb = variational_bits(process, process.x0_of(prediction, mean.detach(), x, steps), fractions, x0, x, steps)
    parts["vb"] = vb.detach()
    return error + VARIATIONAL_WEIGHT * len(process) * vb, parts


def variational_bits(
    process: Diffusion, x0_predicted: Tensor, fractions: Tensor, x0: Tensor, x: Tensor, steps: Tensor
) -> Tensor:
    """Return one term of the variational bound for each sample, (B,) bits per dimension.

    Above the first step it is the divergence of q(x_{t-1} | x_t, x_0) from the network's Gaussian, at the first the
    likelihood of the pixels, whose values are bins of a width of 2/255.

    Args:
        process: the steps.
        x0_predicted: (B, C, …), x̂_0.
        fractions: (B, C, …), the learned variance between β̃ (-1) and β (1).
        x0: (B, C, …), pixels in [-1, 1].
        x: (B, C, …), x_t.
        steps: int64 (B,).
    """
    log_variance = process.log_variance(fractions, steps)
    true_log_variance = process.log_variance(torch.full_like(fractions, -1.0), steps)
    mean = process.posterior_mean(x0_predicted, x, steps)
    divergence = gaussian_divergence(process.posterior_mean(x0, x, steps), true_log_variance, mean, log_variance)
    likelihood = pixel_nll(x0, mean, log_variance)
    nats = torch.where(steps.to(x.device) == 0, _mean_of_sample(likelihood), _mean_of_sample(divergence))
    return nats / math.log(2)


def gaussian_divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean) ‖ N(other)) in nats, elementwise."""
    ratio = (log_variance - other_log_variance).exp()
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def pixel_nll(pixels: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log of a Gaussian's probability of each pixel's bin, in nats, elementwise.

    Args:
        pixels: in [-1, 1], one of 256 values each; the outermost bins reach to infinity.
        mean: of the Gaussian.
        log_variance: of the Gaussian.
    """
    scale = (-0.5 * log_variance).exp()
    centred = pixels - mean
    outer = torch.where(pixels > 1 - _BIN, _BIN - centred, centred + _BIN) * scale
    # on the side of the mean on which both logarithms are far from 0: log(e^upper - e^lower)
    upper, lower = ((sign * _BIN - centred.abs()) * scale for sign in (1, -1))
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    inner = log_upper + torch.log1p(-(log_lower - log_upper).clamp(max=-_LEAST).exp())
    return -torch.where(pixels.abs() > 1 - _BIN, torch.special.log_ndtr(outer), inner)


def _mean_of_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)
