"""Inception v3 (Szegedy et al. 2015) as two published files have it, by their names.

- "tf": TensorFlow's network of 2015-12-05, 1,008 classes. Its average pools do not count padding, and that of the last
  block is a maximum.
- "imagenet": torchvision's, 1,000 classes, trained anew. Its average pools count padding as zeros.

Letters: B batch  C channels  K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LayoutName = Literal["tf", "imagenet"]
FEATURES = 2048


@dataclass(frozen=True)
class Layout:
    """What differs between the published networks, and how their files are known."""

    name: LayoutName
    classes: int
    count_padding: bool
    """Whether average pools count the zeros around a picture."""
    last_pool: Literal["average", "maximum"]
    """Of the last block."""
    file: str
    """The published file, in words."""
    sha256: tuple[str, ...]
    """First 8 digits of published files' sha256, newest first."""


LAYOUTS: dict[LayoutName, Layout] = {
    "tf": Layout(
        name="tf",
        classes=1008,
        count_padding=False,
        last_pool="maximum",
        file="pt_inception-2015-12-05-6726825d.pth (95.5 MB; also weights-inception-2015-12-05-6726825d.pth)",
        sha256=("6726825d",),
    ),
    "imagenet": Layout(
        name="imagenet",
        classes=1000,
        count_padding=True,
        last_pool="average",
        file="torchvision's inception_v3_google-0cc3c7bd.pth (or the older inception_v3_google-1a9a5a14.pth)",
        sha256=("0cc3c7bd", "1a9a5a14"),
    ),
}

Kernel = int | tuple[int, int]
Step = tuple[tuple[str, int, Kernel], ...]
"""Convolutions of the same input, joined: name, output channels, kernel."""
Branch = tuple[Step, ...]


def _chain(name: str, *convolutions: tuple[int, Kernel]) -> Branch:
    """Return a branch of convolutions in a row, which the files number from 1 if there are several."""
    if len(convolutions) == 1:
        return (((name, *convolutions[0]),),)
    return tuple(((f"{name}_{number}", *each),) for number, each in enumerate(convolutions, 1))


def _fork(name: str, letter: str, channels: int) -> Step:
    """Return the step that ends a branch of the last two blocks: a flat and a high kernel side by side."""
    return ((f"{name}_{letter}a", channels, (1, 3)), (f"{name}_{letter}b", channels, (3, 1)))


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        _chain("branch1x1", (64, 1)),
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        _chain("branch_pool", (pooled, 1)),
    )


def _c(c: int) -> tuple[Branch, ...]:
    return (
        _chain("branch1x1", (192, 1)),
        _chain("branch7x7", (c, 1), (c, (1, 7)), (192, (7, 1))),
        _chain("branch7x7dbl", (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))),
        _chain("branch_pool", (192, 1)),
    )


_E = (
    _chain("branch1x1", (320, 1)),
    ((("branch3x3_1", 384, 1),), _fork("branch3x3", "2", 384)),
    (*_chain("branch3x3dbl", (448, 1), (384, 3)), _fork("branch3x3dbl", "3", 384)),
    _chain("branch_pool", (192, 1)),
)
_BLOCKS: tuple[tuple[str, int, tuple[Branch, ...]], ...] = (
    ("Mixed_5b", 192, _a(32)),
    ("Mixed_5c", 256, _a(64)),
    ("Mixed_5d", 288, _a(64)),
    ("Mixed_6a", 288, (_chain("branch3x3", (384, 3)), _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)))),
    ("Mixed_6b", 768, _c(128)),
    ("Mixed_6c", 768, _c(160)),
    ("Mixed_6d", 768, _c(160)),
    ("Mixed_6e", 768, _c(192)),
    (
        "Mixed_7a",
        768,
        (
            _chain("branch3x3", (192, 1), (320, 3)),
            _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
        ),
    ),
    ("Mixed_7b", 1280, _E),
    ("Mixed_7c", 2048, _E),
)
"""Name, input channels, branches. A block without a branch_pool halves the picture, and keeps its maxima beside."""


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, *, same: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B,outputs,H',W')."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches of convolutions, and one of a pool, joined."""

    def __init__(self, inputs: int, branches: Sequence[Branch], *, count_padding: bool, maximum: bool) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self.halves = self.branches[-1][0][0][0] != "branch_pool"
        self.count_padding, self.maximum = count_padding, maximum
        for branch in self.branches:
            channels = inputs
            for step in branch:
                is_last = self.halves and step is branch[-1]
                for name, outputs, kernel in step:
                    self.add_module(name, Convolution(channels, outputs, kernel, 2 if is_last else 1, same=not is_last))
                channels = sum(outputs for _, outputs, _ in step)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branches' outputs, joined as channels."""
        outputs = [self._run(branch, self._pooled(x) if self._pools(branch) else x) for branch in self.branches]
        if self.halves:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, dim=1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for step in branch:
            x = torch.cat([self.get_submodule(name)(x) for name, _, _ in step], dim=1)
        return x

    def _pools(self, branch: Branch) -> bool:
        return branch[0][0][0] == "branch_pool"

    def _pooled(self, x: Tensor) -> Tensor:
        if self.maximum:
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.count_padding)


class Inception(nn.Module):
    """Inception v3 without its auxiliary head; weights are loaded by the names of the published files."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, same=False)
        for name, inputs, branches in _BLOCKS:
            maximum = layout.last_pool == "maximum" and name == "Mixed_7c"
            self.add_module(name, Mixed(inputs, branches, count_padding=layout.count_padding, maximum=maximum))
        self.fc = nn.Linear(FEATURES, layout.classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of the last average pool.

        Args:
            pixels: float32 (B,3,299,299), as the network was trained with them.

        Returns:
            float32 (B,2048)
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, _, _ in _BLOCKS:
            x = self.get_submodule(name)(x)
        features: Tensor = x.mean(dim=(2, 3))
        return features

    def logits(self, features: Tensor, *, bias: bool) -> Tensor:
        """Return the logits (B,K) of features (B,2048), with or without the bias of the last layer."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)
