"""Muon for the matrices of the blocks, AdamW for everything else: one optimizer at every ZeRO stage.

A convolution is a matrix too: a row for each channel that it makes.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a matrix's gradient and
replaces it by the nearest orthogonal matrix, about, in five Newton-Schulz iterations. Its update is scaled to the RMS
of AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2), so that both share one learning rate and
one weight decay. The arithmetic is that of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`.

ZeRO hands a rank pieces of matrices, cut wherever the equal parts of a flat buffer end. Momentum and weight decay are
element by element, and stay on the pieces. The update is put together on one rank, which orthogonalises it, and sends
it to all. So every matrix is orthogonalised once in a step, whatever the number of ranks, and a rank holds two whole
matrices at a time, not a model. On a GPU all that is in bfloat16, as torch's iterations are. On a CPU it is in float32:
torch's bfloat16 products take there, without instructions for them, 20 to 60 times as long.

DeepSpeed 0.19.8 is pinned: `matrices_of` reads how it lays out the pieces. Why its own Muon is not used is in
docs/design.md.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import _muon

from training.ranks.ranks import Ranks

RMS_OF_ADAMW = 0.2
"""RMS of AdamW's updates, about, in units of the learning rate (Liu et al. 2025, section 2.2)."""

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
"""Type of a whole matrix, by the device it is orthogonalised on."""


