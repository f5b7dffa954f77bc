"""PowerSGD: gradients cross the ranks as factors of low rank (Vogels et al. 2019; Ramesh et al. 2021, 2.5, E).

Every matrix has an error buffer E (m×n, m ≤ n) on every rank, to which the rank's gradient is added. The matrix
crosses the ranks as two thin ones, r columns each:

    P = E·Q, averaged over the ranks     Q (n×r): Gaussian, drawn once, never changed
    P + εI, orthogonalised               by Householder's QR
    S = Eᵀ·P, averaged over the ranks    what the paper calls the new Q
    P·Sᵀ                                 is the gradient that the optimizer gets
    E - P·Sᵀ                             is what remains in the buffer: it is late, not lost

With D the decompressed gradients and g the ranks' mean gradients, Σ D + mean E = Σ g after any number of steps: P·Sᵀ is
P·Pᵀ·(mean E), and every rank takes it off its own E. (The paper's gradients are divided by the number of ranks and
summed; there a rank takes off its share.) Embeddings, unembeddings, gains and biases are not compressed.

Three collectives a step, always in this order: what is not compressed, all P, all S. All in float32.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.cross_entropy import Head
from training.ranks.ranks import Ranks

EPSILON = 1e-6
"""Factor of the identity that is added to P, so that it has full rank (E.2, step 5)."""


def compressed_names(model: nn.Module, rank: int) -> list[str]:
    """Return the names of the parameters that are compressed, in the model's order.

    They are the matrices and convolutions that are neither embeddings nor unembeddings, and whose factors are smaller
    than they are.
    """
    tables = (nn.Embedding, Head)
    special = {id(p) for m in model.modules() if isinstance(m, tables) for p in m.parameters(recurse=False)}
    return [
        name
        for name, parameter in model.named_parameters()
        # Deviation: the paper compresses every matrix; here not those that would become larger.
        if parameter.ndim > 1
        and id(parameter) not in special
        and "embedding" not in name
        and n_in_factors(parameter.shape, rank) < parameter.numel()
    ]


def n_in_factors(shape: Sequence[int], rank: int) -> int:
    """Return the number of elements of both factors of a matrix, or of a convolution seen as one."""
    rows, columns = _matrix_shape(shape)
    return min(rank, rows) * (rows + columns)


def expected_ratio(shapes: Mapping[str, Sequence[int]], compressed: Collection[str], rank: int) -> float:
    """Return the elements sent ÷ the elements of the gradients.

    The paper sends 5r/8d of the matrices, d the width and r the sum of the ranks over the 8 shards of each matrix: with
    m shards, r(m + 2)/2dm. Here matrices are whole, m = 1, and q, k and v are one matrix of d×3d:

        | matrix      | elements | P + S      |
        | q, k and v  | 3d²      | dr + 3dr   |
        | projection  | d²       | dr + dr    |
        | MLP, both   | 2·4d²    | 2(dr + 4dr)|

    together 16dr ÷ 12d² = 4r/3d of the matrices; to it comes what is not compressed.

    Args:
        shapes: of all parameters.
        compressed: names of those that are compressed.
        rank: r.
    """
    sent = sum(n_in_factors(shape, rank) if name in compressed else math.prod(shape) for name, shape in shapes.items())
    return sent / sum(math.prod(shape) for shape in shapes.values())


class PowerSGD:
    """Averages gradients over the ranks, matrices as factors of low rank; keeps the remainders.

    All ranks end with the same bits, if all have the same kind of processor.

    Args:
        parameters: all that are trained, by name.
        compressed: names of those whose gradients are compressed.
        rank: r, the columns of the factors.
        seed: of Q.
        ranks: the ranks.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], compressed: Iterable[str], *, rank: int, seed: int, ranks: Ranks
    ) -> None:
        self._rank, self._ranks = rank, ranks
        self._errors = {
            name: torch.zeros(_matrix_shape(parameters[name].shape), device=ranks.device) for name in compressed
        }
        """E of each compressed parameter, (m, n) with m ≤ n, float32."""
        self._draw(seed)
        self.bytes_sent, self.bytes_full = 0, 0
        """Bytes that went into collectives in the last step, and of its gradients in their own type."""

    def _draw(self, seed: int) -> None:
        """Draw Q anew, on the CPU: the same on every device."""
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._q = {
            name: torch.randn(columns, min(self._rank, rows), generator=generator).to(self._ranks.device)
            for name, (rows, columns) in ((name, error.shape) for name, error in self._errors.items())
        }

    @torch.no_grad()
    def reduce_(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace the gradients by their means over the ranks, those of matrices by approximate ones. Collective.

        If a gradient of any rank is not finite, all gradients of all ranks become NaN, so that all skip the
        step, and the buffers stay finite.

        The norm that DeepSpeed clips by is that of the decompressed gradients. It is the paper's √(Σ‖S‖² + Σ‖g‖²), g
        what is not compressed (E.2, step 9): the columns of P are orthonormal, so ‖P·Sᵀ‖ = ‖S‖.

        Args:
            gradients: by name, the same names in the same order on all ranks.
        """
        self.bytes_sent = 0
        self.bytes_full = sum(gradient.numel() * gradient.element_size() for gradient in gradients.values())
        whole = [gradient for name, gradient in gradients.items() if name not in self._errors]
        is_wrong = torch.stack([(~gradient.isfinite()).any() for gradient in gradients.values()]).any().float()
        *means, wrong = self._mean([*whole, is_wrong])
        # Deviation: one gradient that is not finite skips the whole step; the paper's other blocks still go to their
        # buffers.
        if wrong > 0 or not self._reduce_matrices(gradients):
            for gradient in gradients.values():
                gradient.fill_(math.nan)
            return
        for gradient, mean in zip(whole, means, strict=True):
            gradient.copy_(mean)

    def _reduce_matrices(self, gradients: Mapping[str, Tensor]) -> bool:
        """Replace the compressed gradients; returns whether the factors were finite, the same on all ranks."""
        for name, error in self._errors.items():
            error.add_(_as_matrix(gradients[name]))
        p = self._mean([error @ self._q[name] for name, error in self._errors.items()])
        if not _all_finite(p):
            return self._keep_finite_errors()
        p = [_orthogonal(factor) for factor in p]
        s = self._mean([error.T @ factor for error, factor in zip(self._errors.values(), p, strict=True)])
        if not _all_finite(s):
            return self._keep_finite_errors()
        for (name, error), left, right in zip(self._errors.items(), p, s, strict=True):
            gradient = gradients[name]
            # rounded to the gradient's type, so that what rounding takes away stays in the buffer, too
            decompressed = (left @ right.T).to(gradient.dtype)
            error.sub_(decompressed)
            gradient.copy_(_from_matrix(decompressed, gradient.shape))
        return True

    def _keep_finite_errors(self) -> bool:
        """Set to 0 the buffers that are not finite (E.2, step 12); returns False."""
        for error in self._errors.values():
            if not error.isfinite().all():
                error.zero_()
        return False

    def _mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over the ranks, float32. One collective."""
        if not tensors:
            return []
        # Deviation: the paper's factors cross the ranks in 16 bits, 1-6-9; these in float32.
        flat = torch.cat([tensor.float().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        self.bytes_sent += flat.numel() * flat.element_size()
        flat /= self._ranks.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """Return the state for `load_state`: this rank's error buffers, and Q's seed."""
        return {"seed": torch.tensor(self._seed), **{f"error.{name}": error for name, error in self._errors.items()}}

    def load_state(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Restore saved buffers.

        Args:
            states: this rank's own; or, at another number of ranks, those of all ranks that saved, in which case every
                rank continues from their mean: what is late stays the same. One of them is held at a time.

        Raises:
            ValueError: they are of other parameters.
        """
        expected = {name: tensor.shape for name, tensor in self.state().items()}
        n_states = 0
        for state in states:
            if {name: tensor.shape for name, tensor in state.items()} != expected:
                raise ValueError(
                    "the PowerSGD buffers of the checkpoint are of another model or rank: resume with the "
                    "--powersgd-rank it was made with"
                )
            for name, error in self._errors.items():
                saved = state[f"error.{name}"].to(error.device)
                # Deviation: buffers are float32, not 1-6-9 bits; a checkpoint keeps those of each rank, not their sum.
                error.copy_(saved if n_states == 0 else error + saved)
            self._draw(int(state["seed"]))
            n_states += 1
        for error in self._errors.values():
            error.div_(n_states)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a parameter seen as a matrix, transposed so that rows ≤ columns."""
    n_out, n_in = shape[0], math.prod(shape[1:])
    return min(n_out, n_in), max(n_out, n_in)


def _as_matrix(gradient: Tensor) -> Tensor:
    """Return a gradient as a matrix, transposed so that rows ≤ columns: there are fewer rows to orthogonalise."""
    matrix = gradient.reshape(len(gradient), -1)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `_as_matrix`."""
    return (matrix.T if matrix.shape[0] != shape[0] else matrix).reshape(*shape)


def _orthogonal(p: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of P + εI, by Householder's QR; Gram and Schmidt's is unstable."""
    basis: Tensor = torch.linalg.qr(p + EPSILON * torch.eye(*p.shape, device=p.device)).Q
    return basis


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
