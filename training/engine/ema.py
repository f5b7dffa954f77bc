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
        weights: the tensors to start from, which are copied.
        decay: weight of the old average in one update, in [0, 1).
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], applied: int | Tensor = 1) -> None:
        """Move the average by 1 − decay towards `weights`; leave it as it is if `applied` is 0.

        `applied` may be a 0-d tensor; nothing waits for its device.
        """
        names = list(self.average)
        averages = [self.average[name] for name in names]
        current = [weights[name].detach().to(self.average[name]) for name in names]
        if isinstance(applied, Tensor):
            for average, weight in zip(averages, current, strict=True):
                average.lerp_(weight, (1.0 - self.decay) * applied)
        elif applied:
            torch._foreach_lerp_(averages, current, 1.0 - self.decay)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Replace the average by a saved one.

        Raises:
            ValueError: the names or shapes are not this model's.
        """
        if {n: t.shape for n, t in average.items()} != {n: t.shape for n, t in self.average.items()}:
            raise ValueError(
                "the averaged weights of the checkpoint are of another model: resume with the recipe it was made with"
            )
        for name, tensor in average.items():
            self.average[name].copy_(tensor)
