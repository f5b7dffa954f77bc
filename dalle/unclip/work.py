"""A piece of DALL·E 2's work: embeddings, pictures and larger pictures, in batches that fit, with its progress.

Letters: B batch  N pictures  E embedding  H, W pixels
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dalle.budget import OnProgress, batches, memory_budget
from dalle.unclip.cost import (
    Meter,
    pictures_at_once,
    prior_bytes,
    prior_passes,
    prior_products,
    unet_bytes,
    unet_products,
)
from dalle.unclip.loaded import LoadedUnCLIP, Seen
from dalle.unclip.settings import Drawing
from unclip.conditions import Text
from unclip.decoding import decode, invert
from unclip.embeddings import sample_embeddings
from unclip.sampling import Noise, OnPass
from unclip.upsampler import upsample

CORRECTIONS = 1
"""Passes of an inversion's step beyond the first."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A piece of work, and how it is done.

    Raises:
        FileNotFoundError: the prior is needed and missing.
        ValueError: more steps are asked for than a model's schedule has.
    """

    models: LoadedUnCLIP
    drawing: Drawing
    guidance: float
    """Of the decoder."""
    drawn: int
    """Pictures that the decoder draws."""
    enlarged: int
    """Pictures that are enlarged."""
    of_captions: bool = False
    """Whether the prior draws their embeddings."""
    inversions: int = 0
    """Pictures that are inverted."""
    batch_size: int | None = None
    """Pictures drawn at the same time; None for as many as fit the memory."""
    progress: OnProgress | None = None
    """Told how many are done of those that are drawn."""

    def __post_init__(self) -> None:
        self.models.decoder.process.respaced(self.drawing.steps)
        if self.of_captions:
            prior_passes(self.models.the_prior(), self.drawing.prior_steps)
        for place, upsampler in enumerate(self.models.upsamplers):
            upsampler.process.respaced(self.drawing.enlarging(upsampler, place)[0])

    def batches(self) -> list[range]:
        """Return the numbers of the pictures that are drawn at the same time."""
        return [numbers for _, numbers in batches(1, self.drawn, self.size)]

    def embeddings(self, text: Text, noise: Noise) -> Tensor:
        """Return embeddings (B, E) of a caption, drawn by the prior; B rows of noise."""
        return sample_embeddings(
            self.models.the_prior(),
            text.repeated(len(noise)),
            noise,
            steps=self.drawing.prior_steps,
            guidance=self.drawing.prior_guidance,
            candidates=self.drawing.prior_candidates,
            on_pass=self._on_pass(len(noise) * self._prior_step),
        )

    def inverted(self, seen: Seen, text: Text) -> Tensor:
        """Return the noise that a picture is drawn from, (1, C, H, W)."""
        return invert(
            self.models.decoder,
            seen.pixels,
            seen.embedding,
            text,
            steps=self.drawing.steps,
            corrections=CORRECTIONS,
            on_pass=self._on_pass(self._decoder_pass),
        )

    def decoded(self, embeddings: Tensor, text: Text, noise: Noise, **how: Any) -> Tensor:
        """Return pictures (B, 3, H, W) of embeddings (B, E) and one caption; `how` is of `decode`."""
        guided = 1 + (self.guidance != 1)
        return decode(
            self.models.decoder,
            embeddings,
            text.repeated(len(noise)),
            noise,
            steps=self.drawing.steps,
            guidance=self.guidance,
            on_pass=self._on_pass(len(noise) * guided * self._decoder_pass),
            **{"sampler": self.drawing.sampler, **how},
        )

    def large(self, images: Tensor, noise: Noise) -> Tensor:
        """Return pictures (N, 3, H, W) enlarged by all upsamplers, on the CPU."""
        models = self.models
        images = images.cpu()
        for place, upsampler in enumerate(models.upsamplers):
            side = upsampler.config.image_size
            steps, sampler = self.drawing.enlarging(upsampler, place)
            size = pictures_at_once(len(images), unet_bytes(upsampler.unet, side), self._budget)
            parts = []
            for _, some in batches(1, len(images), size):
                rows = slice(some.start, some.stop)
                on_pass = self._on_pass(len(some) * unet_products(upsampler.unet, side))
                small, drawn = images[rows].to(models.device), Noise(noise.rows[rows])
                parts.append(upsample(upsampler, small, drawn, steps=steps, sampler=sampler, on_pass=on_pass).cpu())
            images = torch.cat(parts)
        return images

    @cached_property
    def size(self) -> int:
        """Pictures that are drawn at the same time, at most."""
        if self.batch_size is not None:
            return self.batch_size
        side = self.models.decoder.config.image_size
        each = unet_bytes(self.models.decoder.unet, side) * (1 + (self.guidance != 1))
        if self.models.decoder.config.codes:
            each = max(each, self.models.decoder.codec.config.bytes_per_picture)
        if self.of_captions:
            guided = 1 + (self.drawing.prior_guidance != 1)
            each = max(each, prior_bytes(self.models.the_prior()) * self.drawing.prior_candidates * guided)
        return pictures_at_once(self.drawn, each, self._budget)

    @property
    def _budget(self) -> int:
        return memory_budget(self.models.device, self.models.memory)

    @cached_property
    def _decoder_pass(self) -> int:
        return unet_products(self.models.decoder.unet, self.models.decoder.config.image_size)

    @cached_property
    def _prior_step(self) -> int:
        guided = 1 + (self.drawing.prior_guidance != 1)
        return prior_products(self.models.the_prior()) * self.drawing.prior_candidates * guided

    def _on_pass(self, products: float) -> OnPass:
        return self._meter.passes(products)

    @cached_property
    def _meter(self) -> Meter:
        drawing, guided = self.drawing, 1 + (self.guidance != 1)
        passes = self.drawn * guided + self.inversions * (1 + CORRECTIONS)
        total = drawing.steps * passes * self._decoder_pass
        if self.of_captions:
            total += prior_passes(self.models.the_prior(), drawing.prior_steps) * self.drawn * self._prior_step
        for place, upsampler in enumerate(self.models.upsamplers):
            steps, _ = drawing.enlarging(upsampler, place)
            total += self.enlarged * steps * unet_products(upsampler.unet, upsampler.config.image_size)
        return Meter(self.progress, self.drawn, total)
