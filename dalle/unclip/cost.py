"""What DALL·E 2's networks cost: memory, which decides how many pictures are drawn at once, and work, for progress.

Letters: B batch  C channels  L text positions  P positions of a picture
"""

from collections.abc import Iterator
from typing import NamedTuple

from dalle.budget import MAX_PICTURES_AT_ONCE, OnProgress, equal_batches
from storage.models.stored import n_weights
from unclip import AutoregressivePrior
from unclip.embeddings import AnyPrior
from unclip.sampling import OnPass
from unclip.unet import Layer, UNet

_BYTES = 4
"""Of a number; normalisations are float32 whatever the weights are."""
_COPIES = 8
"""Of the largest input of a U-Net's layer, while it computes: itself, the two that it was joined of, normalised,
activated, convolved, and what a convolution rearranges. On a CPU 6 to 8 are measured."""
_PRIOR_COPIES = 15
"""Of the positions of a prior's layer, while it computes: queries, keys, values, and the MLP's."""
_ASKED = 3
"""Positions that the diffusion prior computes in a step: the timestep, the embedding with noise, and the answer."""


class _Step(NamedTuple):
    """A layer of a U-Net at work."""

    layer: Layer
    n_in: int
    n_out: int
    side_in: int
    side_out: int


def unet_products(unet: UNet, side: int) -> int:
    """Return the multiplications of a pass for one picture, about; without those of attention to the context."""
    products = (n_weights(unet.conv_in) + n_weights(unet.conv_out)) * side**2
    for step in _steps(unet, side):
        block, attention, positions = step.layer.block, step.layer.attention, step.side_out**2
        convolutions = n_weights(block.conv_in) + n_weights(block.conv_out) + n_weights(block.skip)
        products += convolutions * positions
        if attention is not None:
            projections = n_weights(attention.qkv) + n_weights(attention.out)
            products += projections * positions + 2 * positions**2 * step.n_out
    return products


def unet_bytes(unet: UNet, side: int) -> int:
    """Return the bytes that a pass takes for one picture, about: what waits for the way up, and the largest layer."""
    down = list(_steps(unet, side))[: len(unet.down)]
    skips = unet.config.width * side**2 + sum(step.n_out * step.side_out**2 for step in down)
    largest = max(max(step.n_in * step.side_in**2, step.n_out * step.side_out**2) for step in _steps(unet, side))
    return _BYTES * (skips + _COPIES * largest)


def prior_passes(prior: AnyPrior, steps: int) -> int:
    """Return the passes for an embedding: of the diffusion prior its steps, of the autoregressive one its tokens.

    Raises:
        ValueError: there are more steps than in the schedule.
    """
    return prior.config.dimensions if isinstance(prior, AutoregressivePrior) else len(prior.process.respaced(steps))


def prior_products(prior: AnyPrior) -> int:
    """Return the multiplications of a pass for one embedding, about; without those of reading the caption."""
    return (1 if isinstance(prior, AutoregressivePrior) else _ASKED) * n_weights(prior.blocks)


def prior_bytes(prior: AnyPrior) -> int:
    """Return the bytes that one embedding takes: keys and values of all positions, and what a layer computes of it."""
    config = prior.config
    asked = prior.config.dimensions if isinstance(prior, AutoregressivePrior) else _ASKED
    positions = config.text_len + 1 + asked
    return _BYTES * positions * config.width * (2 * config.n_layers + _PRIOR_COPIES)


def pictures_at_once(n: int, each: int, budget: int) -> int:
    """Return how many of n pictures, of `each` bytes, to draw at once, in batches of equal size."""
    return equal_batches(n, min(MAX_PICTURES_AT_ONCE, budget // each))


class Meter:
    """Counts the pictures that are done, those under way in part, by the work of all passes.

    Args:
        progress: is told; None for nobody.
        n: pictures there will be.
        work: of all of them, in multiplications.
    """

    def __init__(self, progress: OnProgress | None, n: int, work: float) -> None:
        self._progress, self._n, self._work = progress, n, work
        self._done = 0.0

    def passes(self, products: float) -> OnPass:
        """Return what is to be called after each pass of so many multiplications."""

        def on_pass() -> None:
            self._done += products
            if self._progress is not None:
                self._progress(self._n * min(1.0, self._done / self._work), self._n)

        return on_pass


def _steps(unet: UNet, side: int) -> Iterator[_Step]:
    """Yield the layers in the order in which they compute, for a picture of `side` pixels."""
    for layer in (*unet.down, *unet.middle, *unet.up):
        assert isinstance(layer, Layer)
        block = layer.block
        side_out = {"none": side, "down": side // 2, "up": 2 * side}[block.resampling]
        yield _Step(layer, block.norm_in.num_channels, block.conv_out.out_channels, side, side_out)
        side = side_out
