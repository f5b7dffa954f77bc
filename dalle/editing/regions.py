"""Which pixels and tokens of a picture are drawn anew, the picture's own pixels around them, and the seam between both.

Legend: N pictures  C channels  H, W pixels of the bundle's pictures  Y, X cells of the token grid  I = Y·X
        h, w pixels of what is given
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dvae.colour import as_srgb
from dvae.images import resize_and_crop, to_image, to_tensor
from storage.errors import check_whole, wrong_type

WHITE = 128
"""From this grey on, of 255, a mask without transparency is white."""

Mask = Image.Image | Tensor | NDArray[np.bool_]
"""True, white, or, in a picture with something transparent in it, alpha 0: is drawn anew."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Region:
    """A picture as the bundle sees it, and what is drawn anew of it; equal to itself only."""

    pixels: Tensor
    """float32 (3, H, W) in [0, 1], 8 bits each."""
    is_new: Tensor
    """bool (H, W): the pixels that are drawn anew."""

    @classmethod
    def of(cls, image: Image.Image, mask: Mask, side: int) -> Self:
        """Resize and crop a picture and its mask; a pixel that the mask touches is drawn anew.

        Args:
            image: of any size.
            mask: of any size, but of the picture's proportions.
            side: H and W, in pixels.

        Raises:
            ValueError: no picture, no mask, or other proportions.
        """
        if not isinstance(image, Image.Image):
            raise wrong_type("image", image, "a picture, opened by dvae.images.open_image")
        is_new_hw = _marked(mask)
        h, w = is_new_hw.shape
        # by rounding, a scaled mask has up to a pixel more or less
        if abs(w * image.height - h * image.width) > max(image.size):
            raise ValueError(
                f"the mask has {w}×{h} pixels, the picture {image.width}×{image.height}: "
                "give a mask of the same size, or of the same proportions"
            )
        short = min(h, w)
        centre = ((w - short) / 2, (h - short) / 2, (w + short) / 2, (h + short) / 2)
        scaled = Image.fromarray(is_new_hw.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX, centre)
        return cls(pixels=to_tensor(resize_and_crop(image, side)), is_new=torch.from_numpy(np.array(scaled)) > 0)

    def unknown(self, grid: int) -> Tensor:
        """Return the tokens whose cells hold a pixel that is drawn anew, bool (I,), for Y = X = grid."""
        touched_1YX: Tensor = F.adaptive_max_pool2d(self.is_new[None].float(), grid)
        return touched_1YX.flatten() > 0

    def paste(self, images: Tensor) -> Tensor:
        """Return decoded pictures with the picture's own pixels where it is kept: exactly these.

        Args:
            images: float32 (N, 3, H, W) in [0, 1], or their tops (N, 3, h, W).
        """
        h = images.shape[2]
        return torch.where(self.is_new[:h].to(images.device), images, self.pixels[:, :h].to(images.device))

    def seams(self, images: Tensor) -> Tensor:
        """Return how much pixels differ across the border of what is drawn anew, of 255, float32 (N,).

        It is the mean absolute difference of neighbours of which one is drawn anew; 0 if there is no border.
        """
        differences = []
        for axis in (-2, -1):
            is_border = self.is_new.diff(dim=axis).cpu()
            differences.append(images.cpu().diff(dim=axis).abs().mean(1)[:, is_border])
        across_NK = torch.cat(differences, dim=1)
        return across_NK.mean(1) * 255 if across_NK.shape[1] else torch.zeros(len(images))

    @property
    def original_seam(self) -> float:
        """The same of the picture as it is: what the seams are to be compared with."""
        return float(self.seams(self.pixels[None])[0])

    def original(self) -> Image.Image:
        """Return the picture."""
        return to_image(self.pixels)

    def shown(self) -> Image.Image:
        """Return the picture with what is drawn anew in grey."""
        return to_image(torch.where(self.is_new, 0.5, self.pixels))


def check_top(image: Image.Image, keep_rows: int, grid: int) -> None:
    """Raise ValueError unless there is a picture, of which some rows of tokens are kept, and some are left to draw."""
    if not isinstance(image, Image.Image):
        raise wrong_type("image", image, "a picture, opened by dvae.images.open_image")
    check_whole("keep_rows", keep_rows)
    if not 0 <= keep_rows < grid:
        raise ValueError(
            f"keep_rows is {keep_rows}, but pictures of this bundle have {grid} rows of tokens: "
            f"give 0 to {grid - 1}, so that at least one row is left to complete"
        )


def transparent(image: Image.Image) -> NDArray[np.bool_] | None:
    """Return where an RGB or RGBA picture is fully transparent (alpha 0), bool (h, w); None if it is nowhere."""
    if image.mode != "RGBA":
        return None
    is_clear: NDArray[np.bool_] = np.asarray(image.getchannel("A")) == 0
    return is_clear if is_clear.any() else None


def _marked(mask: Mask) -> NDArray[np.bool_]:
    """Return what a mask marks to be drawn anew, bool (h, w)."""
    if isinstance(mask, Image.Image):
        mask = as_srgb(mask, "the mask", keep_alpha=True)
        is_clear = transparent(mask)
        is_white: NDArray[np.bool_] = np.asarray(mask.convert("L")) >= WHITE
        return is_white if is_clear is None else is_clear
    if isinstance(mask, Tensor):
        mask = mask.cpu().numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2 or mask.size == 0:
        raise wrong_type("mask", mask, "a picture, or booleans of shape (height, width), True where it is drawn anew")
    return mask
