"""What DALL·E 2 draws for the server: of captions, parts of pictures, and variations."""

from collections.abc import Callable
from typing import Any

from dalle.best_of_n import Ranked, Request
from dalle.editing.regions import Region
from dalle.server.queueing.batch import Varying, Work
from dalle.unclip.pipeline import UnCLIP
from dvae.images import to_image


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
    source, n, keep = work.source, work.n, work.keep
    if isinstance(source, Region):
        return unclip.edit(to_image(source.pixels), source.is_new, work.caption, n=n, keep=keep, **told)
    if isinstance(source, Varying):
        found = unclip.variations(source.image, n=n, keep=keep, caption=work.caption, eta=source.strength, **told)
        numbers = tuple(int(each["candidate"]) for each in found.each)
        images, scores = found.images, found.scores
        return Ranked(caption=work.caption, images=images, scores=scores, candidates=numbers, rank="clip")
    return unclip.best(Request(caption=work.caption, n=n, keep=keep), **told)
