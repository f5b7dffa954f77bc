"""What the diffusion prior minimises, and embeddings drawn from either prior.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.2: the squared error of z_i itself; 64 strided steps with
Analytic-DPM's variances; of two samples the one with the larger dot product with z_t.

Letters: B batch  E embedding  T steps of the schedule  K candidates
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.models.directory import directory_kind
from unclip.autoregressive.prior import KIND as AUTOREGRESSIVE
from unclip.autoregressive.prior import AutoregressivePrior, draw_tokens
from unclip.conditions import Text, drawn_mask
from unclip.diffusion import Diffusion
from unclip.loss import denoising_loss
from unclip.prior import KIND, Prior
from unclip.sampling import Noise, OnPass, Predictor, guided, sample_ddpm

DROPPED = 0.1
"""Share of captions that are left out in training."""
SAMPLING_STEPS = 64
CANDIDATES = 2
"""Embeddings that are drawn for each that is returned."""

AnyPrior = Prior | AutoregressivePrior


def load_prior(path: Path | str) -> AnyPrior:
    """Return the prior of a directory, of either kind, on the CPU.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds something else, or is damaged.
    """
    if directory_kind(path, expected=KIND) == AUTOREGRESSIVE:
        return AutoregressivePrior.load(path)
    return Prior.load(path)


def prior_loss(
    prior: Prior, embeddings: Tensor, text: Text, seed: int, dropped: float = DROPPED
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean squared error of the scaled embedding, a scalar, and metrics.

    The metrics are `cosine` of what is predicted with the picture's own embedding and `mse`, (B,) each; `t` is where in
    [0, 1) of the noise each sample was. All that is drawn is a function of the seed.

    Args:
        prior: the prior.
        embeddings: (B, E), of the pictures, as CLIP gives them.
        text: of their captions.
        seed: of timesteps, noise and which captions are left out.
        dropped: share of captions that are left out, whole: z_t and the text's states together.
    """
    process, device = prior.process, embeddings.device
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(len(process), (len(embeddings),), generator=generator)
    noise = torch.randn(embeddings.shape, generator=generator).to(device)
    text = prior.null_text(text, drawn_mask(len(embeddings), dropped, generator, device))
    x0 = prior.scaled(embeddings)
    output = prior(process.noised(x0, noise, steps), process.timesteps_of(steps, x0), text)
    losses, parts = denoising_loss(process, "x0", output, x0, noise, steps)
    cosine = F.cosine_similarity(prior.unscaled(output.detach()), embeddings.float(), dim=-1)
    return losses.mean(), {"mse": parts["mse"], "cosine": cosine, "t": steps / len(process)}


@torch.no_grad()
def sample_embeddings(
    prior: AnyPrior,
    text: Text,
    noise: Noise,
    *,
    steps: int = SAMPLING_STEPS,
    guidance: float = 1.0,
    candidates: int = CANDIDATES,
    on_pass: OnPass | None = None,
) -> Tensor:
    """Return embeddings of pictures of captions, float32 (B, E), of unit length if the prior's are.

    Row b is a function of the text and of noise row b alone. The diffusion prior's variances are the best for its
    measured errors, and the posterior's where none were measured.

    Args:
        prior: of either kind, in evaluation mode.
        text: of B captions.
        noise: B rows.
        steps: of the diffusion prior's schedule, evenly; of no meaning to the autoregressive prior.
        guidance: 1 is none; the paper found that more hurts the diffusion prior.
        candidates: embeddings that are drawn for each row; the one with the largest dot product with z_t is returned.
        on_pass: told of each step, or of each token.

    Raises:
        ValueError: numbers that do not fit each other, or are out of range.
    """
    if len(noise) != len(text.features) or candidates < 1:
        raise ValueError(
            f"{len(noise)} rows of noise and {candidates} candidates for {len(text.features)} captions; expected as "
            "many rows as captions, and at least 1 candidate"
        )
    own = text.features.float()
    every = text.repeated(candidates)
    if isinstance(prior, AutoregressivePrior):
        shape = [1 + prior.config.dimensions]
        uniform = [noise.uniform(f"prior {k}, tokens", shape, own.device) for k in range(candidates)]
        tokens = draw_tokens(prior, every, torch.stack(uniform, dim=1).flatten(0, 1), guidance, on_pass)
        embeddings = prior.unquantised(tokens)
    else:
        embeddings = _diffused(prior, every, noise, steps, guidance, candidates, on_pass)
    embeddings_BKE = embeddings.view(len(own), candidates, -1)
    best_B = torch.einsum("bke,be->bk", embeddings_BKE, own).argmax(dim=1)
    return embeddings_BKE[torch.arange(len(best_B), device=own.device), best_B]


