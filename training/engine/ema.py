"""Averaged weights: the exponential moving average that is exported.

It is updated after every optimizer step of the dVAE (Ramesh et al. 2021, A.2) and after every 25th of the transformer
(B.2).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """An exponential moving average of named tensors, in float32.

    Args:
        weights: the tensors to start from; they are copied.
        decay: weight of the old average in one update, in [0, 1).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], taken: int | Tensor = 1) -> None:
        """Move the average a step of 1 − decay towards `weights`, or not at all where `taken` is 0.

        As a 0-d tensor `taken` stays on its device: nothing waits for it.
        """
        names = list(self.average)
        averages = [self.average[name] for name in names]
        current = [weights[name].detach().to(self.average[name]) for name in names]
        if isinstance(taken, Tensor):
            for average, weight in zip(averages, current, strict=True):
                average.lerp_(weight, (1.0 - self.decay) * taken)
        elif taken:
            torch._foreach_lerp_(averages, current, 1.0 - self.decay)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Take over a saved average.

        Raises:
            ValueError: the names or shapes are not this model's.
        """
        if {n: t.shape for n, t in average.items()} != {n: t.shape for n, t in self.average.items()}:
            raise ValueError(
                "the averaged weights of the checkpoint are of another model: resume with the recipe it was made with"
            )
        for name, tensor in average.items():
            self.average[name].copy_(tensor)
