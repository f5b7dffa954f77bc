"""Samples the captions of a shard, looks at every candidate, and keeps what all best-of-N numbers need.

Letters: R captions  M candidates of each  J values of N  K kept candidates  I image positions
         E features of CLIP  D features of the network
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import rank_order
from dalle.budget import OnProgress, decoded_at_once, memory_budget
from dalle.data.pictures import in_batches
from dalle.evaluation.nested.captions import Row
from dalle.evaluation.nested.settings import NestedSettings
from dalle.evaluation.networks import PictureNetwork
from dalle.pipeline import Pipeline
from dalle.sampling import Ranking
from dvae.images import to_image
from rerank import CLIP
from rerank.score import embed_captions, embed_images

Checker = Callable[[Image.Image, str], bool]
"""Says whether a picture shows exactly what a caption says."""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What looks at candidates beside the CLIP that ranks them."""

    judge: CLIP | None = None
    """Another CLIP, which chooses nothing."""
    checker: Checker | None = None
    """Knows the truth of every caption."""
    network: PictureNetwork | None = None
    """Features for distances to real pictures."""
    radii: tuple[float, ...] = (0,)
    """Of the blur, 0 among them: the best of M has features at each, the other picks at 0."""


@dataclass(kw_only=True)
class Stopwatch:
    """Seconds of each stage, summed."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add what is done meanwhile to a stage."""
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun


def picks(scores: Tensor, log_likelihoods: Tensor, rank: Ranking, best_of: Sequence[int]) -> Tensor:
    """Return the numbers of the best of the first N candidates, for each N, int64 (…,J).

    Args:
        scores: float (…,M), CLIP's.
        log_likelihoods: float (…,M).
        rank: what is best.
        best_of: the N, each at most M.
    """
    firsts = [rank_order(scores[..., :n], log_likelihoods[..., :n], rank)[..., 0] for n in best_of]
    return torch.stack(firsts, dim=-1)


def group_picks(scores: Tensor, log_likelihoods: Tensor, rank: Ranking, n_groups: int) -> Tensor:
    """Return the numbers of the best of each of some equal groups of candidates in a row, int64 (n_groups,)."""
    size = len(log_likelihoods) // n_groups
    firsts = torch.arange(0, n_groups * size, size)
    return firsts + rank_order(scores.reshape(n_groups, size), log_likelihoods.reshape(n_groups, size), rank)[:, 0]


