"""Measuring a bundle on captioned pictures it was not trained on: reconstruction, token statistics, likelihood, retrieval, samples.

The image loss is put beside the entropy of the evaluated tokens themselves: a model that only knew how frequent each token is could do no
better than that, so the difference is what the transformer has learned about captions and neighbourhoods.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle.gallery import contact_sheet
from dalle.loss import stream_loss
from dalle.pipeline import Pipeline
from dvae.images import open_image, resize_and_crop, to_image, to_tensor
from dvae.metrics import code_usage, psnr, ssim
from rerank import CLIP, score
from training.data import ShardData
from training.metrics import Report


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; losses and entropies in nats per token."""

    samples: int
    """Captioned pictures measured."""
    psnr: float
    """Mean PSNR of the reconstructions from argmax tokens, in dB."""
    ssim: float
    """Mean structural similarity of the same."""
    codes_used: int
    """Different codes in all the pictures' tokens."""
    codes: int
    """Codes there are."""
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
    text_loss: float
    """The transformer's loss per text token."""
    captions_cut: int
    """Captions longer than the stream's text part."""
    retrieval: float
    """How often CLIP puts the right one of `retrieval_size` captions first."""
    retrieval_size: int
    """Captions to choose from."""

    def table(self) -> str:
        """Return the measurements as aligned lines."""
        rows = [
            ("pictures", f"{self.samples}"),
            ("reconstruction PSNR", f"{self.psnr:.2f} dB"),
            ("reconstruction SSIM", f"{self.ssim:.3f}"),
            ("codes used", f"{self.codes_used} of {self.codes}, perplexity {self.perplexity:.0f}"),
            (
                "image loss",
                f"{self.image_loss:.3f} nats per token; unigram {self.image_unigram:.3f}, {self.image_gain:.3f} better",
            ),
            ("text loss", f"{self.text_loss:.3f} nats per token; unigram {self.text_unigram:.3f}"),
            ("captions cut", f"{self.captions_cut}"),
            (
                "CLIP retrieval",
                f"{self.retrieval:.1%} right of {self.retrieval_size} captions (chance {1 / self.retrieval_size:.1%})",
            ),
        ]
        return "\n".join(f"  {name:<20} {value}" for name, value in rows)


@torch.no_grad()
def evaluate(pipe: Pipeline, data: ShardData, *, batch_size: int = 32, limit: int | None = None) -> Evaluation:
    """Measure a bundle on captioned pictures (the first caption of each, centre crops).

    Raises:
        ValueError: no picture could be read.
    """
    psnrs, ssims, losses, tokens, texts, cut = [], [], [], [], [], 0
    images_for_clip, captions = [], []
    count = min(len(data), limit or len(data))
    for first in range(0, count, batch_size):
        images, batch_captions = _read(data, range(first, min(first + batch_size, count)), pipe.dvae.config.image_size)
        if not batch_captions:
            continue
        image_tokens = pipe.dvae.encode(images)
        reconstructions = pipe.dvae.decode(image_tokens)
        psnrs.append(psnr(images, reconstructions))
        ssims.append(ssim(images, reconstructions))
        config = pipe.dalle.config
        text, n_cut = pipe.tokenizer.text(batch_captions, config.text_len)
        loss = stream_loss(*pipe.dalle(text, image_tokens.flatten(1)), text, image_tokens.flatten(1), config)
        n_text = int((text[:, 1:] < config.text_vocab).sum())
        losses.append(
            (loss.image.item() * image_tokens.numel(), image_tokens.numel(), loss.text.item() * n_text, n_text)
        )
        tokens.append(image_tokens.flatten())
        texts.append(text[:, 1:][text[:, 1:] < config.text_vocab])
        cut += n_cut
        images_for_clip.append(images)
        captions.extend(batch_captions)
    if not captions:
        raise ValueError("none of the pictures could be read: nothing to evaluate")
    sums = np.sum(np.asarray(losses, dtype=np.float64), axis=0)
    usage = code_usage(torch.cat(tokens), pipe.dvae.config.vocab_size)
    image_loss = float(sums[0] / sums[1])
    retrieval, retrieval_size = _retrieval(pipe.clip, captions, torch.cat(images_for_clip))
    return Evaluation(
        samples=len(captions),
        psnr=float(torch.cat(psnrs).mean()),
        ssim=float(torch.cat(ssims).mean()),
        codes_used=int(usage.used),
        codes=pipe.dvae.config.vocab_size,
        perplexity=float(usage.perplexity),
        image_unigram=float(usage.entropy),
        image_loss=image_loss,
        image_gain=float(usage.entropy) - image_loss,
        text_unigram=float(code_usage(torch.cat(texts), pipe.dalle.config.text_vocab).entropy),
        text_loss=float(sums[2] / max(sums[3], 1)),
        captions_cut=cut,
        retrieval=retrieval,
        retrieval_size=retrieval_size,
    )


