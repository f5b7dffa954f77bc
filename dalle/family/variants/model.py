"""The transformers of ruDALLE and minDALL-E: weights of others, in the parts and with the cache of the paper's.

A module of its own rather than switches in `DALLE`: attention, masks and decoding are shared, and the paper's forward
pass stays as it is. It is decoded and evaluated, not trained.

Legend: B batch  S stream = T+I  T text positions  I image positions  J some image positions  D width  V vocabulary
        P prompts
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle.attention import Attend, Attention, Kind, masked_attention, stored_mask
from dalle.cache import Decoder, prompts_of
from dalle.family.variants.config import VARIANTS, Variant, VariantConfig
from dalle.stream import check_ids
from storage.models.stored import StoredModel

KIND = "dalle-variant"
"""Kind of the model's directory, in its config.json."""


class VariantBlock(nn.Module):
    """One layer: attention and MLP, normalised first and perhaps also last, each added to the residual stream."""

    def __init__(self, d_model: int, n_heads: int, variant: Variant) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_heads)
        self.attention_end = nn.LayerNorm(d_model) if variant.sandwich else nn.Identity()
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(variant.gelu), nn.Linear(4 * d_model, d_model)
        )
        self.mlp_end = nn.LayerNorm(d_model) if variant.sandwich else nn.Identity()

    def forward(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        """Return the residual stream after this layer, (B, S, D)."""
        h_BSD = h_BSD + self.attention_end(self.attention(self.attention_norm(h_BSD), attend))
        output: Tensor = h_BSD + self.mlp_end(self.mlp(self.mlp_norm(h_BSD)))
        return output


class VariantDALLE(StoredModel[VariantConfig]):
    """A published transformer: text ids and image tokens in, next-token logits out."""

    kind = KIND
    config_type = VariantConfig

    def __init__(self, config: VariantConfig) -> None:
        super().__init__(config)
        self.variant = variant = VARIANTS[config.variant]
        d, n_image = config.d_model, config.stream.n_image
        self.text_embedding = nn.Embedding(config.n_text_ids, d)
        self.text_position_embedding = nn.Embedding(config.text_len + variant.spare_text_places, d)
        self.image_embedding = nn.Embedding(config.image_vocab, d)
        sizes = [n_image] if variant.places == "table" else [config.grid, config.grid]
        self.place_embeddings = nn.ModuleList(nn.Embedding(size, d) for size in sizes)
        """Of image positions; or of rows, and of columns."""
        self.blocks = nn.ModuleList(VariantBlock(d, config.n_heads, variant) for _ in range(config.n_layers))
        self.final_norm = nn.Sequential(*(nn.LayerNorm(d) for _ in range(variant.n_final_norms)))
        self.text_head = nn.Linear(d, config.n_text_ids, bias=variant.head_bias)
        self.image_head = nn.Linear(d, config.image_vocab, bias=variant.head_bias)

    def forward(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of every position's next token.

        Args:
            text: int64 (B, T), text ids as `VariantConfig.text_rows` makes them.
            image_tokens: int64 (B, I), raster order.

        Returns:
            Text logits, float32 (B, T, V_text), and image logits, float32 (B, I, V_image), of image token i at i.

        Raises:
            ValueError: for a wrong shape or dtype; on the CPU also for ids out of range.
        """
        config = self.config
        check_ids("text", text, config.text_len, config.n_text_ids)
        check_ids("image_tokens", image_tokens, config.stream.n_image, config.image_vocab)
        h_BSD = self.embed(text, image_tokens)
        for block, kind in zip(self.blocks, config.kinds, strict=True):
            h_BSD = block(h_BSD, partial(masked_attention, mask_SS=self.mask(kind)))
        h_BSD = self.final_norm(h_BSD)
        first = config.text_len - (not self.variant.shifted)
        of_image_BID = h_BSD[:, first : first + config.stream.n_image]
        return self.text_head(h_BSD[:, : config.text_len]).float(), self.image_head(of_image_BID).float()

    def embed(self, text_BT: Tensor, tokens_BJ: Tensor) -> Tensor:
        """Return the residual stream before the first layer of all positions that text and tokens are fed to.

        Args:
            text_BT: text ids.
            tokens_BJ: the first J image tokens.

        Returns:
            (B, T+J, D), or, shifted, (B, T+J+1, D), but at most the whole stream.
        """
        if self.variant.shifted:
            text_BT = F.pad(text_BT, (1, 0), value=self.variant.start)
        text_BTD = self.text_embedding(text_BT) + self.text_position_embedding.weight[: text_BT.shape[1]]
        image_BJD = self.image_embedding(tokens_BJ) + self._places()[: tokens_BJ.shape[1]]
        return torch.cat([text_BTD, image_BJD], dim=1)[:, : self.config.stream.length]

    def _places(self) -> Tensor:
        """Return the embedding of the place of every image token, (I, D)."""
        stream = self.config.stream
        if len(self.place_embeddings) == 1:
            output: Tensor = self.place_embeddings[0](torch.arange(stream.n_image, device=self.device))
            return output
        rows, columns = self.place_embeddings
        output = rows(stream.rows(self.device)) + columns(stream.columns(self.device))
        return output

    def image_places(self) -> Tensor:
        """Return the embedding of the place of the token before every image token, (I, D); nothing is before the first.

        A step is fed that token.
        """
        return self._places().roll(1, dims=0)

    def mask(self, kind: Kind) -> Tensor:
        """Return the attention mask of a kind on this model's device, bool (S, S)."""
        config = self.config
        return stored_mask(kind, config.text_len, config.grid, config.conv_kernel, self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.image_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.image_head.weight.dtype


class VariantDecoder(Decoder):
    """Decodes candidates of a published model: reading the prompts already gives the logits of the first token."""

    def __init__(
        self,
        model: VariantDALLE,
        text: Tensor,
        counts: Sequence[int],
        prefix: Tensor | None = None,
        *,
        compile: bool = False,
    ) -> None:
        """Read the prompts; arguments and errors are `Decoder`'s."""
        self._lag = int(not model.variant.shifted)
        """Image positions between the one that a step reads and the token that it predicts."""
        self._first_PV: Tensor | None = None
        """Logits of the prompts' first unknown token, until they are asked for."""
        super().__init__(model, text, counts, prefix, compile=compile)

    @torch.inference_mode()
    def step(self, inputs_B: Tensor) -> Tensor:
        """Advance all candidates by one image token; see `Decoder.step`. The first input after reading is not used."""
        first_PV = self._first_PV
        if first_PV is None or self.position >= self.model.config.stream.n_image:
            return super().step(inputs_B)
        self._first_PV = None
        self.position += 1
        return first_PV[prompts_of(self._counts).to(first_PV.device)]

    def _read(self, text_PT: Tensor, prefix_Pm: Tensor) -> Tensor:
        last_PD = super()._read(text_PT, prefix_Pm)
        self._first_PV = self.model.image_head(self.model.final_norm(last_PD)).float()
        return last_PD

    def _layers(self, i: int) -> list[Any]:
        return super()._layers(i - self._lag)
