"""Draws a share of a picture's tokens anew: variations, which keep the less of it the larger the share is.

Tokens are drawn anew from fine to coarse. The kept ones of a share of 3/4 are every second of every second row, those
of 15/16 every fourth of every fourth row, and so on: as long as a lattice of them stays, so does the layout. Where the
lattice lies, and the order between its levels, follow from the seed. The order does not depend on the share, so a
larger one draws the same tokens anew, and more.

Kept tokens come before and after those that are drawn, hence the particles of `dalle.sampler.particles`. Not in the
paper; DALL·E 2 makes variations from CLIP's embedding (Ramesh et al. 2022, §3.1).

Letters: K kept candidates  I image positions  H, W pixels
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import check_caption, check_keep
from dalle.budget import OnProgress
from dalle.editing.redraw import Redrawn, redraw
from dalle.sampling import SamplingDefaults
from dvae.images import resize_and_crop, to_image, to_tensor
from storage.errors import check_number, wrong_type

if TYPE_CHECKING:
    from dalle.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, repr=False)
class Varied(Redrawn):
    """The best K variations, as the dVAE decodes them: kept tokens look as in the reconstruction, but at new ones."""

    pixels: Tensor
    """float32 (3, H, W) in [0, 1]: the picture as the bundle sees it."""
    reconstruction: Tensor
    """float32 (3, H, W) in [0, 1]: its tokens, decoded."""
    is_new: Tensor
    """bool (I,): the tokens that were drawn anew."""
    n_changed: tuple[int, ...]
    """K of them: how many tokens are others than the picture's. Some are drawn as they were."""

    def shown(self) -> Image.Image:
        """Return the picture with what is drawn anew in grey."""
        grid, side = math.isqrt(len(self.is_new)), self.pixels.shape[-1]
        is_new_HW = np.kron(self.is_new.reshape(grid, grid).numpy(), np.ones((side // grid, side // grid), dtype=bool))
        return to_image(torch.where(torch.from_numpy(is_new_HW), 0.5, self.pixels))


def variations(
    pipe: "Pipeline",
    image: Image.Image,
    caption: str,
    settings: SamplingDefaults,
    *,
    n: int,
    keep: int,
    strength: float,
    seed: int,
    batch_size: int | None = None,
    progress: OnProgress | None = None,
    on_tokens: Callable[[Tensor], object] | None = None,
) -> Varied:
    """Do what `Pipeline.variations` does; `on_tokens` as for `redraw`."""
    if not isinstance(image, Image.Image):
        raise wrong_type("image", image, "a picture, opened by dvae.images.open_image")
    if caption != "":
        check_caption(caption)
    check_keep(keep, n)
    pixels = to_tensor(resize_and_crop(image, pipe.dvae.config.image_size))
    tokens_I = pipe.dvae.encode(pixels[None].to(pipe.dalle.device)).flatten()
    is_new_I = drawn_anew(pipe.dalle.config.grid, strength, seed)
    redrawn = redraw(
        pipe,
        tokens_I.masked_fill(is_new_I.to(tokens_I.device), -1),
        caption,
        settings,
        n=n,
        keep=keep,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        on_tokens=on_tokens,
    )
    return Varied(
        **vars(redrawn),
        pixels=pixels,
        reconstruction=pipe.decode(tokens_I[None])[0].cpu(),
        is_new=is_new_I,
        n_changed=tuple((redrawn.tokens != tokens_I.cpu()).sum(1).tolist()),
    )


def usable_settings(settings: SamplingDefaults, caption: str) -> SamplingDefaults:
    """Return settings that need no caption if there is none: guidance compares with none, and CLIP needs one."""
    return settings if caption else settings.updated(guidance=1.0, rank="likelihood")


def check_strength(strength: float) -> None:
    """Raise ValueError for a share that is no number from 0 to 1."""
    check_number("strength", strength)
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength is {strength}: give the share of the picture that is drawn anew, from 0 (none) to 1 (all)"
        )


def drawn_anew(grid: int, strength: float, seed: int) -> Tensor:
    """Return which tokens of a picture are drawn anew: the first strength · I, rounded, from fine to coarse.

    Args:
        grid: rows, and columns, of tokens; I is its square.
        strength: 0 to 1.
        seed: any whole number.

    Returns:
        bool (I,).

    Raises:
        ValueError: no number from 0 to 1.
    """
    check_strength(strength)
    rng = np.random.default_rng(np.random.SeedSequence(abs(seed), spawn_key=(int(seed < 0),)))
    n_levels = grid.bit_length() - 1
    places = np.arange(grid) + rng.integers(2**n_levels, size=(2, 1))
    # a place's level: how often it can be halved; a token has the lower one of its row and column
    levels = sum((places % 2**level == 0).astype(int) for level in range(1, n_levels + 1))
    coarseness = np.minimum.outer(*levels).ravel() if n_levels else np.zeros(1)
    order = np.argsort(coarseness + rng.random(grid * grid))
    is_new_I = torch.zeros(grid * grid, dtype=torch.bool)
    is_new_I[torch.from_numpy(order[: round(strength * grid * grid)])] = True
    return is_new_I
