"""Several tokenizers on the same pictures: what each makes of them, and what its tokens cost.

The common rule. Each tokenizer reads the centre square of a picture at its own size, so that it works as it was
trained, or all at one size that is asked for. All are measured beside one original, at the largest of these sizes:
what a smaller tokenizer draws is enlarged to it (Lanczos), so what it cannot hold counts against it. Reconstructions
are decoded from argmax tokens, and rounded to 8 bits before they are measured. A mean PSNR is the mean of decibels.

Letters: B batch  N pictures  C,H,W channels, height, width  Y,X grid of tokens  E features
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from dalle.evaluation.numbers.frechet import floor, frechet_distance_of_features, singular_note
from dalle.evaluation.reconstruction import Measures, mean, measured
from dalle.evaluation.tokenizers.contenders import Contender
from dalle.evaluation.tokenizers.rates import Rates, nats_of, rates
from dvae.images import resize_and_crop, to_image, to_tensor
from dvae.metrics import bits_per_pixel
from rerank import CLIP
from rerank.score import embed_images

WORST = 4
"""Pictures that are kept as the worst."""
LEAST_FOR_DISTANCE, LEAST_FOR_FLOOR = 2, 4
"""Pictures that a Fréchet distance and its floor need."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A picture beside its reconstructions, all of one size, in the order of the contenders."""

    name: str
    original: Image.Image
    images: list[Image.Image]
    measures: list[Measures]

    @property
    def psnr(self) -> float:
        """Mean PSNR of the reconstructions in dB."""
        return mean(self.measures).psnr


@dataclass(frozen=True, kw_only=True)
class OwnDistance:
    """Fréchet distance of CLIP's features of originals and reconstructions."""

    distance: float
    floor: float | None
    """Distance of two halves of the originals; None for fewer than 4 pictures."""
    n: int
    """Pictures on each side."""
    note: str | None
    """What is to be said of so few pictures."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What was found of one contender."""

    contender: Contender
    measures: list[Measures]
    """Of each picture."""
    mean: Measures
    rates: Rates
    tokens: Tensor
    """int32 (N,Y,X) of all pictures."""
    n_cut: int
    """Captions that were longer than the transformer reads."""
    distance: OwnDistance | None
    """None without a CLIP, or for a single picture."""


@dataclass
class _Kept:
    """What is kept of one contender while pictures go by."""

    measures: list[Measures] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    n_cut: int = 0
    features: list[Tensor] = field(default_factory=list)


class Comparison:
    """Contenders, and what was found so far.

    Args:
        contenders: at least one.
        clip: computes the features of the Fréchet distance; None for no distance.
    """

    def __init__(self, contenders: Sequence[Contender], *, clip: CLIP | None = None) -> None:
        self.contenders = list(contenders)
        self.size = max(contender.size for contender in contenders)
        """Side in pixels at which reconstructions are measured and shown."""
        self.names: list[str] = []
        """Of the pictures so far."""
        self.n_captions = 0
        """Pictures with a caption so far."""
        self._worst: list[tuple[float, int, Compared]] = []
        self._numbers = itertools.count(0, -1)  # settle ties, which pictures cannot; the first of equal ones is kept
        self._clip = clip
        self._features: list[Tensor] = []
        self._kept = [_Kept() for _ in contenders]

    @torch.no_grad()
    def add(self, batch: Sequence[tuple[str, Image.Image]], captions: Mapping[str, str]) -> list[Compared]:
        """Reconstruct and measure some pictures.

        Args:
            batch: names and pictures of any size.
            captions: of those that have one, by name.
        """
        originals = [resize_and_crop(image, self.size) for _, image in batch]
        originals_BCHW = torch.stack([to_tensor(image) for image in originals])
        given = [captions.get(name) for name, _ in batch]
        drawn = [
            self._reconstructed(contender, kept, batch, originals, originals_BCHW, given)
            for contender, kept in zip(self.contenders, self._kept, strict=True)
        ]
        self.names += [name for name, _ in batch]
        self.n_captions += sum(caption is not None for caption in given)
        if self._clip is not None:
            self._features.append(embed_images(self._clip, originals_BCHW).cpu())
        measures = [kept.measures[-len(batch) :] for kept in self._kept]
        compared = [
            Compared(
                name=name,
                original=originals[i],
                images=[images[i] for images in drawn],
                measures=[each[i] for each in measures],
            )
            for i, (name, _) in enumerate(batch)
        ]
        for one in compared:
            heapq.heappush(self._worst, (-one.psnr, next(self._numbers), one))
            if len(self._worst) > WORST:
                heapq.heappop(self._worst)
        return compared

    @property
    def worst(self) -> list[Compared]:
        """The pictures with the lowest mean PSNR so far, the worst one first, `WORST` at most."""
        return [one for _, _, one in sorted(self._worst, reverse=True)]

    def _reconstructed(
        self,
        contender: Contender,
        kept: _Kept,
        batch: Sequence[tuple[str, Image.Image]],
        originals: list[Image.Image],
        originals_BCHW: Tensor,
        captions: list[str | None],
    ) -> list[Image.Image]:
        """Return what a contender makes of a batch, enlarged to the common size; keep what is measured of it."""
        codec, size = contender.codec, contender.size
        seen = originals if size == self.size else [resize_and_crop(image, size) for _, image in batch]
        tokens_BYX = codec.encode(torch.stack([to_tensor(image) for image in seen]).to(contender.device))
        images = [to_image(image) for image in codec.decode(tokens_BYX)]
        if size != self.size:
            images = [image.resize((self.size, self.size), Image.Resampling.LANCZOS) for image in images]
        decoded_BCHW = torch.stack([to_tensor(image) for image in images])
        bits = bits_per_pixel(contender.n_tokens, codec.config.vocab_size, self.size**2)
        kept.measures += measured(originals_BCHW, decoded_BCHW, tokens_BYX, bits)
        kept.tokens.append(tokens_BYX.to("cpu", torch.int32))
        if contender.prior is not None:
            nats, n_cut = nats_of(contender.prior, tokens_BYX, captions)
            kept.nats += nats
            kept.n_cut += n_cut
        if self._clip is not None:
            kept.features.append(embed_images(self._clip, decoded_BCHW).cpu())
        return images

    def standings(self) -> list[Standing]:
        """Return what was found, in the order of the contenders.

        Raises:
            ValueError: no picture was compared.
        """
        if not self.names:
            raise ValueError("no pictures were compared: give at least one")
        found = []
        for contender, kept in zip(self.contenders, self._kept, strict=True):
            tokens = torch.cat(kept.tokens)
            found.append(
                Standing(
                    contender=contender,
                    measures=kept.measures,
                    mean=mean(kept.measures),
                    rates=rates(tokens, contender.codec.config.vocab_size, kept.nats),
                    tokens=tokens,
                    n_cut=kept.n_cut,
                    distance=_distance(self._features, kept.features),
                )
            )
        return found


def _distance(originals: list[Tensor], decoded: list[Tensor]) -> OwnDistance | None:
    """Return the distance of features, (B,E) for each batch; None where there are too few pictures for one."""
    n = sum(len(features_BE) for features_BE in originals)
    if n < LEAST_FOR_DISTANCE:
        return None
    originals_NE, decoded_NE = torch.cat(originals), torch.cat(decoded)
    return OwnDistance(
        distance=frechet_distance_of_features(originals_NE, decoded_NE),
        floor=floor(originals_NE).distance if n >= LEAST_FOR_FLOOR else None,
        n=n,
        note=singular_note(n, originals_NE.shape[1]),
    )
