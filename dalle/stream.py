"""The token layout: text positions, then image positions, one stream (Ramesh et al. 2021, §2.2, Figs 10, 11).

Text ids, for a BPE vocabulary of V entries and T text positions:

    0 … V-1        BPE tokens; only these are ever predicted
    V              start of text, always at position 0
    V+1+t          the pad of text position t: every position has a learned pad of its own (B.1)

Image ids, a table of their own, for an image vocabulary of V entries:

    0 … V-1        image tokens
    V              start of image; an input only

Text position t predicts the text token of position t+1. Image position i is fed image token i-1 (position 0:
start of image) and predicts image token i.

Legend: B batch  T text positions  I image positions  S stream = T+I
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that predicts nothing: the default `ignore_index` of torch's cross entropy."""


@dataclass(frozen=True)
class Stream:
    """Sizes of the stream and the places of its positions."""

    text_len: int = 256
    """T: text positions, start of text included."""
    grid: int = 32
    """Rows, and columns, of the image-token grid."""

    def __post_init__(self) -> None:
        if self.text_len < 2:
            raise ValueError(f"text_len ({self.text_len}) must be at least 2: start of text and one token")
        if self.grid < 1:
            raise ValueError(f"grid ({self.grid}) must be at least 1")

    @property
    def n_image(self) -> int:
        """I: image positions."""
        return self.grid * self.grid

    @property
    def length(self) -> int:
        """S: all positions."""
        return self.text_len + self.n_image

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the grid row of every image position, int64 (I,)."""
        return torch.arange(self.n_image, device=device) // self.grid

    def columns(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the grid column of every image position, int64 (I,)."""
        return torch.arange(self.n_image, device=device) % self.grid


def start_id(text_vocab: int) -> int:
    """Return the text id of start of text."""
    return text_vocab


def pad_id(text_vocab: int, position: int) -> int:
    """Return the text id of the pad of a text position."""
    return text_vocab + 1 + position


def n_text_ids(text_vocab: int, text_len: int) -> int:
    """Return the number of text ids: BPE tokens, start of text, and one pad per position."""
    return text_vocab + 1 + text_len


def start_of_image_id(image_vocab: int) -> int:
    """Return the image id of start of image."""
    return image_vocab


def n_image_ids(image_vocab: int) -> int:
    """Return the number of image ids: image tokens and start of image."""
    return image_vocab + 1


def check_ids(name: str, ids: Tensor, length: int, n_ids: int) -> None:
    """Raise ValueError unless `ids` is int64 (B ≥ 1, length) and, on the CPU, within 0 … n_ids-1."""
    if ids.ndim != 2 or ids.shape[1] != length or len(ids) == 0:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected (batch, {length}) with a batch of at least 1")
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} is {ids.dtype}, expected torch.int64 ids")
    # On a GPU looking at the values would wait for all queued work.
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_ids:
        raise ValueError(
            f"{name} has ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {n_ids - 1}: was it made with"
            " another tokenizer, dVAE or configuration?"
        )


def text_row(ids: Sequence[int], text_vocab: int, text_len: int) -> list[int]:
    """Return the T text ids of a caption: start, its BPE ids (T-1 at most, the rest is cut), and pads."""
    used = [start_id(text_vocab), *ids[: text_len - 1]]
    return used + [pad_id(text_vocab, t) for t in range(len(used), text_len)]


def text_rows(captions: Sequence[Sequence[int]], text_vocab: int, text_len: int) -> Tensor:
    """Return `text_row` of the BPE ids of B captions, int64 (B, T)."""
    pads_T = np.arange(pad_id(text_vocab, 0), pad_id(text_vocab, text_len), dtype=np.int64)
    rows_BT = np.broadcast_to(pads_T, (len(captions), text_len)).copy()
    rows_BT[:, 0] = start_id(text_vocab)
    for row_T, ids in zip(rows_BT, captions, strict=True):
        row_T[1 : len(ids) + 1] = ids[: text_len - 1]
    return torch.from_numpy(rows_BT)


def null_caption(text_vocab: int, text_len: int) -> Tensor:
    """Return the text ids of "no caption", int64 (T,): start and pads. The unconditional half of guidance."""
    return torch.tensor(text_row([], text_vocab, text_len), device="cpu")


def text_targets(text: Tensor, text_vocab: int) -> Tensor:
    """Return what each text position predicts: the BPE id that follows it, or IGNORED.

    Pads are not targets: a vocabulary of exactly V predicted entries leaves no class for them. The last
    position has no target; the first image token is predicted by the start-of-image position.

    Args:
        text: int64 (B, T), text ids.
        text_vocab: V, the number of BPE ids.

    Returns:
        int64 (B, T); IGNORED or 0 … V-1.
    """
    following_BT = torch.nn.functional.pad(text[:, 1:], (0, 1), value=text_vocab)
    return torch.where(following_BT < text_vocab, following_BT, IGNORED)


def image_inputs(image_tokens: Tensor, image_vocab: int) -> Tensor:
    """Return what each image position is fed: start of image, then the tokens but for the last.

    Args:
        image_tokens: int64 (B, m), the first m image tokens, m from 0 to I.
        image_vocab: V, the number of image tokens.

    Returns:
        int64 (B, m): the inputs of positions 0 … m-1.
    """
    shifted_Bm = torch.nn.functional.pad(image_tokens, (1, 0), value=start_of_image_id(image_vocab))
    return shifted_Bm[:, : image_tokens.shape[1]]
