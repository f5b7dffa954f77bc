"""Keys and values while decoding: captions read once, then one image position at a time for all candidates.

The text of a prompt looks the same to all its candidates, so its keys and values are held once per prompt.
Image keys and values belong to a candidate, and each layer reads only the positions that its attention kind
lets it see.

The blocks and their projections are those of training; only how queries meet keys differs. A step costs one
pass over the weights, whatever the number of candidates. Memory: 2 · n_layers · I · D numbers per candidate
and 2 · n_layers · T · D per prompt (in bfloat16 1.04 GB and 0.26 GB for the 12-billion-parameter model).

Legend: P prompts  n candidates of one prompt  B all candidates  T text positions  I image positions
        J image positions a layer reads  m image positions known beforehand  S a layer's keys = T+J
        D width  H heads  K head dim  V vocabulary  Y, Z any
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from dalle.attention import keys, masked_attention
from dalle.model import DALLE
from dalle.stream import image_inputs


class Decoder:
    """A batch of candidates on their way from prompt to picture.

    >>> decoder = Decoder(model, text, counts=[4, 4])
    >>> logits = decoder.step(inputs)               # of image position 0, for 8 candidates
    """

    def __init__(self, model: DALLE, text: Tensor, counts: Sequence[int], prefix: Tensor | None = None) -> None:
        """Read the prompts.

        Args:
            model: the transformer; its device and dtype are used.
            text: int64 (P, T), text ids of the prompts.
            counts: how many candidates each prompt has; candidates are numbered prompt by prompt.
            prefix: int64 (P, m), image tokens of the prompts that are known beforehand; None for none.
        """
        config = model.config
        if len(counts) != len(text):
            raise ValueError(f"{len(counts)} counts for {len(text)} prompts: expected one count per prompt")
        if prefix is None:
            prefix = text.new_empty((len(text), 0))
        n_candidates = sum(counts)
        size = (n_candidates, config.n_heads, config.stream.n_image, config.d_head)
        self.model = model
        self.position = prefix.shape[1]
        """The image position that the next step predicts."""
        self._groups = [(len(list(same)), n) for n, same in groupby(counts)]
        self._counts_P = torch.tensor(counts, device=model.device)
        self._text_keys: list[Tensor] = []
        self._text_values: list[Tensor] = []
        self._image_keys = [torch.empty(size, device=model.device, dtype=model.dtype) for _ in config.kinds]
        self._image_values = [torch.empty_like(k_BHIK) for k_BHIK in self._image_keys]
        self._read(text, prefix)

    @torch.inference_mode()
    def step(self, inputs_B: Tensor) -> Tensor:
        """Advance all candidates by one image position.

        Args:
            inputs_B: int64 (B,), the image token before this position; start of image at position 0.

        Returns:
            Logits of the image token at this position, float32 (B, V).
        """
        model, config, position = self.model, self.model.config, self.position
        if position >= config.stream.n_image:
            raise ValueError(f"all {config.stream.n_image} image tokens are decoded")
        seen = {
            kind: torch.tensor(keys(kind, position, config.grid, config.conv_kernel), device=model.device)
            for kind in set(config.kinds)
        }
        h_B1D = model.embed_image(inputs_B[:, None], first=position)
        for layer, (block, kind) in enumerate(zip(model.blocks, config.kinds, strict=True)):
            h_B1D = block(h_B1D, partial(self._attend, layer, seen[kind]))
        self.position += 1
        output: Tensor = model.image_head(model.final_norm(h_B1D))[:, 0]
        return output

    @torch.inference_mode()
    def _read(self, text_PT: Tensor, prefix_Pm: Tensor) -> None:
        """Run all known positions of the prompts through the model at once, keeping keys and values."""
        model, config = self.model, self.model.config
        inputs_Pm = image_inputs(prefix_Pm, config.image_vocab)
        h_PSD = torch.cat([model.embed_text(text_PT), model.embed_image(inputs_Pm)], dim=1)
        length = h_PSD.shape[1]
        for layer, (block, kind) in enumerate(zip(model.blocks, config.kinds, strict=True)):
            mask_SS = model.mask(kind)[:length, :length]
            h_PSD = block(h_PSD, partial(self._read_attend, layer, mask_SS))

    def _read_attend(self, layer: int, mask_SS: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep a layer's keys and values of the known positions, (P, H, T+m, K); attend as in training."""
        T, m = self.model.config.text_len, self.position
        # Contiguous copies: a view would keep the layer's queries, keys and values alive together.
        self._text_keys.append(k[:, :, :T].clone(memory_format=torch.contiguous_format))
        self._text_values.append(v[:, :, :T].clone(memory_format=torch.contiguous_format))
        self._image_keys[layer][:, :, :m] = k[:, :, T:].repeat_interleave(self._counts_P, dim=0)
        self._image_values[layer][:, :, :m] = v[:, :, T:].repeat_interleave(self._counts_P, dim=0)
        return masked_attention(q, k, v, mask_SS)

    def _attend(self, layer: int, seen_J: Tensor, q_BH1K: Tensor, k_BH1K: Tensor, v_BH1K: Tensor) -> Tensor:
        """Attend to the prompt's text and the image positions `seen_J`, from the current one; (B, H, 1, K)."""
        self._image_keys[layer][:, :, self.position] = k_BH1K[:, :, 0]
        self._image_values[layer][:, :, self.position] = v_BH1K[:, :, 0]
        k_BHJK = self._image_keys[layer].index_select(2, seen_J)
        v_BHJK = self._image_values[layer].index_select(2, seen_J)
        q_BH1K = q_BH1K * q_BH1K.shape[-1] ** -0.5
        text_k_PHKT = self._text_keys[layer].transpose(2, 3)
        scores_BH1S = torch.cat([self._per_prompt(q_BH1K, text_k_PHKT), q_BH1K @ k_BHJK.transpose(2, 3)], dim=-1)
        weights_BH1S = scores_BH1S.softmax(-1, dtype=torch.float32).to(v_BHJK.dtype)
        T = self.model.config.text_len
        return self._per_prompt(weights_BH1S[..., :T], self._text_values[layer]) + weights_BH1S[..., T:] @ v_BHJK

    def _per_prompt(self, x_BH1Y: Tensor, matrix_PHYZ: Tensor) -> Tensor:
        """Return candidates' rows times their prompts' matrices, (B, H, 1, Z), without a copy per candidate."""
        products: list[Tensor] = []
        prompt = candidate = 0
        for n_prompts, n in self._groups:
            rows_BHY = x_BH1Y[candidate : candidate + n_prompts * n, :, 0]
            x_PnHY = rows_BHY.reshape(n_prompts, n, *rows_BHY.shape[1:])
            product_PHnZ = x_PnHY.transpose(1, 2) @ matrix_PHYZ[prompt : prompt + n_prompts]
            products.append(product_PHnZ.transpose(1, 2).flatten(0, 1))
            prompt, candidate = prompt + n_prompts, candidate + n_prompts * n
        return torch.cat(products)[:, :, None]
