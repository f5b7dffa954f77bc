"""What a recipe says of DALL·E 2's stages, which read a CLIP that is trained before: decoder, prior and upsamplers.

The paper's values are those of Ramesh et al. 2022 (arXiv 2204.06125), table 3.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from training.config import OptimizerConfig, TrainConfig, check_bounds
from training.schedules import WarmupCosine
from unclip.autoregressive.prior import AutoregressiveConfig
from unclip.decoder import DecoderConfig
from unclip.decoding import NO_IMAGE, NO_TEXT, NOTHING_KNOWN
from unclip.embeddings import DROPPED
from unclip.prior import PriorConfig
from unclip.upsampler import UpsamplerConfig


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How the decoder is trained."""

    no_image: float = NO_IMAGE
    """Fraction of embeddings that are left out, for guidance."""
    no_text: float = NO_TEXT
    """Fraction of captions that are left out, each on its own."""
    nothing_known: float = NOTHING_KNOWN
    """Fraction of pictures of which a decoder that inpaints knows nothing, so that it also draws whole ones."""
    noise_shift: float = 1.0
    """Above 1, pictures are trained with more noise: see `decoder_loss`."""


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe(DecoderOptions):
    """The decoder; what it takes of CLIP's sizes, and of the dVAE's if it draws codes, is set when it is trained."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder."""
    train: TrainConfig
    """The run."""
    sample_steps: int = 50
    """Steps in which pictures on sample sheets are drawn."""
    guidance: float = 3.0
    """Of these."""

    def __post_init__(self) -> None:
        _check_fractions(self, ("no_image", "no_text", "nothing_known"))
        if not 0 < self.noise_shift < math.inf:
            raise ValueError(f"noise_shift ({self.noise_shift}) must be a number above 0")


PriorKind = Literal["diffusion", "autoregressive"]


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """Which prior is trained, and how."""

    prior_kind: PriorKind = "diffusion"
    """diffusion, or autoregressive: embeddings as tokens, which the paper finds worse."""
    dropped: float = DROPPED
    """Fraction of captions that are left out, for guidance."""


@dataclass(frozen=True, kw_only=True)
class PriorRecipe(PriorOptions):
    """The prior; what it takes of CLIP's sizes is set when it is trained.

    Deviation: both kinds are trained alike, as the recipe says. The paper's autoregressive prior has 1,000,000 updates,
    a learning rate of 1.6e-4, β2 0.91, epsilon 1e-10, weight decay 4e-2 and averages of 0.999.
    """

    model: PriorConfig = field(default_factory=PriorConfig)
    """The diffusion prior."""
    autoregressive: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    """The autoregressive prior."""
    train: TrainConfig
    """The run."""

    def __post_init__(self) -> None:
        _check_fractions(self, ("dropped",))
        if self.prior_kind not in get_args(PriorKind):
            raise ValueError(f"prior_kind is {self.prior_kind!r}; expected one of {', '.join(get_args(PriorKind))}")


