"""What DALL·E 2 draws for the server: of captions, parts of pictures, and variations."""

from collections.abc import Callable
from typing import Any

from dalle.best_of_n import Ranked, Request
from dalle.editing.regions import Region
from dalle.server.queueing.batch import Varying, Work
from dalle.unclip.pipeline import UnCLIP
from dvae.images import to_image
from rerank import score


def draw_by_unclip(unclip: UnCLIP, work: Work, on_share: Callable[[float], None]) -> Ranked:
    """Return the best pictures of a work that has a `drawing`.

    Args:
        unclip: draws.
        work: what is asked for.
        on_share: told after each pass of a network how much of the work is done, 0 … 1; what it raises ends the work.
    """
    told: dict[str, Any] = {
        "seed": work.sampling.seed,
        "drawing": work.drawing,
        "progress": lambda done, n: on_share(done / n),
    }
    if isinstance(work.source, Varying):
        return _varied(unclip, work, work.source, told)
    if isinstance(work.source, Region):
        picture, mask = to_image(work.source.pixels), work.source.is_new
        return unclip.edit(picture, mask, work.caption, n=work.n, keep=work.keep, **told)
    return unclip.best(Request(caption=work.caption, n=work.n, keep=work.keep), **told)


def _varied(unclip: UnCLIP, work: Work, source: Varying, told: dict[str, Any]) -> Ranked:
    """Return variations, ranked by what CLIP sees of the caption in them; without one, of the picture."""
    found = unclip.variations(source.image, n=work.n, eta=source.strength, **told)
    scores = score(unclip.clip, [work.caption], found.images)[0] if work.caption else found.scores
    order = scores.argsort(descending=True, stable=True)[: work.keep]
    return Ranked(
        caption=work.caption,
        images=found.images[order],
        scores=scores[order].float(),
        candidates=tuple(order.tolist()),
        rank="clip",
    )
