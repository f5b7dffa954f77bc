"""From a caption to ranked pictures: the tokenizer, transformer, dVAE and CLIP of a bundle are joined here.

A bundle is a directory with tokenizer.json, dvae/, dalle/ and clip/. Its transformer remembers the tokenizer
and the dVAE it was trained with; others, whose ids mean something else, are refused.

Candidates stream: a batch is sampled, decoded and scored, and what is not among the best so far is dropped. So
memory depends on the batch and on what is kept, not on how many candidates there are. Ranked by likelihood, only the
best are decoded at all; by CLIP and likelihood together, the tokens of all are held, and the best decoded once more.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP); completing a picture from its top
rows is their figure 2d.

Letters: P captions  N candidates  K kept ones  T text positions  I image positions  J image positions of the
top rows  E features of CLIP  H, W pixels
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor, nn

from dalle.cache import bytes_per_candidate
from dalle.candidates import (
    BatchProgress,
    Best,
    BetterHalf,
    Candidates,
    Progress,
    Ranking,
    Result,
    Samples,
    Sampling,
    SamplingDefaults,
    batches,
    check_request,
    check_top_k,
    equal_batches,
)
from dalle.model import DALLE
from dalle.sampling import candidate_seed, sample
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from dvae.fast.model import optimised, pictures_at_once
from dvae.images import resize_and_crop, to_tensor
from rerank import CLIP, score
from rerank.score import embed_captions, embed_images
from storage.model_directory import directory_hash

logger = logging.getLogger(__name__)

HOW_TO_MAKE = {
    "tokenizer.json": "`dalle-train tokenizer`",
    "dvae": "`dalle-train dvae`, or `dalle import-dvae` for published weights",
    "dalle": "`dalle-train transformer`",
    "clip": "`dalle-train clip`",
}
"""The parts of a bundle, and what makes each."""

CPU_MEMORY_BUDGET = 2 << 30
"""Bytes that a batch may take on a CPU, unless told; on a GPU it is half of what is free."""
DRAWING_BYTES = 64
"""Most memory of a candidate per image token of the vocabulary while its next one is drawn: logits as they come,
guided, cooled and sorted (float32), their order (int64), probabilities and their sums (float64, and once sorted)."""
JUDGED_AT_ONCE = 32
"""Most pictures that are decoded and scored at the same time: with more, a CPU is slower, because they outgrow its
caches, a GPU hardly faster, and progress waits for them."""
Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of sampling and decoding. In fp32 a candidate is the same at any batch size; CLIP is always fp32."""


