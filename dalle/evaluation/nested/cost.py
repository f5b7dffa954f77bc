"""What a run will cost, told before it begins: multiplications, hours and disk; and better, from its first shard.

Letters: M candidates of a caption  J values of N  K kept candidates
"""

import time
from dataclasses import dataclass

import torch

from dalle.budget import scoring_products
from dalle.data.bundle import DTYPES, Precision
from dalle.evaluation.nested.sample import token_type
from dalle.evaluation.nested.settings import NestedSettings
from dalle.family.transformers import Transformer, n_step_weights
from dalle.output.text import GIB, counted, duration
from dvae.codec import Codec
from rerank import CLIP

SIDE, PRODUCTS = 1024, 3
"""Of the matrices whose product tells a device's speed, and how many products are timed."""
USED_SHARE = 0.4
"""Part of that speed which sampling reaches: a round number, replaced by what the first shard shows."""
PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a run."""

    captions: int
    candidates: int
    """Of all captions together."""
    operations: float
    """FLOP of sampling, decoding and scoring; 2 for a multiplication with a weight. Attention's own are left out."""
    disk: int
    """Bytes of the shards."""

    def hours(self, operations_per_s: float) -> float:
        """Return the hours at a sustained speed."""
        return self.operations / operations_per_s / PER_HOUR

    def text(self, operations_per_s: float, device: str) -> str:
        """Return the cost in words.

        Args:
            operations_per_s: of matrix products on the device.
            device: its name.
        """
        speed = USED_SHARE * operations_per_s
        took = self.hours(speed)
        here = duration(took * PER_HOUR) if took < 48 else f"{took:,.0f} hours"
        paper = ", ".join(f"{self.hours(tera * 1e12):,.1f} h at {tera}" for tera in (160, 400))
        return (
            f"{counted(self.captions, 'caption')} × {self.candidates // self.captions:,} = "
            f"{counted(self.candidates, 'candidate')}: {self.operations:.1e} FLOP, about {here} on {device} (matrix "
            f"products at {operations_per_s / 1e12:.3g} TFLOP/s, {USED_SHARE:.0%} of it used); {paper} TFLOP/s "
            f"sustained; {self.disk / GIB:.2f} GiB of shards"
        )


def cost_of(
    dalle: Transformer,
    dvae: Codec,
    clip: CLIP,
    settings: NestedSettings,
    n_captions: int,
    *,
    judge: CLIP | None = None,
    is_checked: bool = False,
    n_features: int = 0,
    n_radii: int = 1,
) -> Cost:
    """Return the cost of a run.

    Args:
        dalle: the transformer, which may be on the meta device.
        dvae: decodes.
        clip: ranks.
        settings: of the run.
        n_captions: how many captions.
        judge: another CLIP.
        is_checked: whether a checker looks at every candidate.
        n_features: of a network, for each pick; 0 without one.
        n_radii: of the blur.
    """
    config, m = dalle.config, settings.m
    sampling = config.stream.n_image * n_step_weights(dalle) * (2 if settings.sampling.is_guided else 1)
    scoring = sum(scoring_products(one) for one in (clip, judge) if one is not None)
    n_candidates = n_captions * m
    n_picks = len(settings.best_of)
    n_kept = n_picks + (settings.pictures if settings.pictures > 1 else 0)
    judging = clip if judge is None else judge
    row = m * (8 + (4 if judge is not None else 0) + (1 if is_checked else 0))
    row += n_kept * (4 + config.stream.n_image * token_type(config.image_vocab).itemsize)
    row += 4 * judging.config.embed_dim * (n_picks + 1) + 4 * n_features * (n_picks + n_radii - 1)
    return Cost(
        captions=n_captions,
        candidates=n_candidates,
        operations=2.0 * n_candidates * (sampling + dvae.decoding_products(config.grid) + scoring),
        disk=n_captions * row,
    )


def matrix_speed(device: torch.device, precision: Precision) -> float:
    """Return how many FLOP a second a device does in matrix products, by a trial that takes a moment."""
    matrix = torch.ones(SIDE, SIDE, dtype=DTYPES[precision], device=device)

    def timed(n: int) -> float:
        begun = time.perf_counter()
        for _ in range(n):
            product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        return time.perf_counter() - begun

    timed(1)
    return 2.0 * SIDE**3 * PRODUCTS / timed(PRODUCTS)
