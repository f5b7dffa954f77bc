"""How right the demonstration's samples are: drawn for captions of every kind, ranked in every way, checked.

Legend: P captions  N candidates of each  I image tokens  R rankings
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dalle.best_of_n import rank_order
from dalle.output.sheets import Section, contact_sheet
from dalle.output.text import Say, aligned
from dalle.pipeline import Pipeline
from dalle.sampling import Ranking
from dvae.images import to_image
from rerank import score
from training.drawings.shape_checker import check
from training.drawings.shapes import Split, caption, random_scene
from training.report.curves import save_panels

CANDIDATES = 16
CAPTIONS_PER_SPLIT = 64
CAPTIONS_AT_ONCE = 8
FIGURE_SPLIT: Split = "pair"
FIGURE_CANDIDATES, FIGURE_CAPTIONS = 64, 32
"""Of the curve along N (figure 9c of the paper), for the captions that are hardest: where nearly every candidate is
right, there is nothing to choose. Sampling them takes a minute."""
SHEET_CAPTIONS, SHEET_PICTURES = 2, 4
"""Captions of each kind on the sheet, and pictures of each."""
RIGHT, WRONG = "#1a8a3a", "#d02020"
"""Colours of the marks on the sheet."""
SPLITS: dict[Split, str] = {
    "trained": "trained combinations",
    "relation": "held out: two things never seen in this relation",
    "pair": "held out: colour and shape never seen together",
}
ORACLE = "oracle"
"""The name of a reranker that never errs: one right candidate is enough."""
RANKINGS = (*get_args(Ranking), ORACLE)
HEADS = {"clip": "CLIP", "likelihood": "likelihood", "both": "both", ORACLE: "any of N"}


@dataclass(frozen=True, kw_only=True)
class CheckedSamples:
    """Candidates of captions of one kind."""

    split: Split
    captions: list[str]
    """P captions."""
    right: NDArray[np.bool_]
    """(P, N): whether the checker accepts each candidate."""
    scores: Tensor
    """float32 (P, N): CLIP's cosines."""
    log_likelihoods: Tensor
    """float32 (P, N), nats: see `Samples`."""

    def share_right(self, ranking: str, n: int) -> float:
        """Return the fraction of captions whose best of n candidates is right.

        It is the mean over all N // n groups of n candidates that do not overlap.

        Args:
            ranking: a `Ranking`, or "oracle" for a reranker that never errs.
            n: candidates to choose from, 1 to N.
        """
        n_captions, n_candidates = self.right.shape
        rights = []
        for p in range(n_captions):
            for first in range(0, n_candidates - n + 1, n):
                group = slice(first, first + n)
                if ranking == ORACLE:
                    rights.append(bool(self.right[p, group].any()))
                else:
                    order = rank_order(self.scores[p, group], self.log_likelihoods[p, group], ranking)  # type: ignore[arg-type]
                    rights.append(bool(self.right[p, first + int(order[0])]))
        return float(np.mean(rights))

    def curve(self, ranking: str) -> dict[int, float]:
        """Return the fraction right at best of 1, 2, 4 … N."""
        ns = [2**power for power in range(int(math.log2(self.right.shape[1])) + 1)]
        return {n: self.share_right(ranking, n) for n in ns}


def different_captions(split: Split, count: int, *, share_of_three: float) -> list[str]:
    """Return captions of scenes of one kind, no two the same; always the same ones."""
    rng = np.random.default_rng(np.random.SeedSequence((7, list(SPLITS).index(split))))
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions.setdefault(caption(random_scene(rng, split=split, share_of_three=share_of_three), rng))
    return list(captions)