LISTS_OF_BLOCKS = ("blocks", "down", "middle", "up")
"""Names of the module lists in which Muon's matrices are."""


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear layers and convolutions within the model's blocks.

    These are the module lists called `blocks` of a transformer and of CLIP's towers, and a U-Net's `down`, `middle` and
    `up`: without embeddings, heads and projections outside of them, which are not for Muon.

    Raises:
        ValueError: the model has no blocks, as the dVAE.
    """
    found = [
        layer.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LISTS_OF_BLOCKS
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if not found:
        raise ValueError(
            f"optimizer muon is for the matrices of a transformer's or a U-Net's blocks, and {type(model).__name__} "
            "has none: use --optimizer adamw here"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix that Muon updates, and the piece of it that this rank holds: consecutive elements, or none."""

    shape: tuple[int, int]
    """Rows and columns of the whole."""
    begin: int
    """The first element of the piece, within the matrix."""
    size: int
    """Elements of the piece."""
    offset: int
    """Where the piece begins in the tensor that the optimizer was given."""

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return self.shape[0] * self.shape[1]

    def piece(self, flat: Tensor) -> Tensor:
        """Return the piece, as a view of the tensor it lies in or of one laid out like that."""
        return flat.reshape(-1)[self.offset : self.offset + self.size]

    def of_whole(self, whole: Tensor) -> Tensor:
        """Return the elements of the piece in a whole matrix."""
        return whole.view(-1)[self.begin : self.begin + self.size]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups of parameters that have a `momentum`, an AdamW for the others.

    Skips a step if `found_inf`, a 0-d tensor that the caller may set as for torch's own fused AdamW, is 1.
    Collective: all ranks take the same steps.

    Args:
        adamw: the optimizer of the other parameters. This one takes over its groups and its state.
        matrices: parameters of 2 or more dimensions, of which the first are the rows.
        momentum: decay of the running mean of the gradients, Nesterov's.
        learning_rate: of all groups.
        weight_decay: decoupled; each step shrinks the matrices by learning rate × this.
        ranks: the ranks.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        adamw: torch.optim.AdamW,
        matrices: Iterable[Tensor],
        *,
        momentum: float,
        learning_rate: float,
        weight_decay: float,
        ranks: Ranks,
    ) -> None:
        muon = {"params": list(matrices), "lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([*adamw.param_groups, muon], {})
        self._adamw, self._ranks = adamw, ranks
        self._matrices: dict[Tensor, list[Matrix]] = {}
        """The matrices in each tensor that ZeRO put in the parameters' place; empty without ZeRO."""

    def place(self, zero: Any) -> None:
        """Read from DeepSpeed's ZeRO optimizer, which now owns this one, where its matrices are."""
        self._matrices = matrices_of(zero, self._ranks)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody gives a closure
        """Take a step for the parameters that have a gradient."""
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.state, self._adamw.found_inf = self.state, self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        for group in self.param_groups:
            if "momentum" in group:
                self._step_of_matrices(group)

    def forget_variances(self) -> None:
        """Drop the second moments from the state of the matrices."""
        for flat in self._matrices:
            self.state[flat] = {name: value for name, value in self.state[flat].items() if name == "exp_avg"}

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        """Update one group: whole matrices without ZeRO, or the pieces in a flat buffer of it."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            self._average(weight, group)
        held = [(weight, matrix) for weight in weights for matrix in self._matrices_in(weight)]
        held.sort(key=lambda one: one[1].numel)  # ranks that work at the same time have as much to do
        for start in range(0, len(held), self._ranks.size):
            self._update(held[start : start + self._ranks.size], group)

    def _average(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Move the momentum towards the gradient, and let the weight decay."""
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
        if self.found_inf is not None:  # a mean that moves towards itself stays as it is, bit for bit
            gradient = torch.where(self.found_inf.to(weight.device).bool(), state["exp_avg"], gradient)
        state["exp_avg"].lerp_(gradient, 1 - group["momentum"])
        weight.mul_(1 - self._applied(weight) * group["lr"] * group["weight_decay"])

    def _matrices_in(self, weight: Tensor) -> list[Matrix]:
        """Return the matrices in a tensor of the optimizer's: itself, unless ZeRO has shared them out."""
        if self._matrices:
            return self._matrices[weight]
        return [Matrix(shape=_as_matrix(weight.shape), begin=0, size=weight.numel(), offset=0)]

    def _update(self, wave: list[tuple[Tensor, Matrix]], group: dict[str, Any]) -> None:
        """Update as many matrices as there are ranks, or fewer: each rank orthogonalises one of them."""
        put_together = [
            self._put_together(weight, matrix, group["momentum"], owner) for owner, (weight, matrix) in enumerate(wave)
        ]
        # only now: a rank that iterated between two of these sums would keep the others waiting
        own = next((orthogonal(whole) for whole in put_together if whole is not None), None)
        for owner, (weight, matrix) in enumerate(wave):
            update = own if own is not None and owner == self._ranks.rank else _empty(matrix, self._ranks)
            if self._ranks.size > 1:
                dist.broadcast(update, src=owner)
            rate = RMS_OF_ADAMW * math.sqrt(max(matrix.shape)) * group["lr"]
            part = matrix.of_whole(update).to(weight.device)
            self._subtract(matrix, weight, part, rate)

    def _subtract(self, matrix: Matrix, weight: Tensor, update: Tensor, rate: float) -> None:
        if matrix.size == weight.numel():  # of any memory layout
            piece, update = weight, update.view(weight.shape)
        else:
            piece = weight.view(-1)[matrix.offset : matrix.offset + matrix.size]
        if self.found_inf is None:
            piece.add_(update, alpha=-rate)
        else:
            piece.sub_(update.float() * (rate * self._applied(weight)))

    def _put_together(self, weight: Tensor, matrix: Matrix, momentum: float, owner: int) -> Tensor | None:
        """Return the momentum of a whole matrix on the rank that orthogonalises it; None on the others.

        Nesterov's: once more towards the gradient.
        """
        is_owner = owner == self._ranks.rank
        if not self._is_shared and not is_owner:
            return None
        gradient, mean = weight.grad, self.state[weight]["exp_avg"]
        assert gradient is not None
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf.to(weight.device).bool(), mean, gradient)
        whole = _empty(matrix, self._ranks).zero_()
        matrix.of_whole(whole).copy_(matrix.piece(gradient).lerp(matrix.piece(mean), momentum))
        if self._is_shared:
            sum_on(owner, whole)  # all but one of the terms are 0: nothing is rounded
        return whole if is_owner else None

    @property
    def _is_shared(self) -> bool:
        """Whether ranks hold different pieces."""
        return bool(self._matrices) and self._ranks.size > 1

    def _applied(self, weight: Tensor) -> float | Tensor:
        """Return 1, or 0 for a step that is skipped, which may be a 0-d tensor on the device."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf.to(weight.device)


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a parameter as a matrix."""
    return shape[0], math.prod(shape[1:])


