"""What pictures of DALL·E 2 tell of how they were drawn."""

import dataclasses
from typing import Any

from dalle.unclip.cost import prior_passes
from dalle.unclip.pipeline import UnCLIP
from dalle.unclip.settings import Drawing


def settings_of(
    unclip: UnCLIP,
    drawing: Drawing,
    guidance: float,
    n: int,
    *,
    batch_size: int | None = None,
    of_captions: bool = False,
) -> dict[str, Any]:
    """Return what pictures depend on, for their metadata.

    Args:
        unclip: what draws.
        drawing: how.
        guidance: of the decoder, unless it is given.
        n: pictures that are drawn.
        batch_size: of them at the same time; None for as many as fit the memory.
        of_captions: whether the prior draws.

    Raises:
        ValueError: n is out of range, where the batch has to be known.
    """
    settings = dataclasses.asdict(drawing)
    if not of_captions:
        settings = {name: value for name, value in settings.items() if not name.startswith("prior_")}
    else:
        settings["prior_steps"] = prior_passes(unclip.the_prior(), drawing.prior_steps)
    steps = [drawing.enlarging(upsampler, place)[0] for place, upsampler in enumerate(unclip.upsamplers)]
    settings |= {"guidance": drawing.guidance_or(guidance), "upsampler_steps": steps, "precision": unclip.precision}
    if unclip.precision != "fp32":
        if batch_size is None:
            batch_size = unclip.default_batch_size(n, drawing, guidance=guidance, of_captions=of_captions)
        settings["batch_size"] = min(batch_size, n)
    return {"model": "unclip", **settings}
