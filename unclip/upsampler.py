"""An upsampler: a small picture to the same in large, for any size of picture.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2.1 and table 3: ADM's U-Net without any attention, told nothing but the
small picture, trained on crops and used on whole pictures; DDIM in 27 and 15 steps. The small picture is enlarged
bilinearly and read beside the noise, as in openai/glide-text2im at 69b5307; its 8-bit rounding before that too.

Letters: B batch  h,w small picture in pixels  H,W large one
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from storage.models.stored import StoredModel
from unclip.degradation import KINDS
from unclip.diffusion import Diffusion, Prediction, Schedule
from unclip.loss import denoising_loss
from unclip.sampling import Noise, OnPass, Predictor, Sampler, sample, signed, unsigned
from unclip.unet import UNet, UNetConfig

KIND = "upsampler"
Enlarging = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig(UNetConfig):
    """Sizes of an upsampler; the defaults are those of the paper's first, 64 to 256 pixels."""

    image_size: int = 256
    """Side in pixels of the large pictures."""
    input_size: int = 64
    """Side in pixels of the small ones."""
    in_channels: int = 6
    """The picture with noise, and the small one."""
    out_channels: int = 3
    """No variance is learned."""
    width: int = 320
    """Channels of the finest level."""
    attention: tuple[int, ...] = ()
    """None: attention does not carry over from crops to whole pictures."""
    middle_attention: bool = False
    """None, as above."""
    prediction: Prediction = "noise"
    """What is predicted."""
    schedule: Schedule = "cosine"
    """Of the noise; linear in the paper's second upsampler."""
    n_steps: int = 1000
    """Steps of the schedule."""
    crop: int = 64
    """Side in pixels of the crops of the large picture that it is trained on: a quarter of it in the paper."""
    degradation: str = "blur"
    """What is done to the small pictures that it is trained on: see unclip/degradation.py."""
    enlarging: Enlarging = "bilinear"
    """How the small picture is enlarged; smoothed before where it is bicubic, as in Karlo."""
    has_last: bool = False
    """Whether the last step is another network's, as in Karlo."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_size", "crop"):
            value = getattr(self, name)
            if type(value) is not int or not value >= 1:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
        if (self.in_channels, self.out_channels) != (6, 3) or self.context_width:
            raise ValueError("an upsampler reads 6 channels, returns 3, and has no context_width")
        if self.attention or self.middle_attention:
            raise ValueError("an upsampler has no attention, which would not carry over from crops to pictures")
        if self.image_size % self.input_size or self.image_size == self.input_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of input_size ({self.input_size})")
        if self.crop > self.image_size or self.crop % self.factor or self.crop % self.downsampling:
            raise ValueError(
                f"crop ({self.crop}) must be at most image_size ({self.image_size}), and a multiple of {self.factor} "
                f"and of {self.downsampling}"
            )
        for name, known in (("prediction", Prediction), ("enlarging", Enlarging)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(get_args(known))}")
        if self.degradation not in KINDS:
            raise ValueError(f"degradation ({self.degradation!r}) must be one of {', '.join(KINDS)}")
        Diffusion(self.schedule, self.n_steps)  # checks both

    @property
    def factor(self) -> int:
        """How many times larger a picture's side becomes."""
        return self.image_size // self.input_size


class Upsampler(StoredModel[UpsamplerConfig]):
    """An upsampler.

    Args:
        config: the sizes.
    """

    kind = KIND
    config_type = UpsamplerConfig

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__(config)
        self.unet = UNet(config)
        self.last = UNet(config) if config.has_last else None

    @property
    def process(self) -> Diffusion:
        """The steps that it is trained on."""
        return Diffusion(self.config.schedule, self.config.n_steps)

    def enlarged(self, small: Tensor) -> Tensor:
        """Return small pictures (B, 3, h, w) of [-1, 1], rounded to 8 bits, as they are read: (B, 3, H, W)."""
        rounded = ((small.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        size = [side * self.config.factor for side in small.shape[2:]]
        antialias = self.config.enlarging == "bicubic"
        return F.interpolate(rounded, size, mode=self.config.enlarging, align_corners=False, antialias=antialias)

    def forward(self, x: Tensor, timesteps: Tensor, enlarged: Tensor, *, is_last: bool = False) -> Tensor:
        """Return what `config.prediction` says, (B, 3, H, W).

        Args:
            x: float (B, 3, H, W), large pictures with noise.
            timesteps: (B,).
            enlarged: (B, 3, H, W), the small pictures as `enlarged` returns them.
            is_last: whether this is the last of the steps.
        """
        unet = self.unet if self.last is None or not is_last else self.last
        output: Tensor = unet(torch.cat([x, enlarged.to(x.dtype)], dim=1), timesteps)
        return output


def upsampler_loss(upsampler: Upsampler, images: Tensor, small: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the squared error, a scalar, and metrics of each sample, (B,): `mse`, and `t` in [0, 1).

    Args:
        upsampler: the upsampler.
        images: (B, 3, H, W) float in [0, 1], crops of large pictures.
        small: (B, 3, h, w) float in [0, 1], the same of small ones, degraded: see `crop_pair`.
        seed: of timesteps and noise.
    """
    process = upsampler.process
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(len(process), (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    x0 = signed(images)
    enlarged = upsampler.enlarged(signed(small))
    output = upsampler(process.noised(x0, noise, steps), process.timesteps_of(steps, x0), enlarged)
    losses, parts = denoising_loss(process, upsampler.config.prediction, output, x0, noise, steps)
    return losses.mean(), {**parts, "t": steps / len(process)}


@torch.no_grad()
def upsample(
    upsampler: Upsampler,
    small: Tensor,
    noise: Noise,
    *,
    steps: int = 27,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    on_pass: OnPass | None = None,
) -> Tensor:
    """Return large pictures of small ones, float32 (B, 3, H, W) in [0, 1].

    Args:
        upsampler: in evaluation mode.
        small: (B, 3, h, w) float in [0, 1], of any size whose large one fits the U-Net.
        noise: B rows.
        steps: of the schedule, evenly.
        sampler: see `sample`.
        eta: see `sample`.
        on_pass: told of each step.

    Raises:
        ValueError: numbers that do not fit each other, or are out of range.
    """
    if len(noise) != len(small):
        raise ValueError(f"{len(noise)} rows of noise for {len(small)} pictures; expected one for each")
    config, process = upsampler.config, upsampler.process.respaced(steps)
    enlarged = upsampler.enlarged(signed(small))
    shape, purpose = enlarged.shape[1:], f"upsampler to {config.image_size}"
    last = process.timesteps[0]
    predictor = Predictor(
        network=lambda x, timesteps: upsampler(x, timesteps, enlarged, is_last=int(timesteps[0]) == last),
        prediction=config.prediction,
        process=process,
        clamp=1.0,
        on_pass=on_pass,
    )
    return unsigned(
        sample(
            predictor,
            noise.normal(f"{purpose}, start", shape, small.device),
            lambda step: noise.normal(f"{purpose}, step {step}", shape, small.device),
            sampler=sampler,
            eta=eta,
        )
    )
