"""The U-Net of ADM and GLIDE: residual blocks that the timestep scales and shifts, attention that also sees a text.

Sources: Dhariwal & Nichol 2021 (ADM, arXiv 2105.05233), 3 and appendix A; Nichol et al. 2021 (GLIDE, arXiv 2112.10741),
5; sizes of Ramesh et al. 2022 (arXiv 2204.06125), table 3; openai/glide-text2im at 69b5307 for what the papers leave
open. Unusual:

- pictures are halved and enlarged inside of residual blocks, in both of their branches (`resblock_updown`);
- there is no separate cross-attention: keys and values of the text stand in front of the picture's own, under one
  softmax;
- normalisations are computed in float32 whatever the weights are; the last convolution of every branch begins at 0.

Letters: B batch  C channels  H,W picture in pixels  P positions  S context positions  D context width
         M embedding width
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

GROUPS = 32
"""Of all normalisations; widths are multiples of it."""
MAX_LEVELS, MAX_WIDTH = 16, 1 << 16
_LONGEST_PERIOD = 10_000

Zeroed = TypeVar("Zeroed", bound=nn.Module)
Resampling = Literal["none", "down", "up"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are those of the paper's decoder, 2,253 million parameters without conditions."""

    image_size: int = 64
    """Side in pixels of the pictures it was trained on; it takes any multiple of `downsampling`."""
    in_channels: int = 3
    """Channels that it reads."""
    out_channels: int = 6
    """Channels that it returns: twice the picture's where it also learns the variance."""
    width: int = 512
    """Channels of the finest level; a multiple of 32."""
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level, the finest first, in multiples of `width`; the picture is halved between levels."""
    n_blocks: int = 3
    """Residual blocks of a level on the way down; on the way up there is one more."""
    attention: tuple[int, ...] = (1, 2, 3)
    """Levels, 0 the finest, in which attention follows every block."""
    middle_attention: bool = True
    """Whether the coarsest level has attention between its two middle blocks."""
    head_width: int = 64
    """Channels of an attention head."""
    context_width: int = 0
    """Width of the vectors that attention may see beside the picture; 0 for none."""
    scale_shift: bool = True
    """Whether the timestep scales and shifts what a block has normalised, as in ADM, or is only added before."""
    dropout: float = 0.1
    """Probability of zeroing an activation before a block's last convolution, in training."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("image_size", "in_channels", "out_channels", "width")}
        sizes |= {"n_blocks": self.n_blocks, "head_width": self.head_width}
        sizes |= {f"multiples[{i}]": multiple for i, multiple in enumerate(self.multiples)}
        for name, value in sizes.items():
            if type(value) is not int or not value >= 1:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
        if type(self.context_width) is not int or self.context_width < 0:
            raise ValueError(f"context_width ({self.context_width!r}) must be a whole number of at least 0")
        if self.width % GROUPS:
            raise ValueError(f"width ({self.width}) must be a multiple of {GROUPS}, the groups of a normalisation")
        if not 1 <= len(self.multiples) <= MAX_LEVELS:
            raise ValueError(f"multiples must be 1 to {MAX_LEVELS} numbers: each level halves the picture")
        if max(self.widths) > MAX_WIDTH:
            raise ValueError(f"a level has {max(self.widths)} channels: expected at most {MAX_WIDTH}")
        if self.attention != tuple(level for level in range(len(self.multiples)) if level in self.attention):
            raise ValueError(f"attention ({self.attention}) must be rising numbers of levels from 0")
        attending = [self.widths[level] for level in self.attention] + [self.widths[-1]] * self.middle_attention
        if any(width % self.head_width for width in attending):
            raise ValueError(f"levels with attention have {attending} channels: not multiples of {self.head_width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be in [0, 1)")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of {self.downsampling}, "
                f"by which {len(self.multiples)} levels shrink a picture"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.width * multiple for multiple in self.multiples]

    @property
    def downsampling(self) -> int:
        """Side in pixels of what the coarsest level sees as one position: 8 by default."""
        return int(2 ** (len(self.multiples) - 1))

    @property
    def embedding_width(self) -> int:
        """M, of the timestep's embedding: four times `width`."""
        return 4 * self.width


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32; the result has the dtype of the input."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, …)."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of timesteps at falling frequencies, float32 (B, width).

    Args:
        timesteps: (B,).
        width: of the result; even.
    """
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) / half * places)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepMLP(nn.Sequential):
    """A timestep's embedding, through two layers."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__(nn.Linear(width, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width))
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return (B, M) for timesteps (B,)."""
        h = timestep_embedding(timesteps, self.width).to(next(self.parameters()).dtype)
        for layer in self:
            h = layer(h)
        return h


class ResBlock(nn.Module):
    """Two 3×3 convolutions, between them the timestep, beside a skip path.

    Args:
        n_in: channels in.
        n_out: channels out; where they differ, the skip path is a 1×1 convolution.
        config: embedding width, dropout, and how the timestep comes in.
        resampling: whether both paths are halved (by averages) or enlarged (nearest), before the first convolution.
    """

    def __init__(self, n_in: int, n_out: int, config: UNetConfig, resampling: Resampling = "none") -> None:
        super().__init__()
        self.resampling, self.scale_shift = resampling, config.scale_shift
        self.norm_in = GroupNorm(n_in)
        self.conv_in = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.embedding = nn.Linear(config.embedding_width, (1 + config.scale_shift) * n_out)
        self.norm_out = GroupNorm(n_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = _zeroed(nn.Conv2d(n_out, n_out, 3, padding=1))
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, n_out, H', W') for (B, n_in, H, W) and the timestep's embedding (B, M)."""
        h = self.conv_in(self._resampled(F.silu(self.norm_in(x))))
        told = self.embedding(F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + told)
        output: Tensor = self.skip(self._resampled(x)) + self.conv_out(self.dropout(F.silu(h)))
        return output

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resampling == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resampling == "up" else x