def check_samples(
    pipe: Pipeline, split: Split, captions: Sequence[str], say: Say, *, n: int = CANDIDATES
) -> tuple[CheckedSamples, list[Section]]:
    """Sample captions of one kind as the bundle does by default, and let the checker decide.

    Returns:
        What was found, and the best pictures of the first captions, by the bundle's ranking, each marked.
    """
    rights: list[list[bool]] = []
    scores: list[Tensor] = []
    log_likelihoods: list[Tensor] = []
    sections: list[Section] = []
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        group = list(captions[start : start + CAPTIONS_AT_ONCE])
        samples = pipe.sample_tokens(group, n)
        for told, tokens, likelihoods in zip(group, samples.tokens, samples.log_likelihoods, strict=True):
            images = pipe.decode(tokens)
            scores.append(score(pipe.clip, [told], images)[0].cpu())
            log_likelihoods.append(likelihoods)
            pictures = [to_image(image) for image in images]
            rights.append([check(picture, told).right for picture in pictures])
            if len(sections) < SHEET_CAPTIONS:
                order = rank_order(scores[-1], likelihoods, pipe.defaults.rank)
                sections.append(
                    marked_section(f"{SPLITS[split]}: {told}", pictures, rights[-1], order[:SHEET_PICTURES].tolist())
                )
        say(f"{SPLITS[split]}: checked {min(start + CAPTIONS_AT_ONCE, len(captions))}/{len(captions)} captions")
    checked = CheckedSamples(
        split=split,
        captions=list(captions),
        right=np.asarray(rights),
        scores=torch.stack(scores),
        log_likelihoods=torch.stack(log_likelihoods),
    )
    return checked, sections


def marked_section(
    heading: str, pictures: Sequence[Image.Image], right: Sequence[bool], best: Sequence[int]
) -> Section:
    """Return a part of a sheet: the `best` of some pictures, by their numbers, each marked as right or wrong."""
    return Section(
        heading,
        [pictures[k] for k in best],
        ["right" if right[k] else "wrong" for k in best],
        [RIGHT if right[k] else WRONG for k in best],
    )


def samples_sheet(sections: Sequence[Section], pipe: Pipeline) -> Image.Image:
    """Return the pictures of all kinds on one sheet."""
    title = f"best {SHEET_PICTURES} of {CANDIDATES}: {pipe.defaults}"
    return contact_sheet(sections, title=title, columns=SHEET_PICTURES)


def table_of(samples: Sequence[CheckedSamples]) -> str:
    """Return the fractions right as two aligned tables: by ranking at best of N, and along best of 1, 2, 4 … N."""
    n = samples[0].right.shape[1]
    heads = [HEADS[ranking] for ranking in RANKINGS]
    rows = [["right by the checker", "captions", "best of 1", f"best of {n} by:", *heads]]
    for checked in samples:
        shares = [f"{checked.share_right(ranking, n):.1%}" for ranking in RANKINGS]
        rows.append([SPLITS[checked.split], str(len(checked.captions)), f"{checked.right.mean():.1%}", "", *shares])
    curves = [line for checked in samples for line in [[], *_curve_rows(checked, SPLITS[checked.split])]]
    return f"{aligned(rows, '<>')}\n{aligned(curves, '<>')}"


def figure_of(checked: CheckedSamples) -> str:
    """Return the fractions right along best of 1, 2, 4 … N as aligned lines: the paper's figure 9c for this world."""
    title = f"best of N, as in figure 9c of the paper: {len(checked.captions)} captions, {SPLITS[checked.split]}"
    return f"{title}\n{aligned(_curve_rows(checked, ''), '<>')}"


def _curve_rows(checked: CheckedSamples, title: str) -> list[list[str]]:
    heads = [title, *(f"best of {k}" for k in checked.curve(ORACLE))]
    return [heads, *([f"  {HEADS[r]}", *(f"{share:.1%}" for share in checked.curve(r).values())] for r in RANKINGS)]


def draw_curves(samples: Sequence[CheckedSamples], path: Path) -> None:
    """Draw the fraction right at best of N, a panel for each kind and a line for each ranking, as a PNG.

    Raises:
        OSError: it cannot be written.
    """
    panels = {
        f"{SPLITS[checked.split]}\nbest of up to {checked.right.shape[1]}": {
            HEADS[ranking]: [(k, 100 * share) for k, share in checked.curve(ranking).items()] for ranking in RANKINGS
        }
        for checked in samples
    }
    save_panels(panels, path, x_label="best of N", y_label="right, %", legend="ranked by")


def summary(samples: Sequence[CheckedSamples]) -> list[dict[str, object]]:
    """Return the same numbers for a JSON file: by kind and ranking, the fraction right at best of each N."""
    return [
        {
            "split": checked.split,
            "captions": len(checked.captions),
            "right": {ranking: checked.curve(ranking) for ranking in RANKINGS},
        }
        for checked in samples
    ]