def _read(data: ShardData, indices: Sequence[int], size: int) -> tuple[Tensor, list[str]]:
    """Return the readable pictures of some samples and their first captions."""
    images, captions = [], []
    for index in indices:
        sample = data.read(index)
        try:
            images.append(to_tensor(resize_and_crop(open_image(sample.image_bytes, sample.source), size)))
        except ValueError:
            continue
        captions.append(sample.captions[0])
    return (torch.stack(images) if images else torch.empty(0)), captions


def _retrieval(clip: CLIP, captions: Sequence[str], images: Tensor, size: int = 32) -> tuple[float, int]:
    """Return how often CLIP finds a picture's caption among `size` different ones, and `size`, less if there are fewer."""
    distinct = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    chosen = sorted(distinct.values())
    size = min(size, len(chosen))
    hits, total = 0, 0
    for first in range(0, len(chosen) - size + 1, size):
        group = chosen[first : first + size]
        scores = score(clip, [captions[index] for index in group], images[group])
        hits += int((scores.argmax(dim=0).cpu() == torch.arange(size)).sum())
        total += size
    return hits / total, size


def sample_sheet(
    pipe: Pipeline, captions: Sequence[str], path: Path, report: Report, *, n: int = 16, keep: int = 4
) -> None:
    """Write a contact sheet with the `keep` best of `n` samples for each caption."""
    sections = []
    for number, caption in enumerate(captions, 1):
        result = pipe.generate(caption, n=n, keep=keep)
        labels = [f"{value:.3f}" for value in result.scores.tolist()]
        sections.append((caption, [to_image(image) for image in result.images], labels))
        report(f"sampled {number}/{len(captions)}: {caption}")
    contact_sheet(sections).save(path)


def distinct_captions(data: ShardData, count: int) -> list[str]:
    """Return `count` different captions spread evenly over the data, fewer if there are no more."""
    chosen: dict[str, None] = {}
    for index in np.linspace(0, len(data) - 1, min(len(data), 8 * count)).astype(int).tolist():
        chosen.setdefault(data.read(index).captions[0])
    spread = list(chosen)
    step = max(1, math.floor(len(spread) / count))
    return spread[::step][:count]


def evaluate_bundle(
    bundle: Path, data: ShardData, report: Report, *, n_captions: int = 5, device: str = "cpu"
) -> Evaluation:
    """Measure a bundle and write evaluation.json and samples.png into it."""
    pipe = Pipeline.load(bundle, device=device)
    evaluation = evaluate(pipe, data)
    (bundle / "evaluation.json").write_text(json.dumps(dataclasses.asdict(evaluation), indent=2))
    report(f"measured on {evaluation.samples} pictures:\n{evaluation.table()}")
    sample_sheet(pipe, distinct_captions(data, n_captions), bundle / "samples.png", report)
    report(f"wrote {bundle / 'evaluation.json'} and {bundle / 'samples.png'}")
    return evaluation