def _empty(matrix: Matrix, ranks: Ranks) -> Tensor:
    return torch.empty(matrix.shape, dtype=DTYPES[ranks.device.type], device=ranks.device)


def sum_on(rank: int, matrix: Tensor) -> None:
    """Sum the ranks' matrices in place on one rank; those of the others become undefined. Collective."""
    dist.reduce(matrix, dst=rank)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest orthogonal matrix; its singular values are within 0.5 and 1.5 or so.

    Runs torch's own iterations in bfloat16, and the same in float32.
    """
    a, b, c = _muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C
    if matrix.dtype == torch.bfloat16:
        found = _muon._zeropower_via_newtonschulz(matrix, (a, b, c), _muon.DEFAULT_NS_STEPS, _muon.EPS)
        return found.contiguous()
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_muon.EPS)
    for _ in range(_muon.DEFAULT_NS_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T.contiguous() if is_tall else x


# ------------------------------------------------------------------------------------------ DeepSpeed's layout


def matrices_of(zero: Any, ranks: Ranks) -> dict[Tensor, list[Matrix]]:
    """Return the matrices, with this rank's pieces, in each tensor that a ZeRO optimizer gave to the one within it.

    Args:
        zero: DeepSpeed's, of stage 1, 2 or 3, or its BF16_Optimizer.
        ranks: the ranks.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return dict(_in_parts_of_parameters(zero, ranks))
    return dict(_in_parts_of_groups(zero, ranks))


def _in_parts_of_groups(zero: Any, ranks: Ranks) -> Iterator[tuple[Tensor, list[Matrix]]]:
    """Yield the matrices at stages 1 and 2, which cut a buffer of a group's parameters into a part for each rank."""
    for number, group in enumerate(zero.optimizer.param_groups):
        if "momentum" not in group:
            continue
        (flat,) = group["params"]
        if hasattr(zero, "bf16_groups"):
            weights, gaps = zero.bf16_groups[number], None
        else:
            weights, gaps = zero.round_robin_bit16_groups[number], zero.round_robin_bit16_padding[number]
        first, last = ranks.rank * flat.numel(), (ranks.rank + 1) * flat.numel()
        matrices, position = [], 0
        for i, weight in enumerate(weights):
            begin, end = (min(max(edge, position), position + weight.numel()) for edge in (first, last))
            matrices.append(
                Matrix(
                    shape=_as_matrix(weight.shape),
                    begin=begin - position,
                    size=end - begin,
                    offset=max(0, position - first),
                )
            )
            position += weight.numel() + (gaps[i] if gaps else 0)
        yield flat, matrices


def _in_parts_of_parameters(zero: Any, ranks: Ranks) -> Iterator[tuple[Tensor, list[Matrix]]]:
    """Yield the matrices at stage 3, which cuts each parameter into parts for the ranks; a buffer holds one rank's."""
    for number, weights in enumerate(zero.fp16_groups):
        if "momentum" not in zero.optimizer.param_groups[zero.sub_group_to_group_id[number]]:
            continue
        matrices, offset = [], 0
        for weight in weights:
            length = weight.partition_numel()
            begin = min(ranks.rank * length, weight.ds_numel)
            size = min(length, weight.ds_numel - begin)
            matrices.append(Matrix(shape=_as_matrix(weight.ds_shape), begin=begin, size=size, offset=offset))
            offset += length
        yield zero.fp32_partitioned_groups_flat[number], matrices
