"""Draws a part of a picture anew, so that it fits a caption and what is kept, and pastes it into the picture.

Letters: K kept candidates  I image positions
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dalle.best_of_n import Request
from dalle.budget import OnProgress
from dalle.editing.redraw import Redrawn, redraw
from dalle.editing.regions import Region
from dalle.sampling import SamplingDefaults

if TYPE_CHECKING:
    from dalle.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, repr=False)
class Edited(Redrawn):
    """The best K, pasted into the picture."""

    region: Region
    """What was drawn anew of what."""
    seams: Tensor
    """float32 (K,): see `Region.seams`."""


def edit(
    pipe: "Pipeline",
    region: Region,
    request: Request,
    settings: SamplingDefaults,
    *,
    seed: int,
    batch_size: int | None = None,
    progress: OnProgress | None = None,
    on_tokens: Callable[[Tensor], object] | None = None,
) -> Edited:
    """Do what `Pipeline.edit` does, from objects that are checked already; `on_tokens` as for `redraw`."""
    redrawn = redraw(
        pipe,
        known_tokens(pipe, region),
        request.caption,
        settings,
        n=request.n,
        keep=request.keep,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        on_tokens=on_tokens,
        finish=region.paste,
    )
    return Edited(**vars(redrawn), region=region, seams=region.seams(redrawn.images))


def known_tokens(pipe: "Pipeline", region: Region) -> Tensor:
    """Return the tokens of a picture, -1 where it is drawn anew, int64 (I,)."""
    tokens_I = pipe.dvae.encode(region.pixels[None].to(pipe.dalle.device)).flatten()
    return tokens_I.masked_fill(region.unknown(pipe.dalle.config.grid).to(tokens_I.device), -1)
