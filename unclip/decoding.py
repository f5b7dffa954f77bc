"""What the decoder minimises; pictures drawn from embeddings and captions; the noise that pictures come from.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.1 and 3; Nichol et al. 2021 (GLIDE, arXiv 2112.10741), 4.3, for
inpainting.

Letters: B batch  C channels  H,W picture in pixels, or grid of codes  E embedding
"""

import torch
from torch import Tensor

from unclip.conditions import Text, drawn_mask
from unclip.decoder import Conditions, Decoder, Known
from unclip.loss import denoising_loss
from unclip.sampling import Network, Noise, OnPass, Predictor, Sampler, guided, invert_ddim, sample

NO_IMAGE, NO_TEXT = 0.1, 0.5
"""Shares of embeddings and of captions that are left out in training, each on its own."""
NOTHING_KNOWN = 0.25
"""Share of pictures of which nothing is known, where inpainting is trained, so that drawing whole ones stays."""
GUIDANCE = 3.0


def decoder_loss(
    decoder: Decoder,
    images: Tensor,
    embeddings: Tensor,
    text: Text,
    seed: int,
    *,
    no_image: float = NO_IMAGE,
    no_text: float = NO_TEXT,
    nothing_known: float = NOTHING_KNOWN,
    noise_shift: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the hybrid loss, a scalar, and metrics of each sample, (B,).

    These are those of `denoising_loss`, and `t` in [0, 1), the share of drawn steps that have less noise.

    All that is drawn is a function of the seed.

    Args:
        decoder: the decoder; if it inpaints, part of most pictures is known to it.
        images: (B, 3, H, W) float in [0, 1], of the decoder's `picture_size`.
        embeddings: (B, E), of the same pictures, as CLIP gives them.
        text: of their captions.
        seed: of timesteps, noise, what is left out and what is known.
        no_image: share of embeddings that are left out.
        no_text: share of captions that are left out.
        nothing_known: share of pictures of which a decoder that inpaints knows nothing.
        noise_shift: s, above 1 for more noise: a share t of the steps is drawn as s·t / (1 + (s-1)·t). Codes of
            neighbours tell of each other, and hide in more noise than pixels. Deviation: Esser et al. 2024 (arXiv
            2403.03206, 5.3.2) shift the noise of rectified flow so, here it is the step of any schedule.
    """
    process, device, count = decoder.process, images.device, len(images)
    x0 = decoder.encoded(images)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(process), (count,), generator=generator)
    t = (drawn + 0.5) / len(process)
    steps = (len(process) * noise_shift * t / (1 + (noise_shift - 1) * t)).long().clamp(max=len(process) - 1)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    without_image = drawn_mask(count, no_image, generator, device)
    without_text = drawn_mask(count, no_text, generator, device)
    known = None
    if decoder.config.inpaints:
        known = Known(x0, known_regions(x0.shape, generator, nothing_known).to(device))
    x, timesteps = process.noised(x0, noise, steps), process.timesteps_of(steps, x0)
    output = decoder(x, timesteps, embeddings, text, without_image, without_text, known)
    losses, parts = denoising_loss(process, decoder.config.prediction, output, x0, noise, steps)
    return losses.mean(), {**parts, "t": drawn / len(process)}


def known_regions(shape: torch.Size, generator: torch.Generator, nothing_known: float = NOTHING_KNOWN) -> Tensor:
    """Return masks that are 0 in a random rectangle of each picture, and everywhere in some of them.

    Args:
        shape: (B, C, H, W), of the pictures. A rectangle's sides are a quarter of the picture's to all of it.
        generator: on the CPU.
        nothing_known: share of pictures whose mask is 0 everywhere.

    Returns:
        float32 (B, 1, H, W), 1 where they are known.
    """
    count, _, height, width = shape
    masks = torch.ones(count, 1, height, width)
    for mask, numbers in zip(masks, torch.rand(count, 5, generator=generator).tolist(), strict=True):
        nothing, *places = numbers
        if nothing < nothing_known:
            mask.zero_()
            continue
        rows, columns = _part(height, *places[:2]), _part(width, *places[2:])
        mask[:, rows, columns] = 0
    return masks


def _part(side: int, size: float, place: float) -> slice:
    """Return a part of a side, a quarter of it to all, by two random numbers in [0, 1)."""
    length = max(1, round(side * (0.25 + 0.75 * size)))
    start = int(place * (side - length + 1))
    return slice(start, start + length)


@torch.no_grad()
def decode(
    decoder: Decoder,
    embeddings: Tensor,
    text: Text,
    noise: Noise,
    *,
    start: Tensor | None = None,
    steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    guidance: float = GUIDANCE,
    known: Known | None = None,
    on_pass: OnPass | None = None,
) -> Tensor:
    """Return pictures of embeddings and captions, float32 (B, 3, H, W) in [0, 1].

    Row b is a function of its embedding, its caption and noise row b.

    Args:
        decoder: in evaluation mode.
        embeddings: (B, E).
        text: of B captions.
        noise: B rows: x_T, and what each step adds.
        start: x_T (B, C, H, W), such as of `invert`; None for noise.
        steps: of the schedule, evenly. The paper takes 250 with ddpm.
        sampler: ddpm, or ddim, which needs fewer steps.
        eta: of ddim, in [0, 1]: 0 adds no noise; the larger, the more a picture varies about its start.
        guidance: 1 is none.
        known: what is kept as it is: see `Decoder.known`.
        on_pass: told of each step.

    Raises:
        ValueError: numbers that do not fit each other, or are out of range.
    """
    if len(noise) != len(embeddings):
        raise ValueError(f"{len(noise)} rows of noise for {len(embeddings)} embeddings; expected one for each")
    device = embeddings.device
    first = start_noise(decoder, noise).to(device) if start is None else start
    shape = list(first.shape[1:])
    network = _network(decoder, embeddings, text, guidance, known)
    process = decoder.process.respaced(steps)
    predictor = Predictor(
        network=network,
        prediction=decoder.config.prediction,
        process=process,
        clamp=None if decoder.config.codes else 1.0,
        known=known,
        on_pass=on_pass,
    )
    return decoder.pictures(
        sample(
            predictor,
            first,
            lambda step: noise.normal(f"decoder, step {step}", shape, device),
            sampler=sampler,
            eta=eta,
        )
    )


def start_noise(decoder: Decoder, noise: Noise, purpose: str = "decoder, start") -> Tensor:
    """Return standard normal noise in the shape of x_T, (B, C, H, W) on the CPU, of B rows.

    With the default purpose it is what `decode` starts from.
    """
    side = decoder.config.image_size
    return noise.normal(purpose, [decoder.config.channels, side, side])


@torch.no_grad()
def invert(
    decoder: Decoder,
    images: Tensor,
    embeddings: Tensor,
    text: Text,
    *,
    steps: int = 50,
    corrections: int = 1,
    on_pass: OnPass | None = None,
) -> Tensor:
    """Return x_T from which `decode` gives the pictures back, float32 (B, C, H, W).

    That is with the same embeddings, captions and steps, by ddim with eta 0 and guidance 1.

    Args:
        decoder: in evaluation mode.
        images: (B, 3, H, W) float in [0, 1].
        embeddings: (B, E), of the pictures.
        text: of B captions.
        steps: as in `decode`.
        corrections: passes for each step beyond the first: see `invert_ddim`.
        on_pass: told of each pass.
    """
    predictor = Predictor(
        network=_network(decoder, embeddings, text, 1.0, None),
        prediction=decoder.config.prediction,
        process=decoder.process.respaced(steps),
        on_pass=on_pass,
    )
    return invert_ddim(predictor, decoder.encoded(images), corrections)


def _network(decoder: Decoder, embeddings: Tensor, text: Text, guidance: float, known: Known | None) -> Network:
    """Return the decoder's prediction, whose conditions are computed once; with guidance, of both in one pass."""
    conditions = decoder.conditions(embeddings, text)
    if guidance == 1:
        return lambda x, timesteps: decoder.predict(x, timesteps, conditions, known)
    everything = torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
    null = decoder.conditions(embeddings, text, everything, everything)
    both = Conditions(*(torch.cat(pair) for pair in zip(conditions, null, strict=True)))
    known_twice = None if known is None else Known(*(torch.cat([tensor, tensor]) for tensor in known))

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        output = decoder.predict(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both, known_twice)
        conditional, unconditional = output.chunk(2)
        return guided(conditional, unconditional, guidance, decoder.config.channels)

    return network


def loss_by_quarter(losses: Tensor, t: Tensor) -> Tensor:
    """Return four parts of the mean loss, times four: the mean over many batches is that of each quarter of the steps.

    A batch need not have a sample in every quarter; each sample's is one of the four by equal chance.

    Args:
        losses: (B,).
        t: (B,), the share of drawn steps that have less noise than each sample, in [0, 1).

    Returns:
        (4,), from little noise to much.
    """
    quarters = torch.arange(4, device=losses.device)[:, None] == (t * 4).long().to(losses.device)
    return 4 * (quarters * losses).mean(dim=1)
