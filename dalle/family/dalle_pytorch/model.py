"""DALLE-pytorch's transformer: text ids and image tokens in, next-token logits out.

What differs from the paper's, in dalle/model.py (lucidrains/DALLE-pytorch at 58c1e1a, dalle_pytorch/):

- Text begins with a start that has the embedding of id 0. An image position is fed the token of its own cell and
  predicts the next; the last text position predicts the first.
- MLPs are gated: a·gelu(b), with erf. A branch's output may be normalised again, and is scaled by learnt factors.
- Places are learnt, or rotate queries, keys and values. One head has the rows of text and image.
- Options: a reversible pair of streams; channels shifted from earlier positions; branches that share weights.

Legend: B batch  S sequence = T+I  T text positions  I image tokens  n positions of a part  D width  H heads  K head dim
        R rotated components  V vocabulary
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.attention import masked_attention
from dalle.family.dalle_pytorch.attention import BLOCK, Kind, blocks_mask, mask, pads_mask
from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.stream import check_ids
from storage.models.stored import StoredModel

KIND = "dalle-pytorch"
"""Kind of the model's directory, in its config.json."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention itself: (layer, q, k, v), each (B, H, n, K) -> (B, H, n, K)."""
Shift = Callable[[int, Tensor], Tensor]
"""Shifting of channels: (number of the branch, its normalised input (B, n, D)) -> (B, n, D)."""


