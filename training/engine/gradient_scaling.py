"""Per-resblock gradient scaling: float16 in residual branches, without lost gradients (Ramesh et al. 2021, 2.4, D).

Float16 has five bits of exponent. Going back through the layers, gradients shrink until they are below the smallest
float16, 6e-8, and one scale of the loss cannot serve both the last layers and the first. So every residual branch,
"resblock" in the paper (two per layer: attention and MLP), has a scale of its own (figure 4):

    forward    x float32 ─┬─ normalise ─ to float16 ─ branch ─ to float32 ─ + ─>
                          └───────────────────────── identity, float32 ────┘
    backward   of the branch: gradient float32 ─ scale & filter ─ to float16 ─ branch ─ to float32 ─ unscale & filter ─>

A filter sets infinities and NaNs to 0, or an overflow in one branch would lower the scales of all branches before it.
The gradients of a branch's parameters come out scaled. They are checked, then divided by the scale; if one is not
finite, all ranks skip the step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.family.blocks import Block
from dalle.model import DALLE
from training.ranks.ranks import Ranks

INITIAL_SCALE, MIN_SCALE, MAX_SCALE = 2.0**13, 2.0**7, 2.0**24
"""Scales of one rank; the paper multiplies them by the number of ranks."""
GROWTH = 2.0 ** (1 / 1000)
"""Factor of a scale after an update with finite gradients of that resblock."""
SHRINKAGE = math.sqrt(2.0)
"""Divisor of a scale after an update with a gradient of that resblock that is not finite."""
MIN_INTERVAL = 125
"""Updates within which the same scale is divided at most once."""


class ResblockScales:
    """The paper's rules for the scales, one per resblock.

    Args:
        n_resblocks: number of resblocks.
        n_ranks: M, the number of data-parallel ranks; scales start at M·2¹³ and stay within M·2⁷ … M·2²⁴.
    """

    def __init__(self, n_resblocks: int, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.values = [INITIAL_SCALE * n_ranks] * n_resblocks
        self._n_updates = 0
        self._divided_at: list[int | None] = [None] * n_resblocks
        """The update that last divided a scale."""

    def update(self, are_finite: Sequence[bool]) -> None:
        """Move the scales after an update, applied or skipped.

        Args:
            are_finite: whether all gradients of a resblock were finite, for each resblock.
        """
        for index, is_finite in enumerate(are_finite):
            if is_finite:
                self._set(index, self.values[index] * GROWTH)
            elif self._may_divide(index):
                self._set(index, self.values[index] / SHRINKAGE)
                self._divided_at[index] = self._n_updates
        self._n_updates += 1

    def can_fall(self, are_finite: Sequence[bool]) -> bool:
        """Return whether a scale whose resblock was not finite is above the lowest one."""
        lowest = MIN_SCALE * self.n_ranks
        return any(value > lowest and not finite for value, finite in zip(self.values, are_finite, strict=True))

    def _may_divide(self, index: int) -> bool:
        divided_at = self._divided_at[index]
        return divided_at is None or self._n_updates - divided_at >= MIN_INTERVAL

    def _set(self, index: int, value: float) -> None:
        self.values[index] = min(max(value, MIN_SCALE * self.n_ranks), MAX_SCALE * self.n_ranks)

    def state(self) -> dict[str, Any]:
        """Return the state for `load_state`, in numbers and lists."""
        return {
            "n_ranks": self.n_ranks,
            "values": list(self.values),
            "n_updates": self._n_updates,
            "divided_at": list(self._divided_at),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; at another number of ranks, scales change in proportion.

        Raises:
            ValueError: it is damaged, or of another number of resblocks.
        """
        try:
            ranks, updates = int(state["n_ranks"]), int(state["n_updates"])
            values = [float(value) for value in state["values"]]
            divided_at = [None if at is None else int(at) for at in state["divided_at"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the gradient scales of the checkpoint are damaged ({error})") from None
        n = len(self.values)
        if len(values) != n or len(divided_at) != n:
            raise ValueError(f"the checkpoint has gradient scales of {len(values)} resblocks, the model has {n}")
        if ranks < 1 or not all(MIN_SCALE <= value / ranks <= MAX_SCALE for value in values):
            raise ValueError(f"the gradient scales of the checkpoint are damaged: {ranks} ranks and scales {values}")
        self.values = [value * self.n_ranks / ranks for value in values]
        self._n_updates, self._divided_at = updates, divided_at


class Float16Branch:
    """A residual branch that runs in float16; its input and output are float32 (figure 4 of the paper).

    Args:
        branch: the residual branch.
        factor: of the gradients within the branch, a float32 scalar; None for unscaled gradients.
    """

    def __init__(self, branch: Callable[..., Tensor], factor: Tensor | None) -> None:
        self._branch, self._factor = branch, factor

    def __call__(self, h_BSD: Tensor, *arguments: object) -> Tensor:
        """Return the branch's output in float32, (B, S, D)."""
        # Deviation: weights, their gradients and Adam's moments are float32; the paper keeps them in 16 bits.
        if self._factor is None:
            with torch.autocast(h_BSD.device.type, dtype=torch.float16):
                return self._branch(h_BSD, *arguments).float()
        start = cast("Callable[..., Tensor]", _StartOfBranch.apply)
        end = cast("Callable[..., Tensor]", _EndOfBranch.apply)
        with torch.autocast(h_BSD.device.type, dtype=torch.float16):
            output = self._branch(start(h_BSD, self._factor), *arguments)
        return end(output, self._factor)


class _StartOfBranch(torch.autograd.Function):
    """Nothing forward; backward, where the gradient leaves the branch, unscale & filter."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: Tensor) -> Tensor:
        """Return `h`."""
        ctx.save_for_backward(factor)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for the identity path."""
        (factor,) = ctx.saved_tensors
        return _filtered(gradient.float() / factor), None


class _EndOfBranch(torch.autograd.Function):
    """To float32 forward; backward, where the gradient enters the branch, scale & filter and to float16."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, factor: Tensor) -> Tensor:
        """Return `output` in float32."""
        ctx.save_for_backward(factor)
        ctx.dtype = output.dtype
        return output.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for the branch."""
        (factor,) = ctx.saved_tensors
        return _filtered(gradient * factor).to(ctx.dtype), None


def _filtered(gradient: Tensor) -> Tensor:
    """Return a gradient with 0 in place of infinities and NaNs."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def resblock_parameters(model: DALLE) -> list[list[str]]:
    """Return the names of each resblock's parameters, normalisation included: attention and MLP of every layer."""
    names = [name for name, _ in model.named_parameters()]
    prefixes = [f"blocks.{layer}.{part}" for layer in range(len(model.blocks)) for part in ("attention", "mlp")]
    return [[name for name in names if name.startswith((f"{prefix}.", f"{prefix}_norm."))] for prefix in prefixes]


class ResblockScaling:
    """The scales of a model's residual branches: multiplied in during the backward pass, divided out of the gradients.

    M, the number of ranks, enters the paper's scales because its loss is divided by the batch of all ranks.
    Deviation: a rank's loss is the mean over its own samples, M times the paper's, and the mean over ranks is taken of
    gradients. So branches are scaled by the scale ÷ M, and float16 holds the same numbers as in the paper.

    Args:
        model: its residual branches run in float16 from now on.
        ranks: the ranks.
    """

    def __init__(self, model: DALLE, ranks: Ranks) -> None:
        self._names, self._ranks = resblock_parameters(model), ranks
        self.rules = ResblockScales(len(self._names), ranks.size)
        self.overflowed = False
        """Whether a gradient of the last step was not finite, and its resblock's scale has room to fall."""
        self._factors = torch.empty(len(self._names), device=ranks.device)
        self._apply()
        _run_branches(model, list(self._factors.unbind()))

    @torch.no_grad()
    def unscale_(self, gradients: Mapping[str, Tensor]) -> None:
        """Divide the gradients of every resblock by its scale, in place, then move the scales. Collective.

        Call it once per optimizer step, before the mean over ranks. Gradients that are not finite stay so.

        Args:
            gradients: by the names of the model's parameters.
        """
        finite = torch.stack([_all_finite([gradients[name] for name in names]) for names in self._names]).float()
        if self._ranks.size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        for names, factor in zip(self._names, self._factors, strict=True):
            for name in names:
                gradients[name].div_(factor)
        are_finite = [value > 0 for value in finite.tolist()]
        self.overflowed = self.rules.can_fall(are_finite)
        self.rules.update(are_finite)
        self._apply()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `rules.state()`.

        Raises:
            ValueError: it is damaged, or of another model.
        """
        self.rules.load_state(state)
        self._apply()

    def _apply(self) -> None:
        """Use the scales in the next forward and backward passes."""
        factors = torch.tensor([value / self._ranks.size for value in self.rules.values])
        self._factors.copy_(factors, non_blocking=True)


def run_in_float16(model: nn.Module) -> None:
    """Run a model's residual branches in float16 from now on, unscaled.

    Raises:
        ValueError: it is not the transformer.
    """
    transformer = require_transformer(model)
    _run_branches(transformer, [None] * (2 * len(transformer.blocks)))


def require_transformer(model: nn.Module) -> DALLE:
    """Return the model with its type.

    Raises:
        ValueError: it is not the transformer.
    """
    if not isinstance(model, DALLE):
        raise ValueError("precision autocast-fp16 is the transformer's alone: use fp32, autocast or bf16 here")
    return model


def _run_branches(model: DALLE, factors: Sequence[Tensor | None]) -> None:
    """Replace the residual branches of a model by float16 ones, with a factor for each."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for block, attention, mlp in zip(blocks, factors[::2], factors[1::2], strict=True):
        # the methods of the class, in case the model's branches were replaced before
        block.attention_branch = Float16Branch(partial(Block.attention_branch, block), attention)  # type: ignore[assignment, method-assign]
        block.mlp_branch = Float16Branch(partial(Block.mlp_branch, block), mlp)  # type: ignore[method-assign]


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
