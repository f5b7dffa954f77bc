"""The optimizer of a run: AdamW, if asked for with the paper's bound on the running variance (B.2), or Muon beside it.

Which parameters decay is decided here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.engine.muon import MuonAdamW, block_matrices
from training.ranks.ranks import Ranks


def decay_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW: matrices and convolutions decay; gains, biases and embeddings do not.

    The paper does not say which parameters are exempt; it lists "gains, biases, embeddings, and unembeddings" as the
    special ones (D). Matrices for Muon are in no group.
    """
    muon = {id(matrix) for matrix in block_matrices(model)} if optimizer.kind == "muon" else set()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if id(parameter) in muon:
            continue
        is_exempt = parameter.ndim < 2 or id(parameter) in embeddings or "embedding" in name
        (exempt if is_exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, learning_rate: float, ranks: Ranks
) -> torch.optim.AdamW | MuonAdamW:
    """Return the optimizer of a model's parameters, for any device.

    Raises:
        ValueError: the model has no matrices for Muon.
    """
    adamw = _build_adamw(model, optimizer, learning_rate)
    if optimizer.kind == "adamw":
        return adamw
    return MuonAdamW(
        adamw,
        block_matrices(model),
        momentum=optimizer.momentum,
        learning_rate=learning_rate,
        weight_decay=optimizer.weight_decay,
        ranks=ranks,
    )


def _build_adamw(model: nn.Module, optimizer: OptimizerConfig, learning_rate: float) -> torch.optim.AdamW:
    groups = decay_groups(model, optimizer)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": optimizer.betas, "eps": optimizer.eps}
    if optimizer.variance_clip is not None:
        return VarianceClippedAdamW(groups, variance_clip=optimizer.variance_clip, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


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


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return an optimizer's settings, for each group of parameters; `optimizer` may be DeepSpeed's."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_settings(optimizer: Any, settings: Iterable[Mapping[str, Any]], gradient_clipping: float) -> None:
    """Restore this run's settings, which loading a checkpoint overwrote."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if hasattr(optimizer, "clip_grad"):
        optimizer.clip_grad = gradient_clipping
    for parameter, state in getattr(optimizer, "optimizer", optimizer).state.items():
        if isinstance(state.get("step"), Tensor):  # torch leaves it on the CPU if the file's group was not fused
            state["step"] = state["step"].to(parameter.device)
