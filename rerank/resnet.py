"""The image tower of five of OpenAI's nine CLIPs: a ResNet whose last layer pools by attention.

Source: https://github.com/openai/CLIP at d05afc4, clip/model.py. Unlike other ResNets:

- a stem of three convolutions, the first of stride 2, and an average pool;
- no convolution has a stride otherwise: an average pool stands before those that would, in the shortcut, too;
- the feature is read by attention from the mean of all positions to all positions.

Letters: B batch  C channels  S positions of the last grid and their mean  D channels there  H heads  K head dim
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rerank.config import CLIPConfig

_EXPANSION = 4
"""Channels that leave a block over those inside of it."""


class BatchNorm(nn.Module):
    """Normalises channels by the statistics that its training ended with, also while other weights are trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x_BCHW, mean, variance, self.weight, self.bias)


class Bottleneck(nn.Module):
    """Adds 1×1, 3×3 and 1×1 convolutions to a shortcut."""

    def __init__(self, n_in: int, n_hidden: int, stride: int) -> None:
        super().__init__()
        n_out = _EXPANSION * n_hidden
        self.conv1 = nn.Conv2d(n_in, n_hidden, 1, bias=False)
        self.bn1 = BatchNorm(n_hidden)
        self.conv2 = nn.Conv2d(n_hidden, n_hidden, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(n_hidden)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(n_hidden, n_out, 1, bias=False)
        self.bn3 = BatchNorm(n_out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.downsample = nn.Sequential(
                OrderedDict(pool=self.pool, conv=nn.Conv2d(n_in, n_out, 1, bias=False), bn=BatchNorm(n_out))
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the sum; height and width are divided by the stride."""
        h_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        h_BCHW = self.pool(F.relu(self.bn2(self.conv2(h_BCHW))))
        return F.relu(self.bn3(self.conv3(h_BCHW)) + self.downsample(x_BCHW))


class AttentionPool(nn.Module):
    """Attention from the mean of all positions to them and itself."""

    def __init__(self, n_patches: int, width: int, n_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.position_embedding = nn.Parameter(torch.randn(n_patches + 1, width) * width**-0.5)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, embed_dim)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """Return features (B, E)."""
        h_BSD = h_BCHW.flatten(2).transpose(1, 2)
        h_BSD = torch.cat([h_BSD.mean(dim=1, keepdim=True), h_BSD], dim=1) + self.position_embedding
        parts_BSD = self.query(h_BSD[:, :1]), self.key(h_BSD), self.value(h_BSD)
        q_BHSK, k_BHSK, v_BHSK = (x_BSD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x_BSD in parts_BSD)
        out_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK)
        output: Tensor = self.out(out_BHSK.transpose(1, 2).flatten(2)[:, 0])
        return output


class ResNetTower(nn.Module):
    """Stem, four stages of blocks, attention pool."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.stem = nn.Sequential()
        for i, (n_in, n_out) in enumerate([(3, width // 2), (width // 2, width // 2), (width // 2, width)], start=1):
            conv = nn.Conv2d(n_in, n_out, 3, stride=2 if i == 1 else 1, padding=1, bias=False)
            for name, module in (("conv", conv), ("bn", BatchNorm(n_out)), ("relu", nn.ReLU())):
                self.stem.add_module(f"{name}{i}", module)
        self.stem.add_module("pool", nn.AvgPool2d(2))
        self.blocks = nn.ModuleList()
        n_in = width
        for stage, n_blocks in enumerate(config.resnet):
            for block in range(n_blocks):
                stride = 2 if stage and not block else 1
                self.blocks.append(Bottleneck(n_in, width << stage, stride))
                n_in = _EXPANSION * (width << stage)
        self.pool = AttentionPool(config.n_patches, n_in, config.vision_heads, config.embed_dim)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return features (B, E), not yet of unit length, of normalised pixels (B, 3, image_size, image_size)."""
        h_BCHW = self.stem(pixels_BCHW.to(self.pool.out.weight.dtype))
        for block in self.blocks:
            h_BCHW = block(h_BCHW)
        output: Tensor = self.pool(h_BCHW)
        return output