class Attention(nn.Module):
    """Projections to heads and back; the first has no bias."""

    def __init__(self, config: DALLEPytorchConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_attention, bias=False)
        self.out = nn.Linear(config.d_attention, config.d_model)

    def forward(self, x_BnD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return the output of the heads, (B, n, D)."""
        q, k, v = self.qkv(x_BnD).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        output: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """Two linear layers, of the first one half gated by the other."""

    def __init__(self, config: DALLEPytorchConfig) -> None:
        super().__init__()
        self.wide = nn.Linear(config.d_model, 8 * config.d_model)
        self.out = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Return (B, n, D)."""
        values, gates = self.wide(x_BnD).chunk(2, dim=-1)
        output: Tensor = self.out(values * F.gelu(gates))
        return output


class Branch(nn.Module):
    """What surrounds an attention or an MLP, and is never shared."""

    def __init__(self, config: DALLEPytorchConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.norm_out = nn.LayerNorm(config.d_model) if config.has_sandwich_norms else None
        self.scale = nn.Parameter(torch.ones(config.d_model)) if config.has_scales else None

    def forward(self, h_BnD: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the branch's part of the residual stream, (B, n, D)."""
        output = inner(self.norm(h_BnD))
        if self.norm_out is not None:
            output = self.norm_out(output)
        return output if self.scale is None else output * self.scale


class DALLEPytorch(StoredModel[DALLEPytorchConfig]):
    """The transformer."""

    kind = KIND
    config_type = DALLEPytorchConfig

    cosines: Tensor
    """(S, R), of the angles by which a position's components are rotated."""
    sines: Tensor
    """The same."""
    layout: Tensor
    """Which blocks sparse layers see, (N, N): not 0 where they do."""

    def __init__(self, config: DALLEPytorchConfig) -> None:
        super().__init__(config)
        d, n_text_ids = config.d_model, config.n_text_ids
        if not config.shares_embeddings:
            self.text_embedding = nn.Embedding(n_text_ids, d)
            self.image_embedding = nn.Embedding(config.image_vocab, d)
        if config.rotary:
            # not the angles, which a lower precision would spoil
            self.register_buffer("cosines", torch.ones(config.length, config.rotary))
            self.register_buffer("sines", torch.zeros(config.length, config.rotary))
        else:
            self.text_places = nn.Embedding(config.text_len + 1, d)
            self.row_places = nn.Embedding(config.grid, d)
            self.column_places = nn.Embedding(config.grid, d)
        if "sparse" in config.kinds:
            n_blocks = config.length // BLOCK
            self.register_buffer("layout", torch.ones(n_blocks, n_blocks))
        self.attentions = nn.ModuleList(Attention(config) for _ in set(config.attention_of_layer))
        self.mlps = nn.ModuleList(MLP(config) for _ in set(config.mlp_of_layer))
        self.branches = nn.ModuleList(Branch(config) for _ in range(2 * config.n_layers))
        self.final_norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, n_text_ids + config.image_vocab)

    def forward(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of every position's next token.

        Args:
            text: int64 (B, T), text ids as `DALLEPytorchConfig.text_rows` makes them.
            image_tokens: int64 (B, I), raster order. The last one is not an input, only a target.

        Returns:
            Text logits, (B, T, V_text): row t predicts text id t. Image logits, (B, I, V_image): row i predicts image
            token i.

        Raises:
            ValueError: for a wrong shape or dtype; on the CPU also for ids out of range.
        """
        config = self.config
        check_ids("text", text, config.text_len, config.n_text_ids)
        check_ids("image_tokens", image_tokens, config.stream.n_image, config.image_vocab)
        if len(text) != len(image_tokens):
            raise ValueError(f"{len(text)} captions and {len(image_tokens)} images: expected one caption per image")
        h_BSD = torch.cat([self.embed_text(text), self.embed_image(image_tokens[:, :-1], 0)], dim=1)
        out_BSD = self.run(h_BSD, 0, partial(self.attend_all, text), self.shift_all)
        T = config.text_len
        return self.text_logits(out_BSD[:, :T]), self.image_logits(out_BSD[:, T:])

    def embed_text(self, text_BT: Tensor) -> Tensor:
        """Return the residual stream of the start and the text before the first layer, (B, T+1, D)."""
        ids_BT = F.pad(text_BT, (1, 0))
        weight = self.head.weight if self.config.shares_embeddings else self.text_embedding.weight
        h_BTD = F.embedding(ids_BT, weight)
        return h_BTD if self.config.rotary else h_BTD + self.text_places.weight

    def embed_image(self, tokens_Bn: Tensor, first: int) -> Tensor:
        """Return the residual stream of n cells of the grid from a first one on, (B, n, D), for their tokens."""
        config = self.config
        is_shared = config.shares_embeddings
        h_BnD = F.embedding(
            tokens_Bn, self.head.weight[config.n_text_ids :] if is_shared else self.image_embedding.weight
        )
        if config.rotary:
            return h_BnD
        cells_n = torch.arange(first, first + tokens_Bn.shape[1], device=tokens_Bn.device)
        places_nD: Tensor = self.row_places(cells_n // config.grid) + self.column_places(cells_n % config.grid)
        return h_BnD + places_nD

    def run(self, h_BnD: Tensor, first: int, attend: Attend, shift: Shift) -> Tensor:
        """Run n positions of the sequence from a first one on through all layers and the last norm, (B, n, D)."""
        config = self.config

        def branch(number: int, h_BnD: Tensor) -> Tensor:
            layer, is_mlp = divmod(number, 2)

            def inner(x_BnD: Tensor) -> Tensor:
                if config.shifts_tokens:
                    x_BnD = shift(number, x_BnD)
                if is_mlp:
                    output: Tensor = self.mlps[config.mlp_of_layer[layer]](x_BnD)
                else:
                    rotated = partial(self._rotated_attend, attend, layer, first)
                    output = self.attentions[config.attention_of_layer[layer]](x_BnD, rotated)
                return output

            output: Tensor = self.branches[number](h_BnD, inner)
            return output

        other_BnD = h_BnD
        for number in range(2 * config.n_layers):
            if config.is_reversible:
                h_BnD, other_BnD = other_BnD, h_BnD + branch(number, other_BnD)
            else:
                h_BnD = h_BnD + branch(number, h_BnD)
        if config.is_reversible:
            h_BnD = (h_BnD + other_BnD) / 2
        if config.is_stable:
            h_BnD = h_BnD / h_BnD.amax(-1, keepdim=True)
        output: Tensor = self.final_norm(h_BnD)
        return output

    def _rotated_attend(self, attend: Attend, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if R := self.config.rotary:
            here = slice(first, first + q.shape[2])
            cosines_nR, sines_nR = self.cosines[here], self.sines[here]
            q, k, v = (torch.cat([_rotated(x[..., :R], cosines_nR, sines_nR), x[..., R:]], -1) for x in (q, k, v))
        return attend(layer, q, k, v)

    def attend_all(self, text_BT: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as the layer's mask says, from the first n positions of the sequence to themselves: see `Attend`."""
        n = q.shape[2]
        return masked_attention(q, k, v, self.mask(text_BT, self.config.kinds[layer])[..., :n, :n])

    def mask(self, text_BT: Tensor, kind: Kind) -> Tensor:
        """Return who sees whom in a kind of layer, bool (S, S), or (B, 1, S, S) where it depends on the text."""
        config = self.config
        mask_SS = mask(kind, config.text_len, config.grid, text_BT.device)
        if kind == "sparse":
            mask_SS = mask_SS & blocks_mask(self.layout, config.length)
        return mask_SS if config.has_own_pads else (mask_SS & pads_mask(kind, text_BT, config.length))[:, None]

    def shift_all(self, number: int, x_BnD: Tensor) -> Tensor:
        """Shift channels of the first n positions: see `Shift`.

        Of text, the first half comes from the position before. Of the image, the first quarter comes from the cell
        above, the second from the left; outside of the grid are zeros.
        """
        grid, n_text = self.config.grid, self.config.text_len + 1
        text_BnD, image_BnD = x_BnD[:, :n_text], x_BnD[:, n_text:]
        moved, kept = text_BnD.chunk(2, dim=-1)
        text_BnD = torch.cat([F.pad(moved, (0, 0, 1, -1)), kept], dim=-1)
        n = image_BnD.shape[1]
        top, left, *rest = image_BnD.chunk(4, dim=-1)
        is_first_n1 = (torch.arange(n, device=x_BnD.device) % grid == 0)[:, None]
        top = F.pad(top, (0, 0, grid, 0))[:, :n]
        left = F.pad(left, (0, 0, 1, 0))[:, :n].masked_fill(is_first_n1, 0.0)
        return torch.cat([text_BnD, torch.cat([top, left, *rest], dim=-1)], dim=1)

    def text_logits(self, out_BnD: Tensor) -> Tensor:
        """Return the logits of text ids, float32 (B, n, V_text), for results of `run`."""
        n = self.config.n_text_ids
        return F.linear(out_BnD, self.head.weight[:n], self.head.bias[:n]).float()

    def image_logits(self, out_BnD: Tensor) -> Tensor:
        """Return the logits of image tokens, float32 (B, n, V_image), for results of `run`."""
        n = self.config.n_text_ids
        return F.linear(out_BnD, self.head.weight[n:], self.head.bias[n:]).float()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.final_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.final_norm.weight.dtype


def _rotated(x_BHnR: Tensor, cosines_nR: Tensor, sines_nR: Tensor) -> Tensor:
    """Return components rotated in pairs (a, b) by their angles: a·cos - b·sin, b·cos + a·sin."""
    a, b = x_BHnR.reshape(*x_BHnR.shape[:-1], -1, 2).unbind(-1)
    return x_BHnR * cosines_nR + torch.stack([-b, a], dim=-1).flatten(-2) * sines_nR
