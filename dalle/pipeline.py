"""From a caption to ranked pictures: the tokenizer, transformer, dVAE and CLIP of a bundle are joined here.

A bundle is a directory with tokenizer.json, dvae/, dalle/ and clip/. Its transformer remembers the tokenizer
and the dVAE it was trained with; others, whose ids mean something else, are refused.

Source: §2.6 of Ramesh et al. 2021 (the best of 512 candidates by CLIP); completing a picture from its top
rows is their figure 2d.

Letters: P captions  N candidates  K kept ones  T text positions  I image positions  H, W pixels
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from dalle.model import DALLE
from dalle.sampling import candidate_seed, sample
from dalle.tokenizer import Tokenizer
from dvae import DVAE
from dvae.directory import directory_hash
from dvae.images import resize_and_crop, to_tensor
from rerank import CLIP, score
from rerank.score import embed_captions, embed_images

logger = logging.getLogger(__name__)

HOW_TO_MAKE = {
    "tokenizer.json": "`dalle-train tokenizer`",
    "dvae": "`dalle-train dvae`, or `dalle import-dvae` for published weights",
    "dalle": "`dalle-train transformer`",
    "clip": "`dalle-train clip`",
}
"""The parts of a bundle, and what makes each."""

CPU_MEMORY_BUDGET = 2 << 30
"""Bytes that a batch of candidates may take on a CPU; on a GPU it is half of what is free."""
MAX_BATCH_SIZE = 64
"""Larger batches hardly sample faster, and their pictures are seen later."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best K of the candidates of one caption, best first."""

    caption: str
    """As it was given."""
    images: Tensor
    """float32 (K, 3, H, W) in [0, 1], on the CPU."""
    scores: Tensor
    """float32 (K,) in [-1, 1], descending: cosine of caption and picture under CLIP; on the CPU."""
    tokens: Tensor
    """int64 (K, I), raster order, on the CPU."""
    candidates: tuple[int, ...]
    """Which of the candidates these are: candidate k is a function of (seed, caption, k) and the settings."""


