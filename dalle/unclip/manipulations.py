"""Pictures from pictures, by DALL·E 2: variations, interpolation, text differences, probing.

A picture is an embedding, which CLIP gives, and the noise that it is drawn from, which an inversion finds: the
embedding is its gist, the noise the rest. An inversion holds without guidance, for the same caption and steps; here
there is no caption.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 3, and 4 for principal components.

Letters: N pictures  E embedding  H, W pixels
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle.best_of_n import check_caption, check_keep, check_n
from dalle.budget import OnProgress, check_batch_size
from dalle.sampling import undisturbed
from dalle.unclip.components import Components
from dalle.unclip.loaded import LoadedUnCLIP
from dalle.unclip.results import Series
from dalle.unclip.settings import Drawing, check_share
from dalle.unclip.work import Work
from rerank.score import embed_captions, embed_images
from storage.errors import check_whole
from unclip.conditions import Text
from unclip.decoding import GUIDANCE, start_noise
from unclip.latents import PrincipalComponents, monotone_path, slerp, slerp_noise, text_difference
from unclip.sampling import Noise

CANDIDATES_BETWEEN = 8
"""Pictures drawn for each place between the ends of an interpolation, of which one is kept."""
MAX_BETWEEN = 10_000
"""Pictures drawn for an interpolation, at most: their noise is held all at once."""
TURN = 0.5
"""How far a candidate's noise is turned from its place's own noise towards independent noise, as a share of the angle
between the two, some 90°. Of 0.25, 0.35 and 0.5 it is the least with which no picture went back, in 192 steps."""


class Manipulations(LoadedUnCLIP):
    """What is done with pictures."""

    @undisturbed()
    def variations(
        self,
        picture: Image.Image,
        *,
        n: int = 8,
        keep: int | None = None,
        caption: str = "",
        eta: float = 0.7,
        seed: int = 0,
        drawing: Drawing | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Series:
        """Draw a picture's embedding from the picture's own noise, with new noise on the way: others with its gist.

        Args:
            picture: any; its centre is seen.
            n: variations.
            keep: how many of them to return, the best by CLIP's cosine with `caption`, or with the picture, first; None
                for all, in order. Only these are enlarged.
            caption: what the best are chosen by; empty for the picture itself. It does not change what is drawn.
            eta: how much noise is new, from 0, with which all are the picture drawn again, to 1.
            seed: variation k is a function of (seed, picture, k).
            drawing: how; with a guidance of 1 unless it is given.
            batch_size: pictures drawn at the same time.
            progress: told how many are done.

        Raises:
            ValueError: no picture, or an argument of a wrong type or out of range.
        """
        check_keep(n if keep is None else keep, n)
        check_share("eta", eta)
        _check_inverting(drawing)
        noise = _noise(seed, range(n))
        work = self._work(drawing, 1, n, batch_size, progress, inversions=1, enlarged=n if keep is None else keep)
        text, seen = self.uncaptioned(), self.seen(picture)
        start, embeddings = work.inverted(seen, text), seen.embedding.expand(n, -1)
        images, features = self._drawn(work, embeddings, text, noise, start, eta)
        asked = embed_captions(self.clip, [caption]) if caption else embeddings
        scores = _cosines(features, asked)
        order = torch.arange(n) if keep is None else scores.argsort(descending=True, stable=True)[:keep]
        numbers = order.tolist()
        large = work.large(images[order], Noise(tuple(noise.rows[k] for k in numbers)))
        each = tuple({"candidate": k} for k in numbers)
        return Series(caption=caption, images=large, scores=scores[order], each=each)

    @undisturbed()
    def interpolate(
        self,
        a: Image.Image,
        b: Image.Image,
        *,
        n: int = 9,
        keep_ends: bool = False,
        candidates: int = CANDIDATES_BETWEEN,
        seed: int = 0,
        drawing: Drawing | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Series:
        """Draw pictures between two: of embeddings on the great circle from one to the other.

        Args:
            a: the first picture; its centre is seen.
            b: the last.
            n: pictures, at least 2, at equal distances.
            keep_ends: go from the noise of the one picture to that of the other too, so that both are drawn again at
                the ends; otherwise all are drawn from the same new noise.
            candidates: pictures to draw for each place between the ends; one is kept: see `monotone_path`. Candidate 0
                is the paper's, the others are drawn from noise some 45° from its own. Deviation: the paper draws one.
            seed: of all noise, and of what is enlarged.
            drawing: how; to keep the ends, with a guidance of 1 unless it is given.
            batch_size: pictures drawn at the same time.
            progress: told how many are done.

        Raises:
            ValueError: fewer than 2 pictures, more than `MAX_BETWEEN` to draw, two embeddings that are opposite, or as
                `variations`.
        """
        thetas, rows = _thetas(n, 1.0), rows_between(n, candidates)
        noise = _noise(seed, [place + n * number if number else 0 for place, number in rows])
        guidance = 1 if keep_ends else GUIDANCE
        if keep_ends:
            _check_inverting(drawing)
        work = self._work(drawing, guidance, len(rows), batch_size, progress, enlarged=n, inversions=2 * keep_ends)
        text, ends = self.uncaptioned(), [self.seen(picture) for picture in (a, b)]
        embeddings = torch.cat([slerp(ends[0].embedding, ends[1].embedding, theta) for theta in thetas])
        if keep_ends:
            first, last = (work.inverted(seen, text).cpu() for seen in ends)
        else:
            first = last = start_noise(self.decoder, _noise(seed, [0]))
        own = [slerp_noise(first, last, theta) for theta in thetas]
        starts = [
            slerp_noise(own[place], start_noise(self.decoder, Noise((row,)), "decoder, candidate"), TURN)
            if number
            else own[place]
            for (place, number), row in zip(rows, noise.rows, strict=True)
        ]
        places = [place for place, _ in rows]
        images, features = self._drawn(work, embeddings[places], text, noise, torch.cat(starts))
        chosen = monotone_path(torch.split(features, [1, *[candidates] * (n - 2), 1]), embeddings.cpu())
        kept = [k for k, (place, number) in enumerate(rows) if number == chosen[place]]
        each = [{"theta": theta, "candidate": number} for theta, number in zip(thetas, chosen, strict=True)]
        return self._series("", work, (images[kept], features[kept]), embeddings, _noise(seed, [0] * n), each)

    @undisturbed()
    def text_diff(
        self,
        picture: Image.Image,
        before: str,
        after: str,
        *,
        theta: float = 0.4,
        n: int = 9,
        seed: int = 0,
        drawing: Drawing | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Series:
        """Change a picture in the direction from one caption to another, further and further, from its own noise.

        Args:
            picture: any; its centre is seen.
            before: what it shows, or something as general as "a photo".
            after: what it should become.
            theta: how far the last picture goes, of the angle between the picture's embedding and the direction: 0.25
                to 0.5 in the paper, 0 is the picture drawn again, 1 the direction itself.
            n: pictures, at least 2, from 0 to theta.
            seed: of what is enlarged.
            drawing: how; with a guidance of 1 unless it is given.
            batch_size: pictures drawn at the same time.
            progress: told how many are done.

        Raises:
            ValueError: an empty caption, two of the same embedding, or as `variations`.
        """
        for caption in (before, after):
            check_caption(caption)
        check_share("theta", theta)
        thetas, noise = _thetas(n, theta), _noise(seed, [0] * n)
        _check_inverting(drawing)
        work = self._work(drawing, 1, n, batch_size, progress, inversions=1)
        text, seen = self.uncaptioned(), self.seen(picture)
        features = [self.captioned(caption).features for caption in (before, after)]
        # not all CLIPs' embeddings are read with unit length
        direction = text_difference(*features) * seen.embedding.norm(dim=-1, keepdim=True)
        embeddings = torch.cat([slerp(seen.embedding, direction, share) for share in thetas])
        start = work.inverted(seen, text)
        drawn = self._drawn(work, embeddings, text, noise, start)
        return self._series(after, work, drawn, embeddings, noise, [{"theta": theta} for theta in thetas])

    @undisturbed()
    def probe(
        self,
        picture: Image.Image,
        dimensions: Sequence[int],
        *,
        seed: int = 0,
        drawing: Drawing | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Series:
        """Draw a picture's embedding rebuilt from some of its principal components, from the same noise.

        Args:
            picture: any; its centre is seen.
            dimensions: how many components for each of the pictures, such as 20, 80, 320; 0 is the mean embedding.
            seed: of the noise.
            drawing: how.
            batch_size: pictures drawn at the same time.
            progress: told how many are done.

        Raises:
            FileNotFoundError: the bundle has no components.
            ValueError: no dimensions, or more than there are components; or as `variations`.
        """
        components, n = self.the_components(), len(dimensions)
        check_n(n)
        noise = _noise(seed, [0] * n)
        work = self._work(drawing, GUIDANCE, n, batch_size, progress)
        embedding = self.seen(picture).embedding
        embeddings = torch.cat([components.rebuilt(embedding, count) for count in dimensions])
        if self.decoder.config.normalised:
            embeddings = F.normalize(embeddings, dim=-1)
        each = [{"dimensions": count} for count in dimensions]
        drawn = self._drawn(work, embeddings, self.uncaptioned(), noise, None)
        return self._series("", work, drawn, embeddings, noise, each)

    @undisturbed()
    def principal_components(self, pictures: Iterable[Image.Image]) -> Components:
        """Return the principal components of the embeddings of pictures, to be saved as components/ of the bundle.

        Args:
            pictures: like those that the models were trained on, more than an embedding has numbers.

        Raises:
            ValueError: fewer than 2.
        """
        embeddings = [self.seen(picture).embedding.cpu() for picture in pictures]
        if len(embeddings) < 2:
            raise ValueError(f"principal components of {len(embeddings)} pictures: give at least 2, better thousands")
        found = Components.of(PrincipalComponents.of(torch.cat(embeddings)))
        found.metadata = {"clip_hash": self.hashes["clip"], "pictures": len(embeddings)}
        return found

    def default_batch_size(
        self, n: int, drawing: Drawing | None = None, *, guidance: float = GUIDANCE, of_captions: bool = False
    ) -> int:
        """Return how many of n pictures are drawn at once: as many as fit the memory, in batches of equal size.

        Args:
            n: pictures.
            drawing: how.
            guidance: of the decoder, unless it is given.
            of_captions: whether the prior draws their embeddings.

        Raises:
            ValueError: n is out of range.
        """
        check_n(n)
        return self._work(drawing, guidance, n, None, None, of_captions=of_captions).size

    def _work(
        self,
        drawing: Drawing | None,
        guidance: float,
        n: int,
        batch_size: int | None,
        progress: OnProgress | None,
        **how: Any,
    ) -> Work:
        """Return a piece of work of n pictures; guidance is what it is unless it is given."""
        check_batch_size(batch_size)
        drawing = drawing or Drawing()
        guidance = drawing.guidance_or(guidance)
        counts = {"drawn": n, "enlarged": n, "batch_size": batch_size, "progress": progress, **how}
        return Work(models=self, drawing=drawing, guidance=guidance, **counts)

    def _series(
        self,
        caption: str,
        work: Work,
        drawn: tuple[Tensor, Tensor],
        embeddings: Tensor,
        noise: Noise,
        each: Sequence[Mapping[str, float]],
    ) -> Series:
        """Score what `_drawn` gave of embeddings, and enlarge it."""
        images, features = drawn
        scores = _cosines(features, embeddings)
        return Series(caption=caption, images=work.large(images, noise), scores=scores, each=tuple(each))

    def _drawn(
        self,
        work: Work,
        embeddings: Tensor,
        text: Text,
        noise: Noise,
        start: Tensor | None,
        eta: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Draw pictures of embeddings (N, E), each from its own start (N, C, H, W), or all from one; on the CPU.

        Returns:
            Pictures (N, 3, H, W), and CLIP's unit embeddings of them, float32 (N, E).
        """
        images, features = [], []
        for some in work.batches():
            rows = slice(some.start, some.stop)
            begin = start
            if begin is not None:
                begin = (begin.expand(len(some), -1, -1, -1) if len(begin) == 1 else begin[rows]).to(self.device)
            drawn = work.decoded(embeddings[rows], text, Noise(noise.rows[rows]), start=begin, eta=eta)
            features.append(embed_images(self.clip, drawn).cpu())
            images.append(drawn.cpu())
        return torch.cat(images), torch.cat(features)


