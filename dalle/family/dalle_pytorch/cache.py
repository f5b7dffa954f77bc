"""Keys and values while DALLE-pytorch's transformer decodes: captions read once, then one image token at a time.

Keys and values of the text are held once per prompt; those of the image belong to a candidate, and every layer holds
all of them. Where channels are shifted, each branch also holds them of the last row of the grid.

Legend: P prompts  B candidates  S sequence  T text positions  I image tokens  m image tokens known beforehand  D width
        H heads  K head dim  W width of the grid  V vocabulary
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dalle.cache import counts_left, groups_of, per_prompt, prompts_of
from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.family.dalle_pytorch.model import DALLEPytorch


def bytes_per_candidate(config: DALLEPytorchConfig, dtype: torch.dtype) -> int:
    """Return the memory of one candidate's keys, values and shifted channels in a `DALLEPytorchDecoder`."""
    kept = 2 * config.n_layers * config.grid**2 * config.d_attention
    shifted = 2 * config.n_layers * config.grid * (config.d_model // 2) if config.shifts_tokens else 0
    return (kept + shifted) * dtype.itemsize


def bytes_per_caption(config: DALLEPytorchConfig, dtype: torch.dtype) -> int:
    """Return the memory of a caption: keys and values of all layers, and the peak of reading it in one layer."""
    n = config.text_len + 1
    kept = 2 * config.n_layers * n * config.d_attention
    return (kept + max(3 * 8 * config.d_model * n, 2 * config.n_heads * n * n)) * dtype.itemsize


def n_step_weights(model: DALLEPytorch) -> int:
    """Return how many weights a candidate is multiplied with at each image position."""
    config = model.config
    each = [
        [sum(weight.numel() for weight in part.parameters()) for part in parts]
        for parts in (model.attentions, model.mlps)
    ]
    layers = zip(config.attention_of_layer, config.mlp_of_layer, strict=True)
    return sum(each[0][a] + each[1][m] for a, m in layers) + config.d_model * config.image_vocab


class DALLEPytorchDecoder:
    """Decodes a batch of candidates, one image position at a time; used as `dalle.cache.Decoder`."""

    @torch.inference_mode()
    def __init__(self, model: DALLEPytorch, text: Tensor, counts: Sequence[int], prefix: Tensor | None = None) -> None:
        """Read the prompts.

        Args:
            model: the transformer; its device and dtype are used.
            text: int64 (P, T), text ids of the prompts.
            counts: how many candidates each prompt has; candidates are numbered prompt by prompt.
            prefix: int64 (P, m), image tokens of the prompts that are known beforehand; None if none are.

        Raises:
            ValueError: there is not one count per prompt, or one is below 1.
        """
        if len(counts) != len(text) or min(counts) < 1:
            raise ValueError(f"{len(counts)} counts for {len(text)} prompts: expected one count per prompt, at least 1")
        if prefix is None:
            prefix = text.new_empty((len(text), 0))
        self.model = model
        self.position = prefix.shape[1]
        """The image position that the next step predicts."""
        self._text_PT = text
        self._masks = {kind: model.mask(text, kind) for kind in set(model.config.kinds)}
        self._counts = list(counts)
        self._prompt_of_B = prompts_of(counts).to(model.device)
        self._text: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, (P, H, T+1, K)."""
        self._image: list[tuple[Tensor, Tensor]] = []
        """The same, (B, H, I, K)."""
        self._rows: list[Tensor] = []
        """For each branch the first half of its channels in the last W cells, (W, B, D/2): cell c at c mod W."""
        h_PSD = model.embed_text(text)
        if self.position > 1:
            # the last known token is the input of the first step
            h_PSD = torch.cat([h_PSD, model.embed_image(prefix[:, :-1], 0)], dim=1)
        out_PSD = model.run(h_PSD, 0, self._read_attend, self._read_shift)
        self._first_BV = model.image_logits(out_PSD[:, model.config.text_len])[self._prompt_of_B]
        """Logits of image position 0, which the text alone predicts."""

    @torch.inference_mode()
    def step(self, inputs_B: Tensor) -> Tensor:
        """Advance all candidates by one image position.

        Args:
            inputs_B: int64 (B,), the image token before this position; not looked at for position 0.

        Returns:
            Logits of the image token at this position, float32 (B, V).

        Raises:
            ValueError: all positions are decoded.
        """
        model, i = self.model, self.position
        if i >= model.config.stream.n_image:
            raise ValueError(f"all {i} image tokens are decoded")
        self.position += 1
        if i == 0:
            return self._first_BV
        h_B1D = model.embed_image(inputs_B[:, None], i - 1)
        out_B1D = model.run(h_B1D, model.config.text_len + i, partial(self._attend, i - 1), partial(self._shift, i - 1))
        return model.image_logits(out_B1D)[:, 0]

    @torch.inference_mode()
    def keep(self, candidates: Tensor) -> None:
        """Drop all but some candidates; arguments and errors are those of `Decoder.keep`."""
        self._counts = counts_left(self._counts, candidates)
        candidates = candidates.to(self.model.device)
        self._prompt_of_B = self._prompt_of_B[candidates]
        self._first_BV = self._first_BV[candidates]
        self._image = [(keys[candidates], values[candidates]) for keys, values in self._image]
        self._rows = [rows_WBD[:, candidates] for rows_WBD in self._rows]

    @torch.inference_mode()
    def reorder(self, candidates: Tensor) -> None:
        """Let every candidate go on from another; see `Decoder.reorder`."""
        self._image = [(keys[candidates], values[candidates]) for keys, values in self._image]
        self._rows = [rows_WBD[:, candidates] for rows_WBD in self._rows]

    def _read_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep a layer's keys and values of the known positions; attend as the mask says."""
        config = self.model.config
        n_text, n = config.text_len + 1, k.shape[2]
        # copies: a view would keep queries, keys and values of all positions alive
        self._text.append((k[:, :, :n_text].clone(), v[:, :, :n_text].clone()))
        size = (len(self._prompt_of_B), config.n_heads, config.stream.n_image, config.d_head)
        memory = (q.new_zeros(size), q.new_zeros(size))
        for slots, x_PHSK in zip(memory, (k, v), strict=True):
            slots[:, :, : n - n_text] = x_PHSK[:, :, n_text:][self._prompt_of_B]
        self._image.append(memory)
        return self.model.attend_all(self._text_PT, layer, q, k, v)

    def _read_shift(self, number: int, x_PnD: Tensor) -> Tensor:
        """Keep the channels that later cells shift from; shift those of the known positions."""
        config = self.model.config
        W, image_PnD = config.grid, x_PnD[:, config.text_len + 1 :]
        half = sum(part.shape[-1] for part in x_PnD[:1, :1].chunk(4, dim=-1)[:2])
        rows_WBD = x_PnD.new_zeros(W, len(self._prompt_of_B), half)
        for cell in range(max(0, image_PnD.shape[1] - W), image_PnD.shape[1]):
            rows_WBD[cell % W] = image_PnD[self._prompt_of_B, cell, :half]
        self._rows.append(rows_WBD)
        return self.model.shift_all(number, x_PnD)

    def _attend(self, cell: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from a cell to the text and to the image up to it, (B, H, 1, K), keeping its key and value."""
        config = self.model.config
        keys, values = self._image[layer]
        keys[:, :, cell], values[:, :, cell] = k[:, :, 0], v[:, :, 0]
        n_text, n = config.text_len + 1, config.text_len + 2 + cell
        mask = self._masks[config.kinds[layer]][..., n - 1, :n]  # (n), or (P, 1, n)
        if mask.ndim > 1:
            mask = mask[self._prompt_of_B]
        q_BHK = q[:, :, 0] * config.d_head**-0.5
        text_keys_PHTK, text_values_PHTK = self._text[layer]
        groups = groups_of(self._counts)
        text_BHT = per_prompt(q_BHK, text_keys_PHTK.mT, groups)
        image_BHL = (keys[:, :, : cell + 1] @ q_BHK[..., None])[..., 0]
        scores_BHn = torch.cat([text_BHT, image_BHL], dim=-1).float().masked_fill(~mask, -torch.inf)
        weights_BHn = scores_BHn.softmax(-1).to(q.dtype)
        from_text_BHK = per_prompt(weights_BHn[..., :n_text], text_values_PHTK, groups)
        from_image_BHK = (weights_BHn[:, :, None, n_text:] @ values[:, :, : cell + 1])[:, :, 0]
        return (from_text_BHK + from_image_BHK)[:, :, None]

    def _shift(self, cell: int, number: int, x_B1D: Tensor) -> Tensor:
        """Shift the channels of a cell, keeping them for later ones."""
        W, rows_WBD = self.model.config.grid, self._rows[number]
        top, left, *rest = x_B1D.chunk(4, dim=-1)
        q = top.shape[-1]
        above_BD = rows_WBD[cell % W, :, :q].clone()
        before_BD = rows_WBD[(cell - 1) % W, :, q:] if cell % W else torch.zeros_like(left[:, 0])
        shifted = torch.cat([above_BD[:, None], before_BD[:, None], *rest], dim=-1)
        rows_WBD[cell % W] = torch.cat([top, left], dim=-1)[:, 0]
        return shifted
