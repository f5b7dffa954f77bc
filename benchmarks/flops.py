"""Operations and reads of a decoding step, from the configuration alone: what floors are made of.

Training's are in training/plan/flops.py, which says how they are counted.
"""

from dalle.model import DALLEConfig
from training.plan.flops import attended, block_weights


def decoding_flops(config: DALLEConfig) -> int:
    """Return the operations of one candidate's step without attention: 2 for each weight of layers and image head."""
    return 2 * read_weights(config)


def read_weights(config: DALLEConfig) -> int:
    """Return the weights that a step reads, whatever the number of candidates: of layers and image head."""
    return block_weights(config) + config.d_model * config.image_vocab


def read_cache(config: DALLEConfig, n: int) -> float:
    """Return the keys and values that a step of n candidates of one caption has to read, on average over the picture.

    Numbers, not bytes: the caption's once, and every candidate's own image keys that the masks allow.
    """
    T, stream = config.text_len, config.stream
    on_text = len(config.kinds) * (T * (T + 1) // 2 + stream.n_image * T)
    image_keys = (attended(config) - on_text) / stream.n_image
    return 2 * config.d_model * (config.n_layers * T + n * image_keys)
