"""Measuring a bundle on captioned pictures it was not trained on.

Reconstruction, token statistics, likelihood, retrieval, samples. The image loss is shown beside the entropy of the
evaluated tokens themselves: a model that only knew how frequent each token is could do no better, so the difference
measures how much captions and neighbouring tokens help.

Legend: B batch  N pictures  C,H,W channels, height, width  Y,X grid of tokens  I = Y·X  T text positions  E features
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle.data.reader import ShardData
from dalle.family.losses import training_loss
from dalle.output.sheets import contact_sheet
from dalle.output.text import Say, aligned
from dalle.pipeline import Pipeline
from dvae.images import open_image, resize_and_crop, to_image, to_tensor
from dvae.metrics import code_usage, psnr, ssim
from rerank import CLIP
from rerank.score import embed_captions, embed_images
from storage.atomic import replace_text

logger = logging.getLogger(__name__)

Measurement = Callable[[Pipeline, ShardData, Say], Mapping[str, object]]
"""Measures a bundle on some data, says what it found, and returns it for evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measurements of a bundle; losses and entropies in nats per token."""

    samples: int
    """Captioned pictures measured."""
    psnr: float
    """Mean PSNR of the reconstructions from argmax tokens, in dB."""
    ssim: float
    """Mean structural similarity of the same."""
    codes_used: int
    """Different codes in all the pictures' tokens."""
    codes: int
    """Codes of the dVAE."""
    perplexity: float
    """Of the codes' frequencies."""
    image_unigram: float
    """Entropy of the image tokens' own frequencies."""
    image_loss: float
    """The transformer's loss per image token."""
    image_gain: float
    """image_unigram − image_loss."""
    text_unigram: float
    """Entropy of the text tokens' own frequencies."""
    text_loss: float | None
    """The transformer's loss per text token; None of one that only reads them."""
    captions_cut: int
    """Captions longer than the stream's text part."""
    retrieval: float
    """Fraction of pictures for which CLIP puts the right one of `retrieval_size` captions first."""
    retrieval_size: int
    """Captions to choose from."""

    def table(self) -> str:
        """Return the measurements as aligned lines."""
        text = "none: captions are only read;" if self.text_loss is None else f"{self.text_loss:.3f}"
        rows = [
            ("pictures", f"{self.samples}"),
            ("reconstruction PSNR", f"{self.psnr:.2f} dB"),
            ("reconstruction SSIM", f"{self.ssim:.3f}"),
            ("codes used", f"{self.codes_used} of {self.codes}, perplexity {self.perplexity:.0f}"),
            (
                "image loss",
                f"{self.image_loss:.3f} nats per token; unigram {self.image_unigram:.3f}, "
                f"{abs(self.image_gain):.3f} {'better' if self.image_gain >= 0 else 'worse'}",
            ),
            ("text loss", f"{text} nats per token; unigram {self.text_unigram:.3f}"),
            ("captions cut", f"{self.captions_cut}"),
            (
                "CLIP retrieval",
                f"{self.retrieval:.1%} right of {self.retrieval_size} captions (chance {1 / self.retrieval_size:.1%})",
            ),
        ]
        return aligned(rows, indent=2)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Measurements of a batch of B pictures, on the CPU."""

    captions: list[str]
    psnr: Tensor
    """(B,) in dB."""
    ssim: Tensor
    """(B,)"""
    image_tokens: Tensor
    """(B,I)"""
    text_tokens: Tensor
    """The captions' BPE ids, one after the other."""
    image_loss_sum: float
    """In nats, over all image tokens."""
    text_loss_sum: float | None
    """In nats, over all text tokens; None of a transformer that only reads them."""
    n_cut: int
    features: Tensor
    """(B,E) of CLIP, of the pictures."""


def evaluate(pipe: Pipeline, data: ShardData, *, batch_size: int = 32) -> Evaluation:
    """Measure a bundle on captioned pictures (the first caption of each, centre crops).

    Raises:
        ValueError: no picture could be read.
    """
    parts = []
    for first in range(0, len(data), batch_size):
        numbers = range(first, min(first + batch_size, len(data)))
        images, captions = _read(data, numbers, pipe.dvae.config.image_size)
        if captions:
            parts.append(_measure(pipe, images.to(pipe.dalle.device), captions))
    if not parts:
        raise ValueError("none of the pictures could be read: nothing to evaluate")
    captions = [caption for part in parts for caption in part.captions]
    image_tokens = torch.cat([part.image_tokens for part in parts])
    text_tokens = torch.cat([part.text_tokens for part in parts])
    text_losses = [part.text_loss_sum for part in parts]
    usage = code_usage(image_tokens, pipe.dvae.config.vocab_size)
    image_loss = sum(part.image_loss_sum for part in parts) / image_tokens.numel()
    retrieval, retrieval_size = _retrieval(pipe.clip, captions, torch.cat([part.features for part in parts]))
    return Evaluation(
        samples=len(captions),
        psnr=float(torch.cat([part.psnr for part in parts]).mean()),
        ssim=float(torch.cat([part.ssim for part in parts]).mean()),
        codes_used=usage.used,
        codes=pipe.dvae.config.vocab_size,
        perplexity=usage.perplexity,
        image_unigram=usage.entropy,
        image_loss=image_loss,
        image_gain=usage.entropy - image_loss,
        text_unigram=code_usage(text_tokens, pipe.dalle.config.text_vocab).entropy,
        text_loss=None if None in text_losses else sum(filter(None, text_losses)) / text_tokens.numel(),
        captions_cut=sum(part.n_cut for part in parts),
        retrieval=retrieval,
        retrieval_size=retrieval_size,
    )


