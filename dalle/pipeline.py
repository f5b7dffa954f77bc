"""From a caption to ranked pictures: joins the tokenizer, transformer, dVAE and CLIP of a bundle.

Candidates stream: a batch is sampled, decoded and scored, and all but the best so far are dropped. Memory depends on
the batch and on what is kept, not on the number of candidates. Ranked by likelihood, only the best are decoded; ranked
by both, the tokens of all candidates are held, and the best are decoded once more.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP); their figure 2d completes a picture from its
top rows.

Letters: P captions  N candidates  K kept ones  T text positions  I image positions  J image positions of the top rows
         H, W pixels
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from dalle.best_of_n import (
    Best,
    BetterHalf,
    Candidates,
    Judge,
    Request,
    Result,
    Warnings,
    check_captions,
    check_n,
    check_top_is_open,
    n_given,
)
from dalle.budget import (
    BatchProgress,
    OnProgress,
    batches,
    candidates_at_once,
    check_batch_size,
    check_memory,
    decoded_at_once,
    memory_budget,
    sampling_share,
)
from dalle.data.bundle import Precision, check_sizes, load_bundle, sampling_defaults
from dalle.editing.edit import Edited, edit
from dalle.editing.likelihood import Likelihood, likelihood
from dalle.editing.regions import Mask, Region, check_top
from dalle.family.tokenizers import TextTokenizer, text_of
from dalle.family.transformers import Transformer
from dalle.sampling import Ranking, Samples, Sampling, SamplingDefaults, candidate_seed, sample, undisturbed
from dvae.codec import Codec
from dvae.fast.model import optimised
from dvae.images import resize_and_crop, to_tensor
from rerank import CLIP, score


class Pipeline:
    """A loaded bundle.

    Args:
        tokenizer: of the captions.
        dalle: the transformer, with the metadata of its training; sampling and decoding happen in its precision,
            float32 or bfloat16.
        dvae: turns image tokens into pictures and pictures into image tokens.
        clip: ranks the pictures.
        hashes: part -> hash, for the metadata of the pictures.
        memory: bytes that a batch may take, beside the models; by default 2 GiB on a CPU, and half of what is free
            on a GPU.
        compile: compile the steps of sampling and the decoding of pictures, on a CPU: worth it for many candidates of
            large models.

    Raises:
        ValueError: the parts do not fit one another, memory is not above 0, or the transformer's sampling defaults
            cannot be used.
    """

    @undisturbed()
    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        dalle: Transformer,
        dvae: Codec,
        clip: CLIP,
        hashes: Mapping[str, str],
        memory: int | None = None,
        compile: bool = False,
    ) -> None:
        check_sizes(tokenizer, dalle, dvae)
        check_memory(memory)
        self.tokenizer = tokenizer
        self.dalle = dalle.eval().requires_grad_(False)
        self.dvae = dvae.eval().requires_grad_(False)
        self.clip = clip.eval().requires_grad_(False)
        self.hashes = dict(hashes)
        # a faster copy, for decoding alone: pictures to complete are encoded in float32
        is_plain = dalle.dtype == torch.float32 and not compile
        self._decoding_dvae = self.dvae if is_plain else optimised(self.dvae, dtype=dalle.dtype, compile=compile)
        self.memory = memory
        self.compile = compile
        self.defaults = sampling_defaults(dalle)
        """How the bundle is sampled and ranked unless told otherwise."""
        self._warnings = Warnings(bool(dalle.metadata.get("null_caption_probability")))

    @classmethod
    @undisturbed()
    def load(
        cls,
        bundle: str | Path,
        device: str | torch.device = "cpu",
        *,
        precision: Precision = "fp32",
        memory: int | None = None,
        compile: bool = False,
    ) -> Self:
        """Load a bundle and check that its parts belong together.

        Args:
            bundle: the directory.
            device: where to compute: cpu, cuda, cuda:1 …, or auto for a GPU if there is one.
            precision: of sampling and decoding; in bf16 they are faster, and a candidate depends on its batch.
            memory: see `Pipeline`.
            compile: see `Pipeline`.

        Raises:
            FileNotFoundError: the bundle, or a part of it, is missing.
            ValueError: a part is damaged, the transformer was trained with another tokenizer or dVAE, or an argument
                is out of range, or there is no such device.
        """
        parts = load_bundle(Path(bundle), device, precision)
        return cls(**parts._asdict(), memory=memory, compile=compile)

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
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn image tokens into pictures, all at once.

        Args:
            tokens: int64 (N, I), or the first of them (N, J), in whole rows.

        Returns:
            float32 (N, 3, H, W) in [0, 1], or the tops of the pictures.
        """
        grid = self.dalle.config.grid
        return self._decoding_dvae.decode(tokens.to(self.dalle.device).reshape(len(tokens), -1, grid))

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
    def rank(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Return the cosines of P captions and pictures float (N, 3, H, W) in [0, 1]: float32 (P, N) on the CPU."""
        return score(self.clip, captions, images).cpu()

    @undisturbed()
    def likelihood(self, caption: str, images: Sequence[Image.Image]) -> Likelihood:
        """Return how likely pictures are after a caption, and after the empty one; they are resized and cropped.

        Raises:
            ValueError: an empty caption, or no pictures.
        """
        return likelihood(self, caption, images)

    def default_batch_size(
        self, n: int, *, n_captions: int = 1, guided: bool = False, early_abandon: bool = False
    ) -> int:
        """Return how many candidates to sample at once: see `candidates_at_once`.

        Early abandon decodes pictures while the batch is under way, which takes half of the memory.
        """
        budget = memory_budget(self.dalle.device, self.memory) // (2 if early_abandon else 1)
        return candidates_at_once(self.dalle, budget, n, n_captions=n_captions, guided=guided)

    def judge(self, caption: str, finish: Callable[[Tensor], Tensor] = lambda images: images) -> Judge:
        """Return what decodes and scores candidates of a caption; `finish` makes the pictures of the decoded ones."""

        def at_once(n: int) -> int:
            return decoded_at_once(self.dvae, memory_budget(self.dalle.device, self.memory), n)

        return Judge(caption, self.clip, lambda tokens: finish(self.decode(tokens)), at_once)

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
