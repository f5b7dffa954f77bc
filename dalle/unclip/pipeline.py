"""From captions to pictures, and parts of pictures, by DALL·E 2.

Candidates of a caption are ranked by CLIP before they are enlarged, and only those that are kept are enlarged. All
noise is a function of the seed, the caption and the candidate's number, whatever the batch.

Source: Ramesh et al. 2022 (arXiv 2204.06125), 2. Nichol et al. 2021 (GLIDE, arXiv 2112.10741), 4.3, for editing: how
DALL·E 2 edits is not published.
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import Best, Candidates, Ranked, Request
from dalle.budget import OnProgress
from dalle.editing.regions import Mask, Region
from dalle.sampling import undisturbed
from dalle.unclip.manipulations import Manipulations
from dalle.unclip.results import Edited
from dalle.unclip.settings import Drawing
from rerank.score import embed_captions, embed_images
from storage.errors import check_whole
from unclip.decoder import Known
from unclip.decoding import GUIDANCE
from unclip.sampling import Noise, Sampler


class UnCLIP(Manipulations):
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
                "this decoder cannot edit: it has no channels for what is kept of a picture; train one that has, "
                "as the recipe unclip-cpu does"
            )
        request = Request(caption=caption, n=n, keep=keep)
        region = Region.of(picture, mask, self.image_size)
        small = Region.of(picture, mask, self.decoder.config.picture_size)
        if not bool(region.is_new.any()):
            raise ValueError("the mask keeps the whole picture: make white, or transparent, what is to be drawn anew")
        known = self.decoder.known(small.pixels[None].to(self.device), ~small.is_new[None].to(self.device))
        best = self._best(request, drawing, seed, batch_size, progress, known, small.paste)
        images = region.paste(best.images)
        return Edited(**{**vars(best), "images": images}, region=region, seams=region.seams(images))

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
