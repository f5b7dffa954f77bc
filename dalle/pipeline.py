"""From a caption to ranked pictures, and all else that is done with a loaded bundle.

Candidates stream: a batch is sampled, decoded and scored, and all but the best so far are dropped. Memory depends on
the batch and on what is kept, not on the number of candidates. Ranked by likelihood, only the best are decoded; ranked
by both, the tokens of all candidates are held, and the best are decoded once more.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP); their figure 2d completes a picture from its
top rows.

Letters: P captions  N candidates  K kept ones  T text positions  I image positions  J image positions of the top rows
         H, W pixels
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import (
    Best,
    BetterHalf,
    Candidates,
    Request,
    Result,
    check_captions,
    check_n,
    check_top_is_open,
    n_given,
)
from dalle.budget import BatchProgress, OnProgress, batches, check_batch_size, sampling_share
from dalle.data.bundle import LoadedBundle
from dalle.editing.captions import Completion, RankedCaptions, complete_caption, rank_captions
from dalle.editing.edit import Edited, edit
from dalle.editing.likelihood import Likelihood, likelihood
from dalle.editing.regions import Mask, Region, check_top
from dalle.editing.variations import Varied, usable_settings, variations
from dalle.family.tokenizers import text_of
from dalle.sampling import Ranking, Samples, Sampling, SamplingDefaults, candidate_seed, sample, undisturbed
from dvae.images import resize_and_crop, to_tensor


class Pipeline(LoadedBundle):
    """A loaded bundle, and all that is done with one: see `LoadedBundle`."""

    def generate(
        self,
        caption: str,
        *,
        n: int = 64,
        keep: int = 8,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        rank: Ranking | None = None,
        prefix: Tensor | None = None,
        early_abandon: bool = False,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Result:
        """Sample, decode and rank n candidates, batch by batch, and keep the best.

        Settings of sampling and ranking that are not given are the bundle's: see `defaults`.

        Args:
            caption: any text but an empty one; the end of a longer one than the model reads is cut (logged).
            n: candidates to sample.
            keep: how many of them to return.
            seed: see `Sampling`, also for temperature, top_k, top_p and guidance; None is refused: no picture is made
                that cannot be made again.
            temperature: divides the logits.
            top_k: sample from the k likeliest tokens only; as many as there are for all.
            top_p: sample from the likeliest tokens that together have this probability only; 1 for all.
            guidance: how far to go from "no caption" towards the caption; 1 is plain sampling.
            rank: best first by "clip", "likelihood" or "both": see `rank_order`. By likelihood, only the pictures that
                are kept are decoded.
            prefix: int64 (1, m) image tokens that every candidate begins with: see the method `prefix`.
            early_abandon: see `Request`.
            batch_size: candidates sampled at the same time; by default as many as fit the memory.
            progress: told how many candidates are done.

        Returns:
            The best `keep`, best first; of equal ones the earlier candidate.

        Raises:
            ValueError: an empty caption, an argument of a wrong type or outside its range, or an early abandon of
                pictures whose top half is given.
        """
        settings = self.defaults.updated(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, rank=rank
        )
        return self.best(
            Request(caption=caption, n=n, keep=keep, early_abandon=early_abandon),
            settings.sampling(seed),
            rank=settings.rank,
            prefix=prefix,
            batch_size=batch_size,
            progress=progress,
        )

    @undisturbed()
    def best(
        self,
        request: Request,
        sampling: Sampling | None = None,
        *,
        rank: Ranking | None = None,
        prefix: Tensor | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Result:
        """Do what `generate` does, from objects that are checked already; by default the bundle's settings, seed 0."""
        check_batch_size(batch_size)
        sampling = sampling or self.defaults.sampling()
        rank = self.defaults.updated(rank=rank).rank
        caption, n = request.caption, request.n
        if request.early_abandon:
            check_top_is_open(prefix, self.dalle.config.grid)
        self._warnings.about_guidance(sampling)
        size = batch_size or self.default_batch_size(n, guided=sampling.is_guided, early_abandon=request.early_abandon)
        text_1T = text_of(self.tokenizer, [caption], self.dalle)
        judge = self.judge(caption)
        share = 1.0 if rank == "likelihood" else sampling_share(self.dalle, self.dvae, self.clip)
        best = Best(request.keep, rank)
        for _, ks in batches(1, n, size):
            done = BatchProgress(progress, before=ks.start, n=len(ks), total=n, sampling_share=share)
            halfway = BetterHalf(judge.score_tops) if request.early_abandon else None
            seeds = [candidate_seed(sampling.seed, caption, k) for k in ks]
            samples = self._sample(text_1T, seeds, sampling, prefix, done, halfway)
            numbers_N = torch.tensor(ks if halfway is None else [ks[i] for i in halfway.kept])
            judge.judge(best, Candidates(numbers_N, samples.tokens[0], samples.log_likelihoods[0]), done.judged)
        result = judge.result(best)
        self._warnings.about_equal_ones(result, sampling)
        return result

    @undisturbed()
    def edit(
        self,
        image: Image.Image,
        mask: Mask,
        caption: str,
        *,
        n: int = 64,
        keep: int = 8,
        seed: int = 0,
        settings: SamplingDefaults | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Edited:
        """Draw any part of a picture anew, so that it fits the caption and all that is kept.

        Args:
            image: any picture; it is resized and cropped to the size of the dVAE.
            mask: of the same proportions: what is True, white or fully transparent is drawn anew.
            caption: what the whole picture should show.
            n: particles, see `dalle.sampler.particles`.
            keep: how many to return, at most.
            seed: same seed, same pictures.
            settings: by default the bundle's.
            batch_size: particles of a population; there are as many populations as batches.
            progress: told how many particles are done.

        Raises:
            ValueError: as `generate`; or the mask is none, or of other proportions than the picture.
        """
        check_batch_size(batch_size)
        settings, request = settings or self.defaults, Request(caption=caption, n=n, keep=keep)
        self._warnings.about_guidance(settings.sampling(seed))
        region = Region.of(image, mask, self.dvae.config.image_size)
        return edit(self, region, request, settings, seed=seed, batch_size=batch_size, progress=progress)

    @undisturbed()
    def variations(
        self,
        image: Image.Image,
        caption: str = "",
        *,
        n: int = 64,
        keep: int = 8,
        strength: float = 0.5,
        seed: int = 0,
        settings: SamplingDefaults | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Varied:
        """Draw a share of a picture's tokens anew, from fine to coarse: see `dalle.editing.variations`.

        Args:
            image: see `edit`, also for the others.
            caption: what the picture shows; "" for none, and then they are ranked by likelihood.
            n: particles.
            keep: how many to return, at most.
            strength: share of the tokens: 0 is the reconstruction, 1 a new sample of the caption.
            seed: same seed, same pictures; of the same seed, a larger strength draws the same tokens anew and more.
            settings: by default the bundle's.
            batch_size: particles of a population.
            progress: told how many particles are done.

        Raises:
            ValueError: as `edit`; or the strength is not from 0 to 1.
        """
        check_batch_size(batch_size)
        settings = usable_settings(settings or self.defaults, caption)
        self._warnings.about_guidance(settings.sampling(seed))
        self._warnings.about_caption(caption)
        return variations(
            self,
            image,
            caption,
            settings,
            n=n,
            keep=keep,
            strength=strength,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    @undisturbed()
    def sample_tokens(
        self,
        captions: Sequence[str],
        n: int,
        sampling: Sampling | None = None,
        *,
        rows: Sequence[int] | None = None,
        prefix: Tensor | None = None,
        batch_size: int | None = None,
        progress: OnProgress | None = None,
    ) -> Samples:
        """Sample n candidates for each of P captions; captions share batches. Other arguments as for `best`.

        Args:
            captions: P of them.
            n: candidates of each.
            sampling: by default the bundle's settings, seed 0.
            rows: numbers of the captions in a list, so that equal captions have different candidates: see
                `candidate_seed`.
            prefix: see `best`, also for the others.
            batch_size: candidates sampled at the same time.
            progress: told how many are done.

        Returns:
            Their tokens and log-likelihoods, on the CPU.

        Raises:
            ValueError: no captions, an empty one, a number outside its range, or not as many rows as captions.
        """
        check_batch_size(batch_size)
        check_captions(captions)
        check_n(n)
        numbered: Sequence[int | None] = [None] * len(captions) if rows is None else rows
        if len(numbered) != len(captions):
            raise ValueError(f"{len(numbered)} rows for {len(captions)} captions: give one for each")
        sampling = sampling or self.defaults.sampling()
        self._warnings.about_guidance(sampling)
        total = len(captions) * n
        size = batch_size or self.default_batch_size(n, n_captions=len(captions), guided=sampling.is_guided)
        text_PT = text_of(self.tokenizer, captions, self.dalle)
        tokens_PNI = torch.empty(len(captions), n, self.dalle.config.stream.n_image, dtype=torch.int64)
        log_likelihoods_PN = torch.empty(len(captions), n, dtype=torch.float32)
        before = 0
        for rows, ks in batches(len(captions), n, size):
            done = BatchProgress(progress, before=before, n=len(rows) * len(ks), total=total)
            here = slice(rows.start, rows.stop)
            named = zip(captions[here], numbered[here], strict=True)
            seeds = [candidate_seed(sampling.seed, caption, k, row) for caption, row in named for k in ks]
            samples = self._sample(text_PT[here], seeds, sampling, prefix, done)
            tokens_PNI[here, ks.start : ks.stop] = samples.tokens
            log_likelihoods_PN[here, ks.start : ks.stop] = samples.log_likelihoods
            before += len(seeds)
        return Samples(tokens=tokens_PNI, log_likelihoods=log_likelihoods_PN)

    @undisturbed()
    def choose(
        self, caption: str, tokens: Tensor, log_likelihoods: Tensor, *, keep: int, rank: Ranking | None = None
    ) -> Result:
        """Decode candidates and keep the best, without holding all pictures in memory.

        Args:
            caption: what the pictures should show.
            tokens: int64 (N, I), the candidates.
            log_likelihoods: float32 (N,), theirs: see `sample_tokens`.
            keep: K, at most N.
            rank: see `generate`; by default the bundle's.

        Returns:
            The best K, best first; of equal ones the earlier candidate.

        Raises:
            ValueError: keep is outside 1 … N, the caption is empty, or the ranking is unknown.
        """
        request = Request(caption=caption, n=len(tokens), keep=keep)
        best = Best(request.keep, self.defaults.updated(rank=rank).rank)
        judge = self.judge(caption)
        judge.judge(best, Candidates(torch.arange(request.n), tokens, log_likelihoods))
        return judge.result(best)

    @undisturbed()
    def prefix(self, image: Image.Image, keep_rows: int) -> Tensor:
        """Return the image tokens of the top of a picture, for `generate` to complete.

        Args:
            image: any picture; it is resized and cropped to the size of the dVAE.
            keep_rows: rows of the token grid to keep, from 0 to all but one.

        Returns:
            int64 (1, keep_rows · grid), on the device of the model.

        Raises:
            ValueError: keep_rows is outside that range, or there is no picture.
        """
        check_top(image, keep_rows, self.dalle.config.grid)
        pixels = to_tensor(resize_and_crop(image, self.dvae.config.image_size))
        tokens_1YX = self.dvae.encode(pixels[None].to(self.dalle.device))
        return tokens_1YX[:, :keep_rows].flatten(1)

    @undisturbed()
    def likelihood(self, caption: str, images: Sequence[Image.Image]) -> Likelihood:
        """Return how likely pictures are after a caption, and after the empty one; they are resized and cropped.

        Raises:
            ValueError: an empty caption, or no pictures.
        """
        return likelihood(self, caption, images)

    @undisturbed()
    def rank_captions(
        self,
        image: Image.Image,
        captions: Sequence[str],
        *,
        rank: Ranking | None = None,
        progress: OnProgress | None = None,
    ) -> RankedCaptions:
        """Rank captions by how well they fit a picture, best first; of equal ones the earlier.

        Args:
            image: any picture; the transformer sees it resized and cropped to the size of the dVAE, CLIP to its own.
            captions: at least two.
            rank: by "likelihood", log p(picture | caption), by "clip", or by "both": see `rank_order`; by default the
                bundle's.
            progress: told how many captions are done.

        Raises:
            ValueError: no picture, fewer captions, an empty one, or an unknown ranking.
        """
        return rank_captions(self, image, captions, self.defaults.updated(rank=rank).rank, progress)

    @undisturbed()
    def complete_caption(
        self,
        beginning: str,
        *,
        n: int = 8,
        n_tokens: int = 16,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> list[Completion]:
        """Sample n completions of a caption from the text part of the transformer.

        Args:
            beginning: whole words are completed best; "" is a caption from nothing.
            n: completions.
            n_tokens: to draw at most. The paper's transformer does not tell where a caption ends, so there it is how
                many are drawn.
            seed: same seed, same completions; completion k depends on (seed, beginning, k) alone.
            temperature: divides the logits; 0 takes the likeliest.
            top_k: draw from the k likeliest only.

        Raises:
            ValueError: an argument out of range, a beginning that leaves no room, or a transformer that predicts no
                text, as DALL·E mini.
        """
        sampling = Sampling(seed=seed, temperature=temperature, top_k=top_k)
        return complete_caption(self, beginning, sampling, n=n, n_tokens=n_tokens)

    def _sample(
        self,
        text_PT: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        prefix: Tensor | None,
        done: BatchProgress,
        halfway: Callable[[Tensor], Tensor] | None = None,
    ) -> Samples:
        """Sample one batch; `halfway` takes the tokens (N, J) of the top half, returns the rows to continue with."""
        grid, given = self.dalle.config.grid, n_given(prefix)

        def on_step(tokens_NJ: Tensor) -> Tensor | None:
            n_known = tokens_NJ.shape[1]
            done.sampled(n_known - given, grid**2 - given)
            return halfway(tokens_NJ) if halfway is not None and n_known == grid // 2 * grid else None

        return sample(self.dalle, text_PT, seeds, sampling, prefix=prefix, on_step=on_step, compile=self.compile)
