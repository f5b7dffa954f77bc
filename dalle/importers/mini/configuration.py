"""What config.json says of a DALL·E mini: which of them is computed here, and sizes to compare the weights with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.family.mini.config import MiniConfig

_COMPUTED: dict[str, Any] = {
    "ln_positions": "normformer",
    "ln_type": "layernorm",
    "use_glu": True,
    "activation_function": "gelu",
    "use_bias": False,
    "use_head_scale": False,
    "use_cosine_attention": False,
    "use_absolute_position_embeddings": True,
    "use_swin_position_embeddings": False,
    "use_deepnet_scaling": False,
    "use_alibi": False,
    "sinkhorn_iters": 1,
    "use_final_ln_encoder": True,
    "use_final_ln_decoder": True,
    "tie_word_embeddings": False,
    "scale_embedding": False,
}
"""The options of the two published models, which are the program's defaults as well
(borisdayma/dalle-mini at f0be4de, src/dalle_mini/model/configuration.py)."""
_SIZES = {
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "d_model": "d_model",
    "encoder_ffn_dim": "d_glu",
    "decoder_ffn_dim": "d_glu",
    "encoder_attention_heads": "n_heads",
    "decoder_attention_heads": "n_heads",
    "max_text_length": "text_len",
    "encoder_vocab_size": "n_text_ids",
    "decoder_start_token_id": "start_of_image",
}
"""What it calls a size, and what `MiniConfig` does."""


def check_computation(said: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if a configuration is of a model that is computed in another way."""
    for name, computed in _COMPUTED.items():
        if name in said and said[name] != computed:
            raise ValueError(
                f"{path} says {name} {said[name]!r}, which is computed in another way than the published DALL·E mini "
                f"and mega, with {name} {computed!r}: it cannot be imported"
            )


def compare_sizes(said: Mapping[str, Any], found: MiniConfig, path: Path) -> None:
    """Raise ValueError if weights have other sizes than the configuration beside them says."""
    for name, ours in _SIZES.items():
        if name in said and said[name] != getattr(found, ours):
            raise ValueError(
                f"{path} says {name} {said[name]!r}, but the weights beside it have {getattr(found, ours)}: "
                "they are of another model"
            )
