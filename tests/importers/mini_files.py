"""A tiny DALL·E mini of random weights in the formats in which they are published, made by hand."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from dalle.family.mini.config import MiniConfig
from dalle.family.mini.model import DALLEMini

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXTS = ["a red cube on a blue cube", "a green sphere left of a red cube", "the quick brown fox, 1,000 times"]
SIZES = {"encoder_layers": 2, "decoder_layers": 3, "d_model": 128, "n_heads": 2, "d_glu": 72, "text_len": 12}
N_TEXT, IMAGE_VOCAB, N_IMAGE = 330, 32, 41


def vocabulary(folder: Path, suffix: str = "") -> Path:
    """vocab.json and merges.txt of a byte-level BPE, as Hugging Face writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer=trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = {**model["vocab"], "<mask>": len(model["vocab"])}
    (folder / f"vocab{suffix}.json").write_text(json.dumps(vocab, ensure_ascii=False))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / f"merges{suffix}.txt").write_text("\n".join(merges))
    return folder


def random_mini(**changed: Any) -> DALLEMini:
    """A model in which every weight matters, each of them a number of float16."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "n_text_ids": N_TEXT, "n_image_ids": N_IMAGE, "image_vocab": IMAGE_VOCAB}
    sizes |= {"text_vocab": 320, "start_of_image": IMAGE_VOCAB, **changed}
    model = DALLEMini(MiniConfig(**sizes)).eval().requires_grad_(False)
    for weight in model.parameters():
        scale = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
        drawn = torch.randn_like(weight) * scale
        weight.copy_((weight + drawn if weight.ndim == 1 else drawn).half().float())
    return model


def published_state(model: DALLEMini) -> "OrderedDict[str, Tensor]":
    """The weights under min-dalle's names (kuprel/min-dalle at 73621fb), encoder and decoder in one."""
    d, state = model.config.d_model, OrderedDict[str, Tensor]()

    def norm(name: str, module: Any) -> None:
        state[f"{name}.bias"] = module.bias
        if module.weight is not None:
            state[f"{name}.weight"] = module.weight

    for tower in ("encoder", "decoder"):
        part: Any = getattr(model, tower)
        state[f"{tower}.embed_tokens.weight"] = part.embedding.weight
        state[f"{tower}.embed_positions.weight"] = part.position_embedding.weight
        norm(f"{tower}.layernorm_embedding", part.embedding_norm)
        norm(f"{tower}.final_ln", part.final_norm)
        for i, block in enumerate(part.blocks):
            at = f"{tower}.layers.{i}"
            norm(f"{at}.pre_self_attn_layer_norm", block.attention_norm)
            norm(f"{at}.self_attn_layer_norm", block.attention_out_norm)
            for letter, rows in zip("qkv", block.attention.qkv.weight.split(d), strict=True):
                state[f"{at}.self_attn.{letter}_proj.weight"] = rows
            state[f"{at}.self_attn.out_proj.weight"] = block.attention.out.weight
            if tower == "decoder":
                norm(f"{at}.pre_encoder_attn_layer_norm", block.cross_norm)
                norm(f"{at}.encoder_attn_layer_norm", block.cross_out_norm)
                state[f"{at}.encoder_attn.q_proj.weight"] = block.cross.query.weight
                for letter, rows in zip("kv", block.cross.key_value.weight.split(d), strict=True):
                    state[f"{at}.encoder_attn.{letter}_proj.weight"] = rows
                state[f"{at}.encoder_attn.out_proj.weight"] = block.cross.out.weight
            norm(f"{at}.glu.ln0", block.glu.norm)
            norm(f"{at}.glu.ln1", block.glu.middle_norm)
            for number, rows in enumerate(block.glu.wide.weight.split(model.config.d_glu)):
                state[f"{at}.glu.fc{number}.weight"] = rows
            state[f"{at}.glu.fc2.weight"] = block.glu.out.weight
    state["decoder.lm_head.weight"] = model.decoder.head.weight
    return state