class Pipeline:
    """A bundle, loaded.

    Args:
        tokenizer: of the captions.
        dalle: the transformer, with the metadata of its training.
        dvae: turns image tokens into pictures and pictures into image tokens.
        clip: ranks the pictures.
        hashes: part -> hash, for the metadata of what is made.

    Raises:
        ValueError: the parts do not fit one another.
    """

    def __init__(
        self, *, tokenizer: Tokenizer, dalle: DALLE, dvae: DVAE, clip: CLIP, hashes: Mapping[str, str]
    ) -> None:
        _check_sizes(tokenizer, dalle, dvae)
        self.tokenizer = tokenizer
        self.dalle = dalle.eval().requires_grad_(False)
        self.dvae = dvae.eval().requires_grad_(False)
        self.clip = clip.eval().requires_grad_(False)
        self.hashes = dict(hashes)
        self._knows_null_caption = bool(dalle.metadata.get("null_caption_probability"))
        self._has_warned = False

    @classmethod
    def load(cls, bundle: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load a bundle and check that its parts belong together.

        Raises:
            FileNotFoundError: the bundle, or a part of it, is missing.
            ValueError: a part is damaged, or the transformer was trained with another tokenizer or dVAE.
        """
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
            dalle=dalle.to(device),
            dvae=DVAE.load(parts["dvae"]).to(device),
            clip=CLIP.load(parts["clip"]).to(device),
            hashes={"tokenizer": tokenizer.hash, **hashes},
        )

    def generate(
        self,
        caption: str,
        *,
        n: int = 64,
        keep: int = 8,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        prefix: Tensor | None = None,
        batch_size: int | None = None,
        progress: Callable[[float, int], None] | None = None,
    ) -> Result:
        """Sample pictures for a caption and keep those that CLIP finds fit best.

        Args:
            caption: any text but an empty one; a longer one than the model reads is cut (logged).
            n: how many candidates are sampled.
            keep: how many of them are returned.
            seed: of the candidates; same seed, same pictures, whatever `n`, `keep` and `batch_size` are.
            temperature: logits are divided by it; below 1 is less varied.
            top_k: sample from the k most likely tokens only.
            top_p: sample from the most likely tokens that together have this probability only.
            guidance: how far to go from "no caption" towards the caption; 1 is plain sampling. It costs a
                second pass, and needs a model that saw empty captions in training.
            prefix: int64 (1, m) image tokens that every candidate begins with: see the method `prefix`.
            batch_size: candidates sampled at the same time; by default as many as fit a budget of memory.
            progress: called with (candidates done, those under way counted in part; n).

        Returns:
            The best `keep`, best first; of equal ones the earlier candidate.

        Raises:
            ValueError: an empty caption, or a number outside its range.
        """
        check_request([caption], n=n, keep=keep)
        tokens_PNI = self.sample_tokens(
            [caption],
            n,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            prefix=prefix,
            batch_size=batch_size,
            progress=progress,
        )
        return self.choose(caption, tokens_PNI[0], keep=keep)

    @torch.no_grad()
    def sample_tokens(
        self,
        captions: Sequence[str],
        n: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        prefix: Tensor | None = None,
        batch_size: int | None = None,
        progress: Callable[[float, int], None] | None = None,
    ) -> Tensor:
        """Sample n candidates for each of P captions; captions share batches. Arguments as for `generate`.

        Returns:
            int64 (P, n, I), raster order, on the CPU.

        Raises:
            ValueError: no captions, an empty one, or a number outside its range.
        """
        check_request(captions, n=n, keep=1)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._warn_about_guidance(guidance)
        size = batch_size or self.default_batch_size(len(captions) * n, guided=guidance != 1)
        text_PT = self._text(captions).to(self.dalle.device)
        tokens_PNI = torch.empty(len(captions), n, self.dalle.config.stream.n_image, dtype=torch.int64)
        n_done = 0
        for rows, ks in _batches(len(captions), n, size):
            tokens_PNI[rows.start : rows.stop, ks.start : ks.stop] = sample(
                self.dalle,
                text_PT[rows.start : rows.stop],
                seeds=[candidate_seed(seed, captions[row], k) for row in rows for k in ks],
                n=len(ks),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                guidance=guidance,
                prefix=prefix,
                on_step=_steps_as_candidates(progress, n_done, len(rows) * len(ks), len(captions) * n),
            )
            n_done += len(rows) * len(ks)
        return tokens_PNI

    @torch.no_grad()
    def choose(self, caption: str, tokens: Tensor, *, keep: int) -> Result:
        """Decode candidates and keep those that fit the caption best, without holding all pictures in memory.

        Args:
            caption: what the pictures should show.
            tokens: int64 (N, I), the candidates.
            keep: K, at most N.

        Returns:
            The best K, best first; of equal ones the earlier candidate.

        Raises:
            ValueError: keep is outside 1 … N, or the caption is empty.
        """
        check_request([caption], n=len(tokens), keep=keep)
        caption_features_E = embed_captions(self.clip, [caption])[0]
        scores_N, images = torch.empty(0), torch.empty(0)
        kept_N = torch.empty(0, dtype=torch.int64)
        size = self._decoding_batch_size()
        for first in range(0, len(tokens), size):
            new_images = self.decode(tokens[first : first + size])
            new_scores_N = (embed_images(self.clip, new_images) @ caption_features_E).float().cpu()
            scores_N = torch.cat([scores_N, new_scores_N])
            images = torch.cat([images, new_images.cpu()]) if len(images) else new_images.cpu()
            kept_N = torch.cat([kept_N, torch.arange(first, first + len(new_images))])
            # stable, and earlier candidates come first: equal scores keep their order
            order = scores_N.argsort(descending=True, stable=True)[:keep]
            scores_N, images, kept_N = scores_N[order], images[order], kept_N[order]
        return Result(
            caption=caption,
            images=images,
            scores=scores_N,
            tokens=tokens[kept_N].cpu(),
            candidates=tuple(kept_N.tolist()),
        )

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn image tokens int64 (N, I) into pictures, float32 (N, 3, H, W) in [0, 1], all at once."""
        grid = self.dalle.config.grid
        return self.dvae.decode(tokens.to(self.dalle.device).reshape(-1, grid, grid))

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

    def default_batch_size(self, n: int, *, guided: bool = False) -> int:
        """How many of n candidates to sample at once: what fits the memory, in batches of equal size."""
        config = self.dalle.config
        device = self.dalle.device
        budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_MEMORY_BUDGET
        # keys and values of every layer; those of the captions are few. Guidance keeps them twice
        cache = 2 * config.n_layers * config.stream.n_image * config.d_model * self.dalle.dtype.itemsize
        largest = max(1, min(MAX_BATCH_SIZE, budget // (cache * (2 if guided else 1))))
        return math.ceil(n / math.ceil(n / largest))

    def _decoding_batch_size(self) -> int:
        """Pictures to decode at once: the last group of the decoder has n_hid channels for every pixel."""
        config = self.dvae.config
        # its input, the branch of a block and their sum live at the same time, in float32
        per_picture = 3 * 4 * config.n_hid * config.image_size**2
        return max(1, min(MAX_BATCH_SIZE, CPU_MEMORY_BUDGET // per_picture))

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

    def _warn_about_guidance(self, guidance: float) -> None:
        if guidance != 1 and not self._knows_null_caption and not self._has_warned:
            self._has_warned = True  # once is enough for many captions
            logger.warning(
                "guidance is %g, but this transformer never saw an empty caption in training, which guidance "
                "compares with: expect worse pictures; train with a null_caption_probability above 0",
                guidance,
            )


def check_request(captions: Sequence[str], *, n: int, keep: int) -> None:
    """Raise ValueError unless there are captions, none of them empty, and 1 ≤ keep ≤ n."""
    if not captions:
        raise ValueError("no captions: give at least one")
    if not all(caption.strip() for caption in captions):
        raise ValueError("the caption is empty: say what the picture should show")
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 candidate must be sampled")
    if not 1 <= keep <= n:
        raise ValueError(f"keep is {keep}, but {n} candidates are sampled: keep 1 to {n} of them, or sample more")


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


def _batches(n_captions: int, n: int, size: int) -> Iterator[tuple[range, range]]:
    """Split n candidates of each caption into (captions, candidates) of at most `size` products."""
    n_rows = min(n_captions, size)
    n_ks = max(1, size // n_rows)
    for row in range(0, n_captions, n_rows):
        for k in range(0, n, n_ks):
            yield range(row, min(row + n_rows, n_captions)), range(k, min(k + n_ks, n))


def _steps_as_candidates(
    progress: Callable[[float, int], None] | None, n_done: int, n_batch: int, total: int
) -> Callable[[int, int], None] | None:
    """An `on_step` for `sample` that tells how many candidates are done, counting a batch by its tokens."""
    if progress is None:
        return None

    def on_step(done: int, n_steps: int) -> None:
        progress(n_done + n_batch * done / n_steps, total)

    return on_step