@dataclass(frozen=True, kw_only=True)
class UpsamplerOptions:
    """How the upsampler is shown."""

    sample_steps: int = 27
    """Steps in which pictures on sample sheets are drawn."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerRecipe(UpsamplerOptions):
    """An upsampler."""

    model: UpsamplerConfig = field(default_factory=UpsamplerConfig)
    """The upsampler."""
    train: TrainConfig
    """The run."""

    def __post_init__(self) -> None:
        check_bounds(self, {"sample_steps": (1, self.model.n_steps)})


def _check_fractions(recipe: object, names: tuple[str, ...]) -> None:
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} is a fraction, in [0, 1], got {getattr(recipe, name)}")


# ---- minutes on a CPU -------------------------------------------------------------------------------------


def _cpu(steps: int, batch: int, optimizer: OptimizerConfig, peak: float) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        global_batch=batch,
        optimizer=optimizer,
        learning_rate=WarmupCosine(peak=peak, warmup=min(100, max(1, steps // 4)), steps=steps, final=peak / 50),
        ema_decay=0.99,
        ema_every=1,
        precision="autocast",
        log_every=50,
        validate_every=-(-steps // 4),
        sample_every=-(-steps // 4),
    )


_MUON = OptimizerConfig(kind="muon", betas=(0.9, 0.99), weight_decay=0.01, gradient_clipping=1.0)
_ADAMW = dataclasses.replace(_MUON, kind="adamw")


def cpu_decoder(steps: int, no_text: float = NO_TEXT) -> DecoderRecipe:
    """Return a decoder of 3.7 million parameters for the demonstration's codes, which inpaints.

    Deviation: it draws the dVAE's codes, predicts v, sees more noise, and is trained by Muon. In pixels, and by AdamW,
    edges take hours (docs/dalle2.md).

    Args:
        steps: of the run.
        no_text: fraction of captions that are left out. Deviation: fewer than in the paper where the run is too short
            to learn drawing without them.
    """
    model = DecoderConfig(
        image_size=12,
        codes=1024,
        code_side=4,
        in_channels=25,
        out_channels=12,
        width=64,
        multiples=(1, 2),
        n_blocks=1,
        attention=(0, 1),
        head_width=32,
        context_width=128,
        dropout=0.0,
        prediction="v",
    )
    train = _cpu(steps, 16, _MUON, 4e-3)
    return DecoderRecipe(
        model=model, train=train, no_text=no_text, nothing_known=0.75, noise_shift=3.0, sample_steps=25, guidance=2.0
    )


def cpu_prior(steps: int) -> PriorRecipe:
    """Return a prior of 2 million parameters.

    Deviation: an autoregressive prior has 24 dimensions of 64 buckets, in place of 319 of 1,024. On the built-in world
    they hold 99% of the variance of the demonstration's CLIP, and buckets add 0.1% of error.
    """
    return PriorRecipe(
        model=PriorConfig(width=192, n_layers=4, n_heads=6),
        autoregressive=AutoregressiveConfig(width=192, n_layers=4, n_heads=6, dimensions=24, buckets=64),
        train=_cpu(steps, 32, _MUON, 3e-3),
    )


def cpu_upsampler(steps: int) -> UpsamplerRecipe:
    """Return an upsampler from 48 to 96 pixels."""
    model = UpsamplerConfig(
        image_size=96,
        input_size=48,
        crop=48,
        width=32,
        multiples=(1, 2, 3),
        n_blocks=1,
        dropout=0.0,
        prediction="v",
    )
    return UpsamplerRecipe(model=model, train=_cpu(steps, 32, _ADAMW, 1e-3))


# ---- the paper's ------------------------------------------------------------------------------------------

_PAPER: Mapping[str, tuple[int, int, float, tuple[float, float], float, float, int]] = {
    "prior": (600_000, 4096, 1.1e-4, (0.9, 0.96), 1e-6, 6e-2, 32),
    "decoder": (800_000, 2048, 1.2e-4, (0.9, 0.999), 1e-8, 0.0, 16),
    "upsampler": (1_000_000, 1024, 1.2e-4, (0.9, 0.999), 1e-8, 0.0, 16),
    "upsampler2": (1_000_000, 512, 1.0e-4, (0.9, 0.999), 1e-8, 0.0, 8),
}
"""Updates, batch, learning rate, Adam's betas and epsilon, weight decay (table 3); samples of a forward pass (ours)."""


def _paper(name: str) -> TrainConfig:
    steps, batch, peak, betas, eps, weight_decay, micro_batch = _PAPER[name]
    return TrainConfig(
        steps=steps,
        global_batch=batch,
        micro_batch=micro_batch,
        optimizer=OptimizerConfig(betas=betas, eps=eps, weight_decay=weight_decay, gradient_clipping=1.0),
        # the paper does not tell its schedule: a short warm-up, and a constant rate after it
        learning_rate=WarmupCosine(peak=peak, warmup=1_000, steps=steps, final=peak),
        ema_decay=0.9999,
        ema_every=1,
        precision="bf16",
        zero_stage=2,
        activation_checkpointing=True,
        validate_every=5_000,
        sample_every=5_000,
        checkpoint_every=1_000,
        log_every=50,
        workers=8,
    )


def paper_decoder() -> DecoderRecipe:
    """Return the paper's decoder: 2,253 million parameters, pictures of 64 pixels."""
    return DecoderRecipe(train=_paper("decoder"), sample_steps=250)


def paper_prior() -> PriorRecipe:
    """Return the paper's diffusion prior: 1,226 million parameters."""
    return PriorRecipe(train=_paper("prior"))


def paper_upsampler() -> UpsamplerRecipe:
    """Return the paper's first upsampler, 64 to 256 pixels."""
    return UpsamplerRecipe(train=_paper("upsampler"))


def paper_upsampler2() -> UpsamplerRecipe:
    """Return the paper's second upsampler, 256 to 1024 pixels."""
    model = UpsamplerConfig(
        image_size=1024,
        input_size=256,
        crop=256,
        width=192,
        multiples=(1, 1, 2, 2, 4, 4),
        n_blocks=2,
        dropout=0.0,
        schedule="linear",
        degradation="bsr",
    )
    return UpsamplerRecipe(model=model, train=_paper("upsampler2"), sample_steps=15)
