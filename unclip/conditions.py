"""What prior and decoder are told of a caption, and what stands in for it where they are told nothing.

Letters: B batch  E embedding  L text positions  D width of the text tower
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_NULL_DEVIATION = 0.02


class Text(NamedTuple):
    """A text tower's view of captions."""

    features: Tensor
    """(B, E), z_t, one vector for each caption."""
    states: Tensor
    """(B, L, D), of every position."""
    mask: Tensor
    """bool (B, L), False at padding."""

    def to(self, device: torch.device) -> Self:
        """Return the same on a device."""
        return type(self)(*(tensor.to(device) for tensor in self))

    def repeated(self, times: int) -> Self:
        """Return every caption `times` times in a row."""
        return type(self)(*(tensor.repeat_interleave(times, dim=0) for tensor in self))

    def checked(self, embed_dim: int, text_len: int, text_width: int) -> Self:
        """Return the same.

        Raises:
            ValueError: a shape is not what a model of these sizes reads.
        """
        n, length = self.mask.shape if self.mask.ndim == 2 else (-1, -1)
        fits = self.features.shape == (n, embed_dim) and self.states.shape == (n, length, text_width)
        if not fits or not 1 <= length <= text_len or self.mask.dtype != torch.bool:
            shapes = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in self)
            raise ValueError(
                f"the text's features, states and mask are {shapes}; expected (B, {embed_dim}), (B, L, {text_width}) "
                f"and bool (B, L), L at most {text_len}: take them from the CLIP that the model was trained with"
            )
        return self


class NullText(nn.Module):
    """Learned vectors that stand in for a caption's: a null that is neither padding nor any caption's.

    Args:
        embed_dim: E.
        length: positions of the null.
        text_width: D.
    """

    def __init__(self, embed_dim: int, length: int, text_width: int) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(embed_dim) * _NULL_DEVIATION)
        self.states = nn.Parameter(torch.randn(length, text_width) * _NULL_DEVIATION)

    def forward(self, text: Text, is_dropped: Tensor) -> Text:
        """Return the text with the null in the rows that are dropped.

        Args:
            text: of B captions.
            is_dropped: bool (B,).
        """
        length, own = text.states.shape[1], len(self.states)
        missing = max(0, own - length)
        states, mask = F.pad(text.states, (0, 0, 0, missing)), F.pad(text.mask, (0, missing), value=False)
        null_states = F.pad(self.states, (0, 0, 0, states.shape[1] - own)).to(states.dtype)
        null_mask = torch.arange(states.shape[1], device=mask.device) < own
        return Text(
            torch.where(is_dropped[:, None], self.features.to(text.features.dtype), text.features),
            torch.where(is_dropped[:, None, None], null_states, states),
            torch.where(is_dropped[:, None], null_mask, mask),
        )


def drawn_mask(count: int, probability: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return bool (count,) on a device, True with this probability in each row on its own; drawn on the CPU."""
    return (torch.rand(count, generator=generator) < probability).to(device)