class Attention(nn.Module):
    """Attention of a picture's positions to the context and to each other, beside a skip path.

    Args:
        channels: of the picture.
        head_width: of a head.
        context_width: D; 0 for no context.
    """

    def __init__(self, channels: int, head_width: int, context_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels) if context_width else None
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """Return (B, C, H, W) for (B, C, H, W).

        Args:
            x: (B, C, H, W).
            context: (B, S, D); None without.
            context_mask: bool (B, S), False where the context is not to be seen; None to see all.
        """
        h_BPC = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (self._heads(each) for each in self.qkv(h_BPC).chunk(3, dim=2))
        mask = None
        if context is not None:
            assert self.context_kv is not None
            context_k, context_v = (self._heads(each) for each in self.context_kv(context).chunk(2, dim=2))
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
            if context_mask is not None:
                mask = F.pad(context_mask, (0, h_BPC.shape[1]), value=True)[:, None, None]
        out_BPC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        output: Tensor = x + self.out(out_BPC).transpose(1, 2).reshape(x.shape)
        return output

    def _heads(self, x_BPC: Tensor) -> Tensor:
        return x_BPC.view(*x_BPC.shape[:2], -1, self.head_width).transpose(1, 2)


class Layer(nn.Module):
    """A residual block, and attention after it where its level has some."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """Return (B, n_out, H', W'); arguments as of `ResBlock` and `Attention`."""
        h: Tensor = self.block(x, embedding)
        return h if self.attention is None else self.attention(h, context, context_mask)


class UNet(nn.Module):
    """A picture with noise, its timestep, and perhaps a context, to a prediction of the picture's size.

    Args:
        config: the sizes.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Whether layers are computed again in the backward pass instead of being kept."""
        self.time = TimestepMLP(config.width, config.embedding_width)
        self.conv_in = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        last = len(config.multiples) - 1
        width, self.down, skips = config.width, nn.ModuleList(), [config.width]
        for level, n_out in enumerate(config.widths):
            for _ in range(config.n_blocks):
                self.down.append(self._layer(width, n_out, level))
                width = n_out
                skips.append(width)
            if level < last:
                self.down.append(Layer(self._block(width, width, "down"), None))
                skips.append(width)
        middle = Attention(width, config.head_width, config.context_width) if config.middle_attention else None
        self.middle = nn.ModuleList([Layer(self._block(width, width), middle), Layer(self._block(width, width), None)])
        self.up = nn.ModuleList()
        for level, n_out in reversed(list(enumerate(config.widths))):
            for _ in range(config.n_blocks + 1):
                self.up.append(self._layer(width + skips.pop(), n_out, level))
                width = n_out
            if level:
                self.up.append(Layer(self._block(width, width, "up"), None))
        self.norm_out = GroupNorm(width)
        self.conv_out = _zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def _block(self, n_in: int, n_out: int, resampling: Resampling = "none") -> ResBlock:
        return ResBlock(n_in, n_out, self.config, resampling)

    def _layer(self, n_in: int, n_out: int, level: int) -> Layer:
        config = self.config
        has_attention = level in config.attention
        attention = Attention(n_out, config.head_width, config.context_width) if has_attention else None
        return Layer(self._block(n_in, n_out), attention)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        embedding: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, (B, out_channels, H, W) in the dtype of the weights.

        Args:
            x: float (B, in_channels, H, W); H and W multiples of `config.downsampling`.
            timesteps: (B,), of the process that it is trained on.
            embedding: (B, M), added to the timestep's; None for none.
            context: (B, S, context_width), seen by all attention layers; None for none.
            context_mask: bool (B, S), False where the context is not to be seen; None to see all.

        Raises:
            ValueError: x has another number of channels or an impossible size.
        """
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels or any(side % config.downsampling for side in x.shape[2:]):
            raise ValueError(
                f"the U-Net was given {tuple(x.shape)}; expected (B, {config.in_channels}, H, W), H and W multiples of "
                f"{config.downsampling}"
            )
        time: Tensor = self.time(timesteps)
        if embedding is not None:
            time = time + embedding
        conditions = (time, context, context_mask)
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, conditions)
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, conditions)
        for layer in self.up:
            assert isinstance(layer, Layer)
            enlarges = layer.block.resampling == "up"
            h = self._run(layer, h if enlarges else torch.cat([h, skips.pop()], dim=1), conditions)
        output: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return output

    def _run(self, layer: nn.Module, h: Tensor, conditions: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        output: Tensor = checkpoint(layer, h, *conditions, use_reentrant=False) if recompute else layer(h, *conditions)
        return output


def _zeroed(module: Zeroed) -> Zeroed:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