def as_converted(state: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """What min-dalle's converter saves of a tower: float16, matrices as transposed views of all layers' storage."""
    names = [name.removeprefix(f"{tower}.") for name in state if name.startswith(f"{tower}.")]
    of_layers: dict[str, list[int]] = {}
    saved = {}
    for name in names:
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            of_layers.setdefault(rest, []).append(int(number))
        else:
            value = state[f"{tower}.{name}"].half()
            saved[name] = value.T.contiguous().T if "lm_head" in name else value
    for rest, numbers in of_layers.items():
        layers = [state[f"{tower}.layers.{number}.{rest}"].half() for number in numbers]
        stacked = torch.stack([layer.T if layer.ndim == 2 else layer for layer in layers])
        for number in numbers:
            saved[f"layers.{number}.{rest}"] = stacked[number].T if layers[0].ndim == 2 else stacked[number]
    return saved


def min_dalle(folder: Path, model: DALLEMini, suffix: str = "") -> Path:
    """The folder of a min-dalle, without its detokenizer."""
    vocabulary(folder, suffix)
    for tower in ("encoder", "decoder"):
        torch.save(as_converted(published_state(model), tower), folder / f"{tower}{suffix}.pt")
    return folder


FLAX = {
    "pre_self_attn_layer_norm": "LayerNorm_0",
    "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2",
    "encoder_attn_layer_norm": "LayerNorm_3",
    "self_attn": "FlaxBartAttention_0",
    "encoder_attn": "FlaxBartAttention_1",
    "glu": "GLU_0",
    "ln0": "LayerNorm_0",
    "ln1": "LayerNorm_1",
    "fc0": "Dense_0",
    "fc1": "Dense_1",
    "fc2": "Dense_2",
}
CONFIG = {
    "model_type": "dallebart",
    "ln_positions": "normformer",
    "ln_type": "layernorm",
    "use_glu": True,
    "use_bias": False,
    "force_ln_scale": False,
    "normalize_text": True,
    "max_text_length": SIZES["text_len"],
    "image_length": 256,
    "image_vocab_size": N_IMAGE - 1,
    "decoder_start_token_id": 35,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_vocab_size": N_TEXT,
}


def flax_tree(model: DALLEMini, *, is_stacked: bool) -> dict[str, Any]:
    """The weights as flax has them: kernels of (in, out), and with scan all layers in one array."""
    tree: dict[str, Any] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, value in published_state(model).items():
        tower, *parts, leaf = name.split(".")
        is_norm = value.ndim == 1
        leaf = "embedding" if "embed_" in name else {"weight": "scale", "bias": "bias"}[leaf] if is_norm else "kernel"
        value = value.T if leaf == "kernel" else value
        if parts[0] == "lm_head":
            _put(tree, ["lm_head", "kernel"], value)
        elif parts[0] != "layers":
            _put(tree, ["model", tower, *parts, leaf], value)
        else:
            number, inner = parts[1], [FLAX.get(part, part) for part in parts[2:]]
            kind = f"FlaxBart{tower.capitalize()}Layer"
            if is_stacked:
                stacks.setdefault("/".join(["model", tower, "layers", f"{kind}s", *inner, leaf]), []).append(value)
            else:
                _put(tree, ["model", tower, "layers", f"{kind}_{number}", *inner, leaf], value)
    for path, values in stacks.items():
        _put(tree, path.split("/"), torch.stack(values))
    return tree


def _put(tree: dict[str, Any], path: list[str], value: Tensor) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value.contiguous().numpy()


def pack(tree: dict[str, Any]) -> bytes:
    """As flax/serialization.py does."""

    def array(value: Any) -> Any:
        assert isinstance(value, np.ndarray)
        return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))

    packed: bytes = msgpack.packb(tree, default=array)
    return packed


def dalle_mini(folder: Path, model: DALLEMini, *, is_stacked: bool = True, **changed: Any) -> Path:
    """The folder of a published model."""
    vocabulary(folder)
    (folder / "flax_model.msgpack").write_bytes(pack(flax_tree(model, is_stacked=is_stacked)))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    return folder