def _diffused(
    prior: Prior, text: Text, noise: Noise, steps: int, guidance: float, candidates: int, on_pass: OnPass | None
) -> Tensor:
    """Return embeddings (B·K, E) that the diffusion prior draws for a text in which every caption is K times."""
    process = prior.process.respaced(steps)
    device = text.features.device

    def draw(purpose: str) -> Tensor:
        drawn = [noise.normal(f"prior {k}, {purpose}", [prior.config.embed_dim], device) for k in range(candidates)]
        return torch.stack(drawn, dim=1).flatten(0, 1)

    predictor = Predictor(
        network=_network(prior, text, guidance),
        prediction="x0",
        process=process,
        clamp=prior.config.clamp or None,
        on_pass=on_pass,
    )
    variances = process.analytic_variances(prior.errors[process.timesteps])
    return prior.unscaled(sample_ddpm(predictor, draw("start"), lambda step: draw(f"step {step}"), variances))


def _network(prior: Prior, text: Text, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the prior's prediction for a text, which is read once; with guidance, the null beside it."""
    memory, visible = prior.remember(text)
    if guidance == 1:
        return lambda x, timesteps: prior.continued(x, timesteps, memory, visible)
    null = prior.null_text(text, torch.ones(len(text.mask), dtype=torch.bool, device=text.mask.device))
    null_memory, null_visible = prior.remember(null)

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        conditional = prior.continued(x, timesteps, memory, visible)
        unconditional = prior.continued(x, timesteps, null_memory, null_visible)
        return guided(conditional, unconditional, guidance, prior.config.embed_dim)

    return network


@torch.no_grad()
def measured_errors(prior: Prior, embeddings: Tensor, text: Text, noise: Noise, points: int = 33) -> Tensor:
    """Return the prior's mean squared errors at all timesteps, float32 (T,), as `Prior.errors` holds them.

    They are measured at some, and interpolated between.

    Args:
        prior: in evaluation mode.
        embeddings: (B, E), of pictures that it was not trained on, as CLIP gives them.
        text: of their captions.
        noise: B rows.
        points: timesteps at which they are measured, evenly from the first to the last.
    """
    process = prior.process.respaced(min(points, prior.config.n_steps))
    x0 = prior.scaled(embeddings)
    memory, visible = prior.remember(text)
    errors = []
    for step, timestep in enumerate(process.timesteps):
        drawn = noise.normal(f"errors, step {timestep}", [prior.config.embed_dim], x0.device)
        x = process.noised(x0, drawn, step)
        told = prior.continued(x, process.timesteps_of(step, x), memory, visible)
        errors.append(float((told - x0).square().mean()))
    return _interpolated(process, errors, prior.config.n_steps)


def _interpolated(process: Diffusion, values: list[float], n_steps: int) -> Tensor:
    places = torch.tensor(process.timesteps, dtype=torch.float64)
    known = torch.tensor(values, dtype=torch.float64)
    wanted = torch.arange(n_steps, dtype=torch.float64)
    if len(places) == 1:
        return known.expand(n_steps).float().clone()
    right = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    share = (wanted - places[right - 1]) / (places[right] - places[right - 1])
    return torch.lerp(known[right - 1], known[right], share).float()
