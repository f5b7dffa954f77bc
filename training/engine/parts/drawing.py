"""Draws a model's first weights tensor by tensor, of which each rank keeps its part.

A model's own code runs on torch's meta device, where tensors have shapes and no values. Each time it fills a
parameter, the values are drawn on the CPU into memory for that one tensor, so that the global generator gives the
numbers, and in the order, that it gives to a whole model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training.engine.parts.cutting import part_of, whole_of
from training.ranks.ranks import Ranks

_FILLS = {"normal_", "uniform_", "kaiming_uniform_", "zero_", "fill_"}
"""Names of the functions that give a tensor all its values; torch's other initialisations call one of them."""


@contextmanager
def drawn_in_parts(ranks: Ranks) -> Iterator[None]:
    """Build models on the meta device, whose parameters carry this rank's parts of their values.

    The CPU's global generator must be in the same state on all ranks, and is left as a whole model leaves it.
    """
    with torch.device("meta"), _Drawing(ranks):
        yield


class _Drawing(TorchFunctionMode):
    """Draws what parameters on the meta device are filled with, and keeps this rank's part of it."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") not in _FILLS:
            return func(*args, **kwargs)
        target: Tensor = args[0] if args else kwargs["tensor"]
        if not target.is_meta:
            return func(*args, **kwargs)
        if not isinstance(target, nn.Parameter):
            raise TypeError(
                f"only a whole parameter can be drawn in parts, not a tensor of shape {tuple(target.shape)}"
            )
        whole = torch.empty(target.shape, dtype=target.dtype, device="cpu")
        if args:
            func(whole, *args[1:], **kwargs)
        else:
            func(**kwargs | {"tensor": whole})
        _keep(target, part_of(whole, self._ranks))
        return target


def _keep(parameter: nn.Parameter, part: Tensor) -> None:
    parameter.drawn_part = part  # type: ignore[attr-defined]  # ours, on a tensor without values


def _part(parameter: nn.Parameter) -> Tensor:
    return cast(Tensor, parameter.drawn_part)  # type: ignore[attr-defined]


@contextmanager
def made_whole(modules: Iterable[nn.Module], ranks: Ranks) -> Iterator[None]:
    """Give the own parameters of a few modules their values while it lasts, on the CPU of every rank. Collective."""
    lent = [(module, name, meta) for module in modules for name, meta in module.named_parameters(recurse=False)]
    for module, name, meta in lent:
        setattr(module, name, nn.Parameter(whole_of(_part(meta), meta.shape, ranks).cpu()))
    yield
    for module, name, meta in lent:
        _keep(meta, part_of(getattr(module, name), ranks))
        setattr(module, name, meta)


def hand_over(
    parameters: Iterable[nn.Parameter], dtype: torch.dtype, take: Callable[[nn.Parameter], None], ranks: Ranks
) -> None:
    """Let `take` have every parameter that was drawn in parts, one whole tensor at a time. Collective.

    The parameters stay the objects that an optimizer may hold already.

    Args:
        parameters: of a model; those that are whole are left alone.
        dtype: that they get.
        take: called with each of them, whole on the rank's device; it may free the values.
        ranks: the ranks.
    """
    for parameter in parameters:
        if parameter.is_meta:
            whole = whole_of(_part(parameter).to(dtype), parameter.shape, ranks)
            filled = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, filled)  # type: ignore[no-untyped-call]  # torch's
            take(parameter)
