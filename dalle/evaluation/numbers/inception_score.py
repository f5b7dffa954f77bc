"""Inception Score: exp of the mean divergence of each picture's classes from those of all (Salimans et al. 2016).

Letters: N pictures  K classes
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.numbers.moments import checked_features


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over splits."""

    mean: float
    std: float
    """Of the splits, divided by their number; not an error of the mean."""
    splits: int


def inception_score(logits: Tensor, *, splits: int = 10) -> InceptionScore:
    """Return the Inception Score of consecutive splits, in the order of the pictures: from 1 to K.

    Whether the logits have the last layer's bias makes two variants, which are not comparable: name it.

    Args:
        logits: (N,K) of a classifier.
        splits: their number; split i has the pictures from i·N/splits on, rounded down.

    Raises:
        ValueError: there are fewer pictures than splits, or the logits are no (N,K) of finite numbers.
    """
    logits_NK = checked_features(logits, "the logits")
    n = len(logits_NK)
    if not 1 <= splits <= n:
        raise ValueError(f"{splits} splits of {n} pictures; expected at least one picture in each")
    scores = []
    for split in range(splits):
        log_p = logits_NK[split * n // splits : (split + 1) * n // splits].log_softmax(dim=1)
        p = log_p.exp()
        divergences = (p * log_p).sum(dim=1) + torch.special.entr(p.mean(dim=0)).sum()
        scores.append(float(divergences.mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), splits)