class Pipeline:
    """A bundle, loaded.

    Args:
        tokenizer: of the captions.
        dalle: the transformer, with the metadata of its training; sampling and decoding happen in its precision,
            float32 or bfloat16.
        dvae: turns image tokens into pictures and pictures into image tokens.
        clip: ranks the pictures.
        hashes: part -> hash, for the metadata of what is made.
        memory: bytes that a batch may take, beside the models; by default 2 GiB on a CPU, and half of what is free
            on a GPU.
        compile: whether to compile the steps of sampling and the decoding of pictures, on a CPU: worth it for many
            candidates of large models.

    Raises:
        ValueError: the parts do not fit one another, memory is not above 0, or the transformer's metadata has sampling
            defaults that cannot be used.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        dalle: DALLE,
        dvae: DVAE,
        clip: CLIP,
        hashes: Mapping[str, str],
        memory: int | None = None,
        compile: bool = False,
    ) -> None:
        _check_sizes(tokenizer, dalle, dvae)
        if memory is not None and memory < 1:
            raise ValueError(f"memory is {memory} bytes; it must be above 0")
        self.tokenizer = tokenizer
        self.dalle = dalle.eval().requires_grad_(False)
        self.dvae = dvae.eval().requires_grad_(False)
        self.clip = clip.eval().requires_grad_(False)
        self.hashes = dict(hashes)
        # a faster copy, for decoding alone: pictures to complete are encoded in float32
        is_plain = dalle.dtype == torch.float32 and not compile
        self._decoding_dvae = self.dvae if is_plain else optimised(self.dvae, dtype=dalle.dtype, compile=compile)
        self._memory = memory
        self._compile = compile
        self.defaults = _sampling_defaults(dalle)
        """How the bundle is sampled and ranked unless told otherwise."""
        self._knows_null_caption = bool(dalle.metadata.get("null_caption_probability"))
        self._has_warned = False

    @classmethod
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
            device: where to compute.
            precision: of sampling and decoding; in bf16 they are faster, and a candidate depends on its batch.
            memory: see `Pipeline`.
            compile: see `Pipeline`.

        Raises:
            FileNotFoundError: the bundle, or a part of it, is missing.
            ValueError: a part is damaged, the transformer was trained with another tokenizer or dVAE, or an argument
                is out of range.
        """
        if precision not in DTYPES:
            raise ValueError(f"unknown precision {precision!r}: give {' or '.join(DTYPES)}")
        parts = {part: bundle_part(Path(bundle), part) for part in HOW_TO_MAKE}
        tokenizer = Tokenizer.load(parts["tokenizer.json"])
        hashes = {part: directory_hash(parts[part]) for part in ("dvae", "dalle", "clip")}
        dalle = DALLE.load(parts["dalle"])
        for part, held in (("tokenizer", tokenizer.hash), ("dvae", hashes["dvae"])):
            trained_with = dalle.metadata.get(f"{part}_hash")
            if trained_with != held:
                raise ValueError(
                    f"the transformer was trained with the {part} {trained_with or 'of an unknown hash'}, "
                    f"{bundle} holds {held}: its tokens would mean something else; put the {part} it "
                    "was trained with into the bundle, or train it again with `dalle-train transformer`"
                )
        return cls(
            tokenizer=tokenizer,
            dalle=dalle.to(device, DTYPES[precision]),
            dvae=DVAE.load(parts["dvae"]).to(device),
            clip=CLIP.load(parts["clip"]).to(device),
            hashes={"tokenizer": tokenizer.hash, **hashes},
            memory=memory,
            compile=compile,
        )

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
        progress: Progress | None = None,
    ) -> Result:
        """Sample, decode and rank n candidates, batch by batch, and keep the best.

        Of the settings of sampling and ranking, those not given are the bundle's: see `defaults`.

        Args:
            caption: any text but an empty one; a longer one than the model reads is cut (logged).
            n: how many candidates are sampled.
            keep: how many of them are returned.
            seed: see `Sampling`, also for temperature, top_k, top_p and guidance.
            temperature: logits are divided by it.
            top_k: sample from the k likeliest tokens only; as many as there are for all.
            top_p: sample from the likeliest tokens that together have this probability only; 1 for all.
            guidance: how far to go from "no caption" towards the caption; 1 is plain sampling.
            rank: what is best: "clip", "likelihood" or "both", see `rank_order`. By likelihood, only the pictures that
                are kept are decoded.
            prefix: int64 (1, m) image tokens that every candidate begins with: see the method `prefix`.
            early_abandon: drop half of every batch when half of the rows are sampled: those whose top halves fit the
                caption worse by CLIP, whatever the ranking. Not in the paper, and it changes the distribution: what is
                returned is no longer the best of n whole pictures, and depends on the batch size. At most half of them
                can be kept.
            batch_size: candidates sampled at the same time; by default as many as fit the memory.
            progress: is told how many candidates are done.

        Returns:
            The best `keep`, best first; of equal ones the earlier candidate.

        Raises:
            ValueError: an empty caption, a number outside its range, or an early abandon of pictures whose top half is
                given.
        """
        settings = self.defaults.updated(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, rank=rank
        )
        return self.best(
            caption,
            settings.sampling(seed),
            n=n,
            keep=keep,
            rank=settings.rank,
            prefix=prefix,
            early_abandon=early_abandon,
            batch_size=batch_size,
            progress=progress,
        )

    @torch.no_grad()
    def best(
        self,
        caption: str,
        sampling: Sampling | None = None,
        *,
        n: int = 64,
        keep: int = 8,
        rank: Ranking | None = None,
        prefix: Tensor | None = None,
        early_abandon: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Do what `generate` does, with the settings of sampling as one object; without one, the bundle's, seed 0."""
        if sampling is None:
            sampling = self.defaults.sampling()
        rank = self.defaults.updated(rank=rank).rank
        check_request([caption], n=n, keep=keep, early_abandon=early_abandon)
        _check_batch_size(batch_size)
        if early_abandon:
            self._check_top_is_open(prefix)
        self._warn_about_guidance(sampling)
        size = batch_size or self.default_batch_size(n, guided=sampling.is_guided, early_abandon=early_abandon)
        text_1T = self._text([caption])
        caption_E = embed_captions(self.clip, [caption])[0]
        share = 1.0 if rank == "likelihood" else self._sampling_share()
        best = Best(keep, rank)
        for _, ks in batches(1, n, size):
            done = BatchProgress(progress, before=ks.start, n=len(ks), total=n, sampling_share=share)
            halfway = BetterHalf(lambda tokens_NJ: self._score_tops(tokens_NJ, caption_E)) if early_abandon else None
            seeds = [candidate_seed(sampling.seed, caption, k) for k in ks]
            samples = self._sample(text_1T, seeds, sampling, prefix, done.sampled, halfway)
            numbers_N = torch.tensor(ks if halfway is None else [ks[i] for i in halfway.kept])
            candidates = Candidates(numbers_N, samples.tokens[0], samples.log_likelihoods[0])
            self._judge(best, candidates, caption_E, done.judged)
        return self._result(best, caption, caption_E)

    @torch.no_grad()
    def sample_tokens(
        self,
        captions: Sequence[str],
        n: int,
        sampling: Sampling | None = None,
        *,
        prefix: Tensor | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Sample n candidates for each of P captions; captions share batches. Arguments as for `best`.

        Returns:
            Their tokens and log-likelihoods, on the CPU.

        Raises:
            ValueError: no captions, an empty one, or a number outside its range.
        """
        check_request(captions, n=n, keep=1)
        _check_batch_size(batch_size)
        if sampling is None:
            sampling = self.defaults.sampling()
        self._warn_about_guidance(sampling)
        total = len(captions) * n
        size = batch_size or self.default_batch_size(n, n_captions=len(captions), guided=sampling.is_guided)
        text_PT = self._text(captions)
        tokens_PNI = torch.empty(len(captions), n, self.dalle.config.stream.n_image, dtype=torch.int64)
        log_likelihoods_PN = torch.empty(len(captions), n)
        before = 0
        for rows, ks in batches(len(captions), n, size):
            done = BatchProgress(progress, before=before, n=len(rows) * len(ks), total=total)
            here = slice(rows.start, rows.stop)
            seeds = [candidate_seed(sampling.seed, caption, k) for caption in captions[here] for k in ks]
            samples = self._sample(text_PT[here], seeds, sampling, prefix, done.sampled)
            tokens_PNI[here, ks.start : ks.stop] = samples.tokens
            log_likelihoods_PN[here, ks.start : ks.stop] = samples.log_likelihoods
            before += len(seeds)
        return Samples(tokens=tokens_PNI, log_likelihoods=log_likelihoods_PN)

    @torch.no_grad()
    def choose(
        self, caption: str, tokens: Tensor, log_likelihoods: Tensor, *, keep: int, rank: Ranking | None = None
    ) -> Result:
        """Decode candidates and keep the best, without holding all pictures in memory.

        Args:
            caption: what the pictures should show.
            tokens: int64 (N, I), the candidates.
            log_likelihoods: float32 (N,), theirs: see `sample_tokens`.
            keep: K, at most N.
            rank: what is best; by default the bundle's.

        Returns:
            The best K, best first; of equal ones the earlier candidate.

        Raises:
            ValueError: keep is outside 1 … N, the caption is empty, or there is no such ranking.
        """
        check_request([caption], n=len(tokens), keep=keep)
        best = Best(keep, self.defaults.updated(rank=rank).rank)
        caption_E = embed_captions(self.clip, [caption])[0]
        self._judge(best, Candidates(torch.arange(len(tokens)), tokens, log_likelihoods), caption_E)
        return self._result(best, caption, caption_E)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn image tokens into pictures, all at once.

        Args:
            tokens: int64 (N, I), or the first of them (N, J), in whole rows.

        Returns:
            float32 (N, 3, H, W) in [0, 1], or the tops of the pictures.
        """
        grid = self.dalle.config.grid
        return self._decoding_dvae.decode(tokens.to(self.dalle.device).reshape(len(tokens), -1, grid))

    @torch.no_grad()
    def prefix(self, image: Image.Image, keep_rows: int) -> Tensor:
        """Return the image tokens of the top of a picture, for `generate` to complete.

        Args:
            image: any picture; it is resized and cropped to the size of the dVAE.
            keep_rows: rows of the token grid to keep, from 0 to all but one.

        Returns:
            int64 (1, keep_rows · grid), on the device of the model.

        Raises:
            ValueError: keep_rows is outside that range.
        """
        grid = self.dalle.config.grid
        if not 0 <= keep_rows < grid:
            raise ValueError(
                f"keep_rows is {keep_rows}, but pictures of this bundle have {grid} rows of tokens: "
                f"give 0 to {grid - 1}, so that at least one row is left to complete"
            )
        pixels = to_tensor(resize_and_crop(image, self.dvae.config.image_size))
        tokens_1YX = self.dvae.encode(pixels[None].to(self.dalle.device))
        return tokens_1YX[:, :keep_rows].flatten(1)

    def rank(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Cosines of P captions and pictures float (N, 3, H, W) in [0, 1]: float32 (P, N) on the CPU."""
        return score(self.clip, captions, images).cpu()

    def default_batch_size(
        self, n: int, *, n_captions: int = 1, guided: bool = False, early_abandon: bool = False
    ) -> int:
        """Return how many candidates to sample at once: what fits the memory, in batches of equal size.

        There is no other limit: a step reads the weights and the captions once for the whole batch, so the time per
        candidate falls as long as there is memory.

        Args:
            n: candidates of each caption.
            n_captions: captions that share batches.
            guided: whether each candidate is computed twice.
            early_abandon: whether pictures are decoded while the batch is under way, which takes half of the memory.
        """
        config = self.dalle.config
        times = 2 if guided else 1
        each = times * (bytes_per_candidate(config, self.dalle.dtype) + DRAWING_BYTES * config.image_vocab)
        caption = times * self._bytes_per_caption()
        budget = self._memory_budget() // (2 if early_abandon else 1)
        whole_captions = budget // (caption + n * each)
        if whole_captions > 0:
            return n * equal_batches(n_captions, whole_captions)
        return equal_batches(n, (budget - caption) // each)

    def _bytes_per_caption(self) -> int:
        """Memory of a caption: its keys and values of all layers, and what one layer takes to read it."""
        config, itemsize = self.dalle.config, self.dalle.dtype.itemsize
        T, D = config.text_len, config.d_model
        kept = 2 * config.n_layers * T * D * itemsize
        wide = 3 * 4 * D * T * itemsize  # in the MLP, before, in and after its nonlinearity
        scores = 2 * config.n_heads * T * T * itemsize
        return kept + max(wide, scores)

    def _memory_budget(self) -> int:
        """Bytes that a batch may take."""
        device = self.dalle.device
        if self._memory is not None:
            return self._memory
        if device.type != "cuda":
            return CPU_MEMORY_BUDGET
        # what torch holds for later use is free as well
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + held) // 2

    def _sample(
        self,
        text_PT: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        prefix: Tensor | None,
        on_step: Callable[[int, int], None],
        halfway: Callable[[Tensor], Tensor] | None = None,
    ) -> Samples:
        """Sample one batch, on the device of the model."""
        return sample(
            self.dalle,
            text_PT,
            seeds=seeds,
            n=len(seeds) // len(text_PT),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            guidance=sampling.guidance,
            prefix=prefix,
            on_step=on_step,
            abandon=halfway,
            compile=self._compile,
        )

    def _judge(
        self,
        best: Best,
        candidates: Candidates,
        caption_E: Tensor,
        on_judged: Callable[[int, int], None] = lambda done, n: None,
    ) -> None:
        """Let `best` have candidates, decoded and scored, a few at a time, if it needs their scores."""
        n = len(candidates.numbers)
        if best.rank == "likelihood":
            best.add(candidates)
            on_judged(n, n)
            return
        n_judged = 0
        for some in candidates.split(self._decoding_batch_size(n)):
            # nothing here may hold the pictures while the next ones are decoded
            best.add(self._seen(some, caption_E))
            n_judged += len(some.numbers)
            on_judged(n_judged, n)

    def _result(self, best: Best, caption: str, caption_E: Tensor) -> Result:
        """Return the best of the candidates, decoded and scored now if their pictures are not held."""
        kept = best.kept()
        if kept.images is None:
            unseen = kept._replace(scores=None)
            parts = [self._seen(some, caption_E) for some in unseen.split(self._decoding_batch_size(len(kept.numbers)))]
            kept = functools.reduce(Candidates.followed_by, parts)
        assert kept.scores is not None
        assert kept.images is not None
        return Result(
            caption=caption,
            images=kept.images.cpu(),
            scores=kept.scores.cpu(),
            log_likelihoods=kept.log_likelihoods,
            tokens=kept.tokens,
            candidates=tuple(kept.numbers.tolist()),
            rank=best.rank,
        )

    def _seen(self, candidates: Candidates, caption_E: Tensor) -> Candidates:
        """Return candidates with pictures and scores."""
        images = self.decode(candidates.tokens)
        return candidates._replace(images=images, scores=embed_images(self.clip, images) @ caption_E)

    def _score_tops(self, tokens_NJ: Tensor, caption_E: Tensor) -> Tensor:
        """Scores (N,) of pictures of which only the top rows are known, on a ground of the top's own mean colour.

        CLIP was trained on whole square pictures. A crop would hide more of the top, and a grey or white ground is
        something to see: of the grounds that need no more than the top, this is the one whose scores told best
        which candidates of the demonstration would be good.
        """
        scores = []
        for some_NJ in torch.split(tokens_NJ, self._decoding_batch_size(len(tokens_NJ))):
            top = self.decode(some_NJ)
            ground = top.mean((2, 3), keepdim=True).expand(-1, -1, top.shape[3] - top.shape[2], top.shape[3])
            scores.append(embed_images(self.clip, torch.cat([top, ground], dim=2)) @ caption_E)
        return torch.cat(scores)

    def _decoding_batch_size(self, n: int) -> int:
        """Return how many of n pictures to decode at once, in batches of equal size."""
        return equal_batches(n, min(JUDGED_AT_ONCE, pictures_at_once(self.dvae.config, self._memory_budget())))

    def _sampling_share(self) -> float:
        """Sampling's share of the multiplications that a candidate takes; the others are the dVAE's and CLIP's.

        Progress goes by it, so that it runs evenly also where decoding takes longer than sampling.
        """
        grid, clip = self.dalle.config.grid, self.clip.config
        sampling = grid**2 * (_n_weights(self.dalle.blocks) + _n_weights(self.dalle.image_head))
        groups = [self.dvae.decoder.blocks.get_submodule(f"group_{g + 1}") for g in range(self.dvae.config.n_groups)]
        decoding = sum((grid * 2**g) ** 2 * _n_weights(group) for g, group in enumerate(groups))
        scoring = (clip.n_patches + 1) * _n_weights(self.clip.vision.blocks)
        share: float = sampling / (sampling + decoding + scoring)
        return share

    def _text(self, captions: Sequence[str]) -> Tensor:
        """Text ids (P, T) of captions; how much of which was cut is logged."""
        text_len = self.dalle.config.text_len
        for caption in captions:
            n_ids = len(self.tokenizer.encode(caption))
            if n_ids > text_len - 1:
                shown = caption if len(caption) <= 60 else f"{caption[:57]}..."
                logger.warning(
                    "the caption %r has %d tokens, the model reads %d: the last %d were cut",
                    shown,
                    n_ids,
                    text_len - 1,
                    n_ids - (text_len - 1),
                )
        return self.tokenizer.text(captions, text_len)[0]

    def _warn_about_guidance(self, sampling: Sampling) -> None:
        if sampling.is_guided and not self._knows_null_caption and not self._has_warned:
            self._has_warned = True  # once is enough for many captions
            logger.warning(
                "guidance is %g, but this transformer never saw an empty caption in training, which guidance "
                "compares with: expect worse pictures; train with a null_caption_probability above 0",
                sampling.guidance,
            )

    def _check_top_is_open(self, prefix: Tensor | None) -> None:
        grid = self.dalle.config.grid
        given = 0 if prefix is None else prefix.shape[-1]
        if given >= grid // 2 * grid:
            raise ValueError(
                f"early abandon judges candidates by the top {grid // 2} of their {grid} rows of tokens, but the first "
                f"{given} tokens are given to all of them: give fewer rows, or leave early abandon off"
            )


def bundle_part(bundle: Path, part: str) -> Path:
    """Return where a part of a bundle is; FileNotFoundError, saying what makes it, if it is not there."""
    if not bundle.is_dir():
        raise FileNotFoundError(
            f"no bundle at {bundle}: expected a directory with {', '.join(HOW_TO_MAKE)}; "
            "`make demo` makes one in runs/demo"
        )
    if not (bundle / part).exists():
        raise FileNotFoundError(f"the bundle {bundle} has no {part}: make it with {HOW_TO_MAKE[part]}")
    return bundle / part


def _check_sizes(tokenizer: Tokenizer, dalle: DALLE, dvae: DVAE) -> None:
    for what, of_transformer, of_part in (
        ("text tokens", dalle.config.text_vocab, tokenizer.vocab_size),
        ("image tokens", dalle.config.image_vocab, dvae.config.vocab_size),
        ("rows of image tokens", dalle.config.grid, dvae.config.grid),
    ):
        if of_transformer != of_part:
            part = "tokenizer" if what == "text tokens" else "dVAE"
            raise ValueError(
                f"the transformer has {of_transformer} {what}, the {part} has {of_part}: "
                f"use the {part} that the transformer was trained with"
            )


def _sampling_defaults(dalle: DALLE) -> SamplingDefaults:
    """Return those in the metadata of a transformer; the paper's if there are none.

    Raises:
        ValueError: they are damaged, or do not fit the transformer.
    """
    try:
        defaults = SamplingDefaults.from_json(dalle.metadata.get("sampling", {}))
        check_top_k(defaults.top_k, dalle.config.image_vocab)
    except ValueError as error:
        raise ValueError(
            f'the sampling defaults of the transformer, "sampling" in the metadata of its config.json, cannot be used: '
            f"{error}; correct them, or take them out to sample as the paper does"
        ) from error
    return defaults


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def _n_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
