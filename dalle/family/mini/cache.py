"""Keys and values of DALL·E mini while decoding: captions read once, then one image position a step for all candidates.

All candidates of a prompt share its caption: its keys and values in every layer are computed once and held once per
prompt. Those of image positions belong to a candidate, in preallocated places. A step has the interface of
`dalle.cache.Decoder`, and computes with the modules of training.

Legend: P prompts  n candidates of one prompt  B all candidates  T text positions  I image positions
        L image positions that a step reads  m image positions known beforehand  D width  H heads  K head dim
        V vocabulary
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.cache import CompiledSteps, Groups, counts_left, groups_of, prompts_of
from dalle.family.mini.model import DALLEMini
from dvae.compilation import can_compile
from storage.models.stored import n_weights


class _Layer(NamedTuple):
    """The memory that one layer reads and writes."""

    text_keys: Tensor
    """(P, H, T, K)."""
    text_values: Tensor
    """(P, H, T, K)."""
    keys: Tensor
    """(B, H, I, K)."""
    values: Tensor
    """(B, H, I, K)."""


class _Place(NamedTuple):
    """What differs from step to step."""

    slot: Tensor
    """int64 (1,): the image position."""
    embedding: Tensor
    """(D,): of the position."""
    bias: Tensor | None
    """(1, 1, 1, I): 0 for positions up to this one, else -inf; None if only those are read."""
    length: int
    """L: a compiled step reads all positions, so that it is compiled once."""


def candidate_bytes(model: DALLEMini) -> int:
    """Return the memory of one candidate's keys and values."""
    config = model.config
    return 2 * config.decoder_layers * config.stream.n_image * config.d_model * model.dtype.itemsize


def caption_bytes(model: DALLEMini) -> int:
    """Return the memory of a caption: keys and values of all layers, and the peak of reading it."""
    config = model.config
    kept = 2 * config.decoder_layers * config.d_model
    wide = max(3 * config.d_glu, config.n_heads * config.text_len) + 2 * config.d_model
    return config.text_len * (kept + wide) * model.dtype.itemsize


def n_step_weights(model: DALLEMini) -> int:
    """Return how many weights a candidate is multiplied with at each image position."""
    blocks = model.decoder.layers()
    return (
        sum(n_weights(block) - n_weights(block.cross.key_value) for block in blocks) + model.image_head.used().numel()
    )


