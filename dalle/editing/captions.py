"""Captions for a picture: completed by the text part of a bundle's transformer, and ranked by how well they fit one.

Ranked by p(picture | caption): a picture's tokens are the same for all captions, so one pass for each, without
sampling. Beside it stands p(picture | no caption), by which all are off alike. Not in the paper.

Letters: C captions  I image positions
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import check_caption, check_captions, check_n, rank_order
from dalle.budget import OnProgress
from dalle.family.captions import caption_model
from dalle.family.texts.bart import BartTokenizer
from dalle.family.tokenizers import text_of
from dalle.sampler.captions import complete
from dalle.sampler.likelihood import log_likelihoods
from dalle.sampling import Ranking, Sampling, candidate_seed, check_ranking
from dvae.images import resize_and_crop, to_tensor
from rerank.pixels import clip_view
from rerank.score import score
from storage.errors import wrong_type

if TYPE_CHECKING:
    from dalle.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A caption that was completed."""

    caption: str
    """The whole of it, as the tokenizer spells it."""
    log_likelihoods: tuple[float, ...]
    """Nats: log p(id | those before it) of each token that was drawn, and of the end if it was drawn."""
    ended: bool
    """Whether the model ended it; the paper's transformer never does, see `dalle.family.captions.is_text`."""

    @property
    def nats_per_token(self) -> float:
        """The mean of the log-likelihoods."""
        return sum(self.log_likelihoods) / len(self.log_likelihoods)


def complete_caption(
    pipe: "Pipeline", beginning: str, sampling: Sampling, *, n: int, n_tokens: int
) -> list[Completion]:
    """Do what `Pipeline.complete_caption` does."""
    if beginning != "":
        check_caption(beginning)
    check_n(n)
    model, tokenizer = caption_model(pipe.dalle), pipe.tokenizer
    assert not isinstance(tokenizer, BartTokenizer), "it comes with DALL·E mini alone"
    ids = tokenizer.encode(beginning)
    seeds = [candidate_seed(sampling.seed, beginning, k) for k in range(n)]
    return [
        Completion(
            caption=tokenizer.decode([*ids, *drawn.tokens]), log_likelihoods=drawn.log_likelihoods, ended=drawn.ended
        )
        for drawn in complete(model, ids, seeds, sampling, n_tokens=n_tokens)
    ]


@dataclass(frozen=True, kw_only=True, repr=False)
class RankedCaptions:
    """Captions of one picture, best first; tensors are on the CPU."""

    captions: tuple[str, ...]
    """C of them."""
    scores: Tensor
    """float32 (C,) in [-1, 1]: CLIP's cosine of picture and caption."""
    log_likelihoods: Tensor
    """float32 (C,), nats: log p(picture | caption), summed over all tokens."""
    without_caption: float
    """Nats: log p(picture | the empty caption)."""
    rank: Ranking
    """What they are ranked by."""

    def __repr__(self) -> str:
        return f"RankedCaptions({len(self.captions)}, best {self.captions[0]!r}, rank={self.rank!r})"


def rank_captions(
    pipe: "Pipeline",
    image: Image.Image,
    captions: Sequence[str],
    rank: Ranking,
    progress: OnProgress | None = None,
) -> RankedCaptions:
    """Do what `Pipeline.rank_captions` does."""
    if not isinstance(image, Image.Image):
        raise wrong_type("image", image, "a picture, opened by dvae.images.open_image")
    check_captions(captions)
    check_ranking(rank)
    if len(captions) == 1:
        raise ValueError(
            "there is one caption: give at least two to rank; how likely a picture is after one, "
            "`dalle score` and Pipeline.likelihood tell"
        )
    pixels = to_tensor(resize_and_crop(image, pipe.dvae.config.image_size))
    tokens_1I = pipe.dvae.encode(pixels[None].to(pipe.dalle.device)).flatten(1)
    texts = torch.cat([text_of(pipe.tokenizer, captions, pipe.dalle), pipe.dalle.config.null_caption()[None]])
    size = pipe.default_batch_size(1, n_captions=len(texts))
    nats: list[float] = []
    for some in torch.split(texts, size):
        nats += log_likelihoods(pipe.dalle, some, tokens_1I.expand(len(some), -1)).sum(1).tolist()
        if progress is not None:
            progress(min(len(nats), len(captions)), len(captions))
    *nats_C, without_caption = nats
    scores_C = score(pipe.clip, captions, clip_view(image, pipe.clip.config.view)[None])[:, 0].cpu()
    likelihoods_C = torch.tensor(nats_C)
    order_C = rank_order(scores_C, likelihoods_C, rank)
    return RankedCaptions(
        captions=tuple(captions[number] for number in order_C.tolist()),
        scores=scores_C[order_C],
        log_likelihoods=likelihoods_C[order_C],
        without_caption=without_caption,
        rank=rank,
    )