@torch.no_grad()
def _measure(pipe: Pipeline, images_BCHW: Tensor, captions: list[str]) -> _Measured:
    config = pipe.dalle.config
    tokens_BYX = pipe.dvae.encode(images_BCHW)
    decoded_BCHW = pipe.dvae.decode(tokens_BYX)
    image_tokens_BI = tokens_BYX.flatten(1)
    each = [pipe.tokenizer.encode(caption) for caption in captions]
    loss = training_loss(pipe.dalle, config.text_rows(each).to(images_BCHW.device), image_tokens_BI)
    text_tokens = torch.tensor([number for ids in each for number in ids[: config.max_caption]])
    return _Measured(
        captions=captions,
        psnr=psnr(images_BCHW, decoded_BCHW).cpu(),
        ssim=ssim(images_BCHW, decoded_BCHW).cpu(),
        image_tokens=image_tokens_BI.cpu(),
        text_tokens=text_tokens,
        image_loss_sum=loss.image.item() * image_tokens_BI.numel(),
        text_loss_sum=None if loss.text is None else loss.text.item() * text_tokens.numel(),
        n_cut=sum(len(ids) > config.max_caption for ids in each),
        features=embed_images(pipe.clip, images_BCHW).cpu(),
    )


def _read(data: ShardData, indices: Sequence[int], size: int) -> tuple[Tensor, list[str]]:
    """Return the readable pictures of some samples and their first captions."""
    images, captions = [], []
    for index in indices:
        try:
            sample = data.read(index)
            images.append(to_tensor(resize_and_crop(open_image(sample.image_bytes, sample.source), size)))
        except ValueError as error:
            logger.warning("a picture is left out of the evaluation: %s", error)
            continue
        captions.append(sample.captions[0])
    return (torch.stack(images) if images else torch.empty(0)), captions


def _retrieval(clip: CLIP, captions: Sequence[str], features_NE: Tensor, size: int = 32) -> tuple[float, int]:
    """Return the fraction of pictures whose caption CLIP finds among `size` different ones, and `size`."""
    distinct = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    chosen = sorted(distinct.values())
    size = min(size, len(chosen))
    own_B = torch.arange(size)
    hits, total = 0, 0
    for first in range(0, len(chosen) - size + 1, size):
        group = chosen[first : first + size]
        texts_BE = embed_captions(clip, [captions[index] for index in group]).cpu()
        nearest_B = (features_NE[group] @ texts_BE.T).argmax(dim=1)
        hits += int((nearest_B == own_B).sum())
        total += size
    return hits / total, size


def sample_sheet(pipe: Pipeline, captions: Sequence[str], path: Path, say: Say, *, n: int = 16, keep: int = 4) -> None:
    """Write a contact sheet with the `keep` best of `n` samples for each caption, by the bundle's sampling defaults."""
    sections = []
    for number, caption in enumerate(captions, 1):
        result = pipe.generate(caption, n=n, keep=keep)
        numbers = zip(result.scores.tolist(), result.log_likelihoods.tolist(), strict=True)
        labels = [f"{score:.3f}  {log_likelihood:.0f} nats" for score, log_likelihood in numbers]
        sections.append((caption, [to_image(image) for image in result.images], labels))
        say(f"sampled {number}/{len(captions)}: {caption}")
    contact_sheet(sections).save(path)


def distinct_captions(data: ShardData, count: int) -> list[str]:
    """Return `count` different captions spread evenly over the data, fewer if there are no more."""
    chosen: dict[str, None] = {}
    for index in np.linspace(0, len(data) - 1, min(len(data), 8 * count)).astype(int).tolist():
        with contextlib.suppress(ValueError, OSError):  # lost or damaged
            chosen.setdefault(data.captions(index)[0])
    spread = list(chosen)
    step = max(1, math.floor(len(spread) / count))
    return spread[::step][:count]


def evaluate_bundle(
    bundle: Path,
    data: ShardData,
    say: Say,
    *,
    n_captions: int = 5,
    device: str = "cpu",
    also: Measurement | None = None,
) -> None:
    """Measure a bundle and write evaluation.json and samples.png into it.

    Args:
        bundle: its directory.
        data: captioned pictures.
        say: told the measurements.
        n_captions: captions to sample.
        device: where to compute: cpu, cuda or cuda:1.
        also: another measurement, written into evaluation.json beside the others.

    Raises:
        FileNotFoundError: a part of the bundle is missing.
        ValueError: the parts do not fit one another, no picture could be read, or n_captions is below 1.
    """
    check_n_captions(n_captions)
    pipe = Pipeline.load(bundle, device=device)
    measured = measure_bundle(pipe, data, say, also=also)
    replace_text(bundle / "evaluation.json", json.dumps(measured, indent=2))
    sample_sheet(pipe, distinct_captions(data, n_captions), bundle / "samples.png", say)
    say(f"wrote {bundle / 'evaluation.json'} and {bundle / 'samples.png'}")


def check_n_captions(n: int) -> None:
    """Raise ValueError for a sheet without captions."""
    if n < 1:
        raise ValueError(f"--captions must be at least 1, got {n}")


def measure_bundle(pipe: Pipeline, data: ShardData, say: Say, *, also: Measurement | None = None) -> dict[str, object]:
    """Measure a bundle on captioned pictures; returns what evaluation.json says of it."""
    evaluation = evaluate(pipe, data)
    say(f"measured on {evaluation.samples} pictures:\n{evaluation.table()}")
    return {**dataclasses.asdict(evaluation), **(also(pipe, data, say) if also is not None else {})}