class MiniDecoder:
    """Decodes a batch of candidates, one image position at a time: see `dalle.cache.Decoder`."""

    def __init__(
        self,
        model: DALLEMini,
        text: Tensor,
        counts: Sequence[int],
        prefix: Tensor | None = None,
        *,
        compile: bool = False,
    ) -> None:
        """Read the prompts; arguments and errors are those of `Decoder`, but steps on a GPU are not recorded."""
        if len(counts) != len(text) or min(counts) < 1:
            raise ValueError(f"{len(counts)} counts for {len(text)} prompts: expected one count per prompt, at least 1")
        if prefix is None:
            prefix = text.new_empty((len(text), 0))
        self.model = model
        self.position = prefix.shape[1]
        """The image position that the next step predicts."""
        self._counts = list(counts)
        is_compiled = compile and can_compile(model.device) and model.device.type == "cpu"
        self._step: Callable[..., Tensor] = _compiled_steps() if is_compiled else _step
        self._is_compiled = is_compiled
        with torch.inference_mode():
            self._head_VD = model.image_head.used().float()
            self._slots_I = torch.arange(model.config.stream.n_image, device=model.device)
            self._layers: list[_Layer] = []
            self._read(text, prefix)

    @torch.inference_mode()
    def step(self, inputs_B: Tensor) -> Tensor:
        """Advance all candidates by one image position.

        Args:
            inputs_B: int64 (B,), the image token before this position; at position 0 start of image is fed whatever
                it is.

        Returns:
            Logits of the image token at this position, float32 (B, V).

        Raises:
            ValueError: all positions are decoded.
        """
        i, config = self.position, self.model.config
        if i >= config.stream.n_image:
            raise ValueError(f"all {i} image tokens are decoded")
        inputs_B = torch.full_like(inputs_B, config.start_of_image) if i == 0 else inputs_B.contiguous()
        logits_BV = self._step(
            self.model, groups_of(self._counts), inputs_B, self._place(i), self._is_text, self._layers
        )
        self.position += 1
        return F.linear(logits_BV.float(), self._head_VD)

    @torch.inference_mode()
    def keep(self, candidates: Tensor) -> None:
        """Drop all but some candidates; arguments and errors are those of `Decoder.keep`."""
        self._counts = counts_left(self._counts, candidates)
        kept = candidates.to(self.model.device)
        for number, layer in enumerate(self._layers):
            self._layers[number] = layer._replace(
                keys=layer.keys.index_select(0, kept), values=layer.values.index_select(0, kept)
            )

    @torch.inference_mode()
    def reorder(self, candidates: Tensor) -> None:
        """Let every candidate go on from another; see `Decoder.reorder`."""
        for layer in self._layers:
            for memory in (layer.keys, layer.values):
                memory.copy_(memory.index_select(0, candidates))

    def _place(self, i: int) -> _Place:
        slot, embedding_D = self._slots_I[i : i + 1], self.model.decoder.position_embedding.weight[i]
        if not self._is_compiled:
            return _Place(slot, embedding_D, None, i + 1)
        bias_I = torch.zeros(len(self._slots_I), dtype=self.model.dtype).masked_fill(self._slots_I > i, -torch.inf)
        return _Place(slot, embedding_D, bias_I.view(1, 1, 1, -1), len(self._slots_I))

    def _read(self, text_PT: Tensor, prefix_Pm: Tensor) -> None:
        """Encode the captions, and run the known image positions through the decoder, keeping keys and values."""
        model, config = self.model, self.model.config
        m, prompt_of_B = prefix_Pm.shape[1], prompts_of(self._counts).to(model.device, non_blocking=True)
        encoded_PTD, self._is_text = model.encoder(text_PT)
        h_PmD = model.decoder.embed(model.inputs(prefix_Pm))
        for block in model.decoder.layers():
            # contiguous: a view would keep keys and values together, and be slow to read
            text_keys, text_values = (x.contiguous() for x in block.told(encoded_PTD))
            shape = (len(prompt_of_B), config.n_heads, config.stream.n_image, config.d_head)
            keys, values = (h_PmD.new_zeros(shape) for _ in range(2))
            self._layers.append(_Layer(text_keys, text_values, keys, values))
            if m:
                q, k, v = block.own(h_PmD)
                keys[:, :, :m], values[:, :, :m] = k.index_select(0, prompt_of_B), v.index_select(0, prompt_of_B)
                h_PmD = block.with_own(h_PmD, F.scaled_dot_product_attention(q, k, v, is_causal=True))
                told = F.scaled_dot_product_attention(
                    block.asked(h_PmD), text_keys, text_values, attn_mask=self._is_text
                )
                h_PmD = block.with_told(h_PmD, told)


def _step(
    model: DALLEMini, groups: Groups, inputs_B: Tensor, place: _Place, is_text_P11T: Tensor, layers: Sequence[_Layer]
) -> Tensor:
    """Return the head's input (B, D) at one image position, writing its keys and values."""
    decoder = model.decoder
    h_B1D = decoder.embedding_norm(decoder.embedding(inputs_B[:, None]) + place.embedding)
    for block, layer in zip(decoder.layers(), layers, strict=True):
        q, k, v = block.own(h_B1D)
        layer.keys.index_copy_(2, place.slot, k)
        layer.values.index_copy_(2, place.slot, v)
        keys, values = layer.keys[:, :, : place.length], layer.values[:, :, : place.length]
        h_B1D = block.with_own(h_B1D, F.scaled_dot_product_attention(q, keys, values, attn_mask=place.bias))
        h_B1D = block.with_told(h_B1D, _told(block.asked(h_B1D), layer, is_text_P11T, groups))
    output_BD: Tensor = decoder.final_norm(h_B1D)[:, 0]
    return output_BD


def _told(q_BH1K: Tensor, layer: _Layer, is_text_P11T: Tensor, groups: Groups) -> Tensor:
    """Return what candidates find in their prompts' captions, (B, H, 1, K), without a copy per candidate."""
    found: list[Tensor] = []
    prompt = candidate = 0
    for n_prompts, n in groups:
        here = slice(prompt, prompt + n_prompts)
        q_BHK = q_BH1K[candidate : candidate + n_prompts * n, :, 0]
        q_PHnK = q_BHK.view(n_prompts, n, *q_BHK.shape[1:]).transpose(1, 2)
        found_PHnK = F.scaled_dot_product_attention(
            q_PHnK, layer.text_keys[here], layer.text_values[here], attn_mask=is_text_P11T[here]
        )
        found.append(found_PHnK.transpose(1, 2).flatten(0, 1)[:, :, None])
        prompt, candidate = prompt + n_prompts, candidate + n_prompts * n
    return found[0] if len(found) == 1 else torch.cat(found)


@lru_cache(maxsize=1)
def _compiled_steps() -> CompiledSteps:
    return CompiledSteps(_step)