def rows_between(n: int, candidates: int) -> list[tuple[int, int]]:
    """Return what `interpolate` draws, in order: (place, candidate), one candidate at each end.

    Raises:
        ValueError: there are fewer than 2 places, no candidates, or too much to draw.
    """
    check_places(n)
    check_whole("candidates", candidates)
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; it must be at least 1 for each place between the ends")
    if 2 + (n - 2) * candidates > MAX_BETWEEN:
        raise ValueError(f"{n} pictures of {candidates} candidates each are too many: draw {MAX_BETWEEN:,} at most")
    return [(place, number) for place in range(n) for number in range(candidates if 0 < place < n - 1 else 1)]


def check_places(n: int) -> None:
    """Raise ValueError for a number of pictures that do not lead from one to another."""
    check_n(n)
    if n < 2:
        raise ValueError(f"n is {n}; it must be at least 2, the first picture and the last")


def _cosines(features: Tensor, embeddings: Tensor) -> Tensor:
    """Return the cosines of features (N, E) on the CPU with embeddings (N, E) or (1, E), float32 (N,)."""
    return F.cosine_similarity(features, embeddings.cpu().float(), dim=-1)


def _check_inverting(drawing: Drawing | None) -> None:
    """Raise ValueError for a sampler that does not go from a picture's own noise to the picture."""
    if drawing is not None and drawing.sampler != "ddim":
        raise ValueError(
            f"sampler is {drawing.sampler}, but only ddim draws a picture again from the noise that it comes from"
        )


def _thetas(n: int, last: float) -> list[float]:
    """Return n numbers from 0 to the last, at equal distances."""
    check_places(n)
    return [last * i / (n - 1) for i in range(n)]


def _noise(seed: int, numbers: Sequence[int]) -> Noise:
    check_whole("seed", seed)
    return Noise.of(seed, "", numbers)