def sample_rows(
    pipe: Pipeline,
    rows: Sequence[Row],
    settings: NestedSettings,
    looks: Looks,
    *,
    batch_size: int,
    progress: OnProgress | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sample M candidates of each caption and measure them; a function of its arguments alone.

    Args:
        pipe: the bundle.
        rows: R captions.
        settings: what to sample and to keep.
        looks: what looks at the candidates.
        batch_size: candidates sampled at once.
        progress: told how many candidates are done.

    Returns:
        Tensors on the CPU, and the seconds of each stage. "rows" int64 (R,): the captions' numbers. "scores",
        "log_likelihoods", "judged" float32 and "right" bool, all (R,M). "kept" int32 (R,K): the picks of each N, and of
        each group if there is more than one; "tokens" (R,K,I): theirs, of `token_type`. "clip_features" float32 (R,J,E)
        of the picks and "caption_features" (R,E): of the judge, or of the CLIP that ranks. "features" float32 (R,J,D)
        of the picks, "features_2" (R,D) of the best of M at the radius 2, and so on; "logits" likewise. What was not
        asked for is not there.
    """
    watch = Stopwatch()
    pictures: list[list[Image.Image]] = []
    total, m = len(rows) * settings.m, settings.m
    found: list[dict[str, Tensor]] = []
    for group in in_batches(rows, max(1, batch_size // m)):
        before = len(found) * m

        def told(done: float, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        with watch.timing("sampling"):
            samples = pipe.sample_tokens(
                [row.caption for row in group],
                m,
                settings.sampling,
                rows=[row.number for row in group],
                batch_size=batch_size,
                progress=told,
            )
        for row, tokens_MI, log_likelihoods_M in zip(group, samples.tokens, samples.log_likelihoods, strict=True):
            kept, picked = _look(pipe, row, tokens_MI, log_likelihoods_M, settings, looks, watch)
            found.append(kept)
            pictures.append(picked if looks.network is not None else [])
    joined = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    if looks.network is not None:
        with watch.timing("features"):
            joined |= _features(looks.network, looks.radii, pictures, joined["kept"][:, : len(settings.best_of)])
    return joined, watch.seconds


def _features(
    network: PictureNetwork, radii: Sequence[float], pictures: Sequence[Sequence[Image.Image]], picked_RJ: Tensor
) -> dict[str, Tensor]:
    """Return the features and logits of the picks (R,J,D), and at each radius of the best of M, (R,D).

    Args:
        network: makes them.
        radii: of the blur.
        pictures: of each caption, for each N; those of the same candidate are computed once.
        picked_RJ: their candidates' numbers.
    """
    n_captions, n_picks = picked_RJ.shape
    is_new_RJ = torch.ones_like(picked_RJ, dtype=torch.bool)
    is_new_RJ[:, 1:] = picked_RJ[:, 1:] != picked_RJ[:, :-1]  # as N grows, one pick stays for long
    place_RJ = is_new_RJ.flatten().cumsum(0).reshape(n_captions, n_picks) - 1
    new = [
        picture for row, is_new in zip(pictures, is_new_RJ.tolist(), strict=True) for picture in compress(row, is_new)
    ]
    found = {name: rows[place_RJ] for name, rows in network(new).items()}
    for radius in filter(None, radii):
        at_radius = network([row[-1] for row in pictures], radius)
        found |= {at(name, radius): rows for name, rows in at_radius.items()}
    return found


def _look(
    pipe: Pipeline,
    row: Row,
    tokens_MI: Tensor,
    log_likelihoods_M: Tensor,
    settings: NestedSettings,
    looks: Looks,
    watch: Stopwatch,
) -> tuple[dict[str, Tensor], list[Image.Image]]:
    """Return what is kept of one caption, and the picks' pictures, one for each N."""
    clips = [pipe.clip] if looks.judge is None else [pipe.clip, looks.judge]
    at_once = decoded_at_once(pipe.dvae, memory_budget(pipe.dalle.device, pipe.memory), len(tokens_MI))
    pictures: list[Image.Image] = []
    embedded: list[list[Tensor]] = [[] for _ in clips]
    with watch.timing("decoding and scoring"):
        captions_E = [embed_captions(clip, [row.caption])[0].cpu() for clip in clips]
        for some_NI in torch.split(tokens_MI, at_once):
            images = pipe.decode(some_NI)
            for clip, features in zip(clips, embedded, strict=True):
                features.append(embed_images(clip, images).cpu())
            pictures += [to_image(image) for image in images]
    features_ME = [torch.cat(features) for features in embedded]
    scores = [features @ caption for features, caption in zip(features_ME, captions_E, strict=True)]
    picked_J = picks(scores[0], log_likelihoods_M, settings.rank, settings.best_of)
    kept_K = picked_J
    if settings.pictures > 1:
        groups = group_picks(scores[0], log_likelihoods_M, settings.rank, settings.pictures)
        kept_K = torch.cat([picked_J, groups])
    found = {
        "rows": torch.tensor(row.number),
        "scores": scores[0],
        "log_likelihoods": log_likelihoods_M,
        "kept": kept_K.int(),
        "tokens": tokens_MI[kept_K].to(token_type(pipe.dalle.config.image_vocab)),
        "clip_features": features_ME[-1][picked_J],
        "caption_features": captions_E[-1],
    }
    if looks.judge is not None:
        found["judged"] = scores[1]
    if looks.checker is not None:
        with watch.timing("checking"):
            found["right"] = torch.tensor([looks.checker(picture, row.caption) for picture in pictures])
    return found, [pictures[k] for k in picked_J.tolist()]


def token_type(vocab: int) -> torch.dtype:
    """Return the type in which image tokens are kept."""
    return torch.int16 if vocab <= torch.iinfo(torch.int16).max + 1 else torch.int32


def at(name: str, radius: float) -> str:
    """Return the name in a shard of what a network made at a radius: "features", "features_2"."""
    return f"{name}_{radius:g}" if radius else name
