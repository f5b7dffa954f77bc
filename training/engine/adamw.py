"""AdamW with the paper's bound on the running variance (Ramesh et al. 2021, B.2)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class VarianceClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the running variance by value before it uses and keeps it.

    Skips a step if `found_inf`, a 0-d tensor that the caller may set as for torch's own fused AdamW, is 1.

    Args:
        groups: parameter groups, as AdamW takes them.
        variance_clip: maximum of the running variance, before the correction of its bias.
        **settings: AdamW's.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], *, variance_clip: float, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.variance_clip = variance_clip

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives a closure
        """Take a step for the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        mean, variance, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
        applied: float | Tensor = 1.0
        square = gradient.square()
        if self.found_inf is not None:  # moments that move towards themselves do not change, bit for bit
            is_skipped = self.found_inf.to(weight.device).bool()
            applied = (~is_skipped).float()
            gradient = torch.where(is_skipped, mean, gradient)
            square = torch.where(is_skipped, variance, square)
        state["step"] = state["step"].to(weight.device)  # where torch's load_state_dict leaves it on the CPU
        state["step"] += applied
        mean.lerp_(gradient, 1 - beta1)
        variance.lerp_(square, 1 - beta2).clamp_(max=self.variance_clip)
        n = state["step"].clamp(min=1)
        spread = (variance / (1 - beta2**n)).sqrt_().add_(group["eps"])
        weight.mul_(1 - applied * group["lr"] * group["weight_decay"])
        weight.sub_(mean / spread * (applied * group["lr"] / (1 - beta1**n)))
