"""What decoding with a cache needs of a transformer over one stream: the paper's has it, and others like it.

Legend: B batch  S stream  T text positions  I image positions  J some image positions  D width
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from dalle.attention import Kind
from dalle.model import DALLEConfig


class Decodable(Protocol):
    """A module that `Decoder` decodes."""

    @property
    def config(self) -> DALLEConfig:
        """Its sizes."""

    @property
    def blocks(self) -> nn.ModuleList:
        """Its layers: (residual stream, attention) -> residual stream."""

    @property
    def image_embedding(self) -> nn.Embedding:
        """Of the ids that image positions are fed."""

    @property
    def final_norm(self) -> nn.Module:
        """Before the heads."""

    @property
    def image_head(self) -> nn.Linear:
        """To the logits of image tokens."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream."""

    def embed(self, text_BT: Tensor, tokens_BJ: Tensor, /) -> Tensor:
        """Return the residual stream of all positions whose inputs are known, before the first layer, (B, S, D)."""

    def image_places(self) -> Tensor:
        """Return what is added to the embedding of the input of each image position, (I, D)."""

    def mask(self, kind: Kind, /) -> Tensor:
        """Return who may attend to whom in a kind of layer, bool (S, S)."""
