"""Operations that the transformer's arithmetic cannot do without, from the configuration alone.

A matrix product of m×k by k×n is 2·m·k·n. Attention is counted with the keys that the mask allows, twice (scores,
values). A backward pass has one product for the gradient of each factor, twice the forward pass; that of attention
has five products to the forward pass's two, since the scores, which nobody stores, are computed again. Softmax,
norms, activations and the optimizer count as nothing.
"""

from collections import Counter

from dalle.attention import mask
from dalle.model import DALLEConfig


def attended(config: DALLEConfig) -> int:
    """Return the pairs of query and key that the masks allow, summed over the layers, of one sample."""
    return sum(
        n_layers * int(mask(kind, config.text_len, config.grid, config.conv_kernel).sum())
        for kind, n_layers in Counter(config.kinds).items()
    )


def block_weights(config: DALLEConfig) -> int:
    """Return the entries of the matrices of all layers: 12·D² each."""
    return config.n_layers * 12 * config.d_model**2


def linear_flops(config: DALLEConfig) -> int:
    """Return the operations of one sample's forward pass but for attention: layers, and each position's head."""
    stream, d = config.stream, config.d_model
    heads = 2 * d * (config.text_len * config.text_vocab + stream.n_image * config.image_vocab)
    return 2 * block_weights(config) * stream.length + heads


def attention_flops(config: DALLEConfig) -> int:
    """Return the operations of one sample's attention in the forward pass: scores, and the weighted values."""
    return 2 * 2 * config.d_model * attended(config)


def training_flops(config: DALLEConfig) -> int:
    """Return the operations of one sample's forward and backward pass: 251 GFLOP for the benchmarks' shape."""
    return 3 * linear_flops(config) + attention_flops(config) * 7 // 2
