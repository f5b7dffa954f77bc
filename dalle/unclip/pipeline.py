"""From captions and pictures to pictures, by DALL·E 2.

Candidates of a caption are ranked by CLIP before they are enlarged, and only those that are kept are enlarged. All
noise is a function of the seed, the caption and the candidate's number, whatever the batch.

Source: Ramesh et al. 2022 (arXiv 2204.06125): 2 for drawing captions; 3 for variations, interpolation and text
differences, which start from a picture's embedding and from the noise that it is drawn from; 4 for principal
components. Nichol et al. 2021 (GLIDE, arXiv 2112.10741), 4.3, for editing: how DALL·E 2 edits is not published.

Letters: N pictures  K kept ones  E embedding  H, W pixels
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import Best, Candidates, Ranked, Request, check_caption, check_n
from dalle.budget import OnProgress, check_batch_size
from dalle.editing.regions import Mask, Region
from dalle.sampling import undisturbed
from dalle.unclip.loaded import LoadedUnCLIP
from dalle.unclip.results import Edited, Series
from dalle.unclip.settings import Drawing, check_share
from dalle.unclip.work import Work
from rerank.score import embed_captions, embed_images
from storage.errors import check_whole
from unclip.conditions import Text
from unclip.decoder import Known
from unclip.decoding import GUIDANCE
from unclip.latents import slerp, slerp_noise, text_difference
from unclip.sampling import Noise, Sampler, signed


class UnCLIP(LoadedUnCLIP):
    """DALL·E 2's models, loaded, and all that is done with them: see `LoadedUnCLIP`."""

    def generate(
        self,
        caption: str,
        *,
        n: int = 64,
        keep: int = 8,
        seed: int = 0,
        guidance: float | None = None,
        prior_guidance: float | None = None,
        prior_steps: int | None = None,
        prior_candidates: int | None = None,
        steps: int | None = None,
        sampler: Sampler | None = None,
        upsampler_steps: int | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Ranked:
        """Draw and rank n candidates, batch by batch, keep the best and enlarge them.

        Settings that are not given are those of `Drawing`, which also says what they mean.

        Args:
            caption: any text but an empty one; the end of a longer one than CLIP reads is cut (logged).
            n: candidates to draw.
            keep: how many of them to return.
            seed: candidate k is a function of (seed, caption, k).
            guidance: of the decoder.
            prior_guidance: of the prior.
            prior_steps: of the prior.
            prior_candidates: embeddings for each candidate.
            steps: of the decoder.
            sampler: of the decoder.
            upsampler_steps: of each upsampler.
            batch_size: candidates drawn at the same time; by default as many as fit the memory.
            progress: told how many candidates are done.

        Returns:
            The best `keep` by CLIP, best first; of equal ones the earlier candidate. Scores are those of the pictures
            before they were enlarged.

        Raises:
            FileNotFoundError: the bundle has no prior.
            ValueError: an empty caption, or an argument of a wrong type or out of range.
        """
        drawing = Drawing().updated(
            guidance=guidance,
            prior_guidance=prior_guidance,
            prior_steps=prior_steps,
            prior_candidates=prior_candidates,
            steps=steps,
            sampler=sampler,
            upsampler_steps=upsampler_steps,
        )
        request = Request(caption=caption, n=n, keep=keep)
        return self.best(request, drawing, seed=seed, batch_size=batch_size, progress=progress)

    @undisturbed()
    def best(
        self,
        request: Request,
        drawing: Drawing | None = None,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Ranked:
        """Do what `generate` does, from objects that are checked already.

        Raises:
            ValueError: an early abandon, which there is of image tokens only.
        """
        if request.early_abandon:
            raise ValueError("early abandon is for pictures that are drawn row by row: DALL·E 2 draws them whole")
        return self._best(request, drawing, seed, batch_size, progress)

    @undisturbed()
    def edit(
        self,
        picture: Image.Image,
        mask: Mask,
        caption: str,
        *,
        n: int = 64,
        keep: int = 8,
        seed: int = 0,
        drawing: Drawing | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Edited:
        """Draw a part of a picture anew, so that it fits the caption and what is kept.

        Args:
            picture: any; it is resized and cropped.
            mask: of the same proportions: what is True, white or fully transparent is drawn anew.
            caption: what the whole picture should show.
            n: candidates to draw.
            keep: how many of them to return.
            seed: see `generate`, also for the others.
            drawing: how.
            batch_size: candidates drawn at the same time.
            progress: told how many candidates are done.

        Returns:
            The best by CLIP. Pixels that are kept are the picture's own, exactly.

        Raises:
            ValueError: the decoder cannot be told of known pixels, nothing is to be drawn anew, or as `generate`.
        """
        if not self.decoder.config.inpaints:
            raise ValueError(
                "this decoder cannot edit: it has no channels for the pixels that are kept; make one that has with "
                "`Decoder.inpainting()`, and train it"
            )
        request = Request(caption=caption, n=n, keep=keep)
        region = Region.of(picture, mask, self.image_size)
        small = Region.of(picture, mask, self.decoder.config.image_size)
        if not bool(region.is_new.any()):
            raise ValueError("the mask keeps the whole picture: make white, or transparent, what is to be drawn anew")
        pixels = signed(small.pixels).to(self.device)
        known = Known(pixels[None], (~small.is_new)[None, None].float().to(self.device))
        best = self._best(request, drawing, seed, batch_size, progress, known, small.paste)
        images = region.paste(best.images)
        return Edited(**{**vars(best), "images": images}, region=region, seams=region.seams(images))

    @undisturbed()
    def variations(
        self,
        picture: Image.Image,
        *,
        n: int = 8,
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
            eta: how much noise is new, from 0, with which all are the picture drawn again, to 1.
            seed: variation k is a function of (seed, picture, k).
            drawing: how; with a guidance of 1 unless it is given.
            batch_size: pictures drawn at the same time.
            progress: told how many are done.

        Raises:
            ValueError: no picture, or an argument of a wrong type or out of range.
        """
        check_n(n)
        check_share("eta", eta)
        _check_inverting(drawing)
        noise = _noise(seed, range(n))
        work = self._work(drawing, 1, n, batch_size, progress, inversions=1)
        text, seen = self.uncaptioned(), self.seen(picture)
        start, embeddings = work.inverted(seen, text), seen.embedding.expand(n, -1)
        return self._series("", work, embeddings, text, noise, start, [{"candidate": k} for k in range(n)], eta)

    @undisturbed()
    def interpolate(
        self,
        a: Image.Image,
        b: Image.Image,
        *,
        n: int = 9,
        keep_ends: bool = False,
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
            seed: of that noise, and of what is enlarged.
            drawing: how; to keep the ends, with a guidance of 1 unless it is given.
            batch_size: pictures drawn at the same time.
            progress: told how many are done.

        Raises:
            ValueError: fewer than 2 pictures, two embeddings that are opposite, or as `variations`.
        """
        thetas, noise = _thetas(n, 1.0), _noise(seed, [0] * n)
        if keep_ends:
            _check_inverting(drawing)
        work = self._work(drawing, 1 if keep_ends else GUIDANCE, n, batch_size, progress, inversions=2 * keep_ends)
        text, ends = self.uncaptioned(), [self.seen(picture) for picture in (a, b)]
        embeddings = torch.cat([slerp(ends[0].embedding, ends[1].embedding, theta) for theta in thetas])
        start = None
        if keep_ends:
            first, last = (work.inverted(seen, text) for seen in ends)
            start = torch.cat([slerp_noise(first, last, theta) for theta in thetas])
        return self._series("", work, embeddings, text, noise, start, [{"theta": theta} for theta in thetas])

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
        return self._series(after, work, embeddings, text, noise, start, [{"theta": theta} for theta in thetas])

    def _best(
        self,
        request: Request,
        drawing: Drawing | None,
        seed: int,
        batch_size: int | None,
        progress: OnProgress | None,
        known: Known | None = None,
        finish: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> Ranked:
        """Draw the best of a request; with known pixels, which `finish` pastes into the pictures that are ranked."""
        check_whole("seed", seed)
        caption, n = request.caption, request.n
        work = self._work(drawing, GUIDANCE, n, batch_size, progress, of_captions=True, enlarged=request.keep)
        text = self.captioned(caption)
        asked = embed_captions(self.clip, [caption])[0]
        best = Best(request.keep, "clip")
        for ks in work.batches():
            noise = Noise.of(seed, caption, ks)
            told = None if known is None else Known(*(each.expand(len(ks), -1, -1, -1) for each in known))
            images = finish(work.decoded(work.embeddings(text, noise), text, noise, known=told))
            scores = embed_images(self.clip, images) @ asked
            best.add(Candidates(torch.tensor(ks), scores=scores, images=images))
        kept = best.kept()
        assert kept.images is not None
        assert kept.scores is not None
        numbers = tuple(kept.numbers.tolist())
        images = work.large(kept.images, Noise.of(seed, caption, numbers))
        return Ranked(caption=caption, images=images, scores=kept.scores, candidates=numbers, rank="clip")

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
        embeddings: Tensor,
        text: Text,
        noise: Noise,
        start: Tensor | None,
        each: Sequence[Mapping[str, float]],
        eta: float = 0.0,
    ) -> Series:
        """Draw pictures of embeddings (N, E), each from its own start (N, 3, H, W), or all from one."""
        images, scores = [], []
        for some in work.batches():
            rows = slice(some.start, some.stop)
            begin = None if start is None else (start.expand(len(some), -1, -1, -1) if len(start) == 1 else start[rows])
            drawn = work.decoded(embeddings[rows], text, Noise(noise.rows[rows]), start=begin, eta=eta)
            scores.append(self.cosines(drawn, embeddings[rows]).cpu())
            images.append(drawn.cpu())
        large = work.large(torch.cat(images), noise)
        return Series(caption=caption, images=large, scores=torch.cat(scores), each=tuple(each))


def _check_inverting(drawing: Drawing | None) -> None:
    """Raise ValueError for a sampler that does not go from a picture's own noise to the picture."""
    if drawing is not None and drawing.sampler != "ddim":
        raise ValueError(
            f"sampler is {drawing.sampler}, but only ddim draws a picture again from the noise that it comes from"
        )


def _thetas(n: int, last: float) -> list[float]:
    """Return n numbers from 0 to the last, at equal distances."""
    check_n(n)
    if n < 2:
        raise ValueError(f"n is {n}; it must be at least 2, the first picture and the last")
    return [last * i / (n - 1) for i in range(n)]


def _noise(seed: int, numbers: Sequence[int]) -> Noise:
    check_whole("seed", seed)
    return Noise.of(seed, "", numbers)
