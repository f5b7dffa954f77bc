"""What the weights of a CLIP do not show: activation, heads and how it sees pictures, from the files beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from rerank.blocks import Activation
from rerank.pixels import PIXEL_MEAN, PIXEL_STD, Interpolation, Resize
from storage.text import parse_json

HEAD_WIDTH = 64
"""Width of an attention head in OpenAI's models, and where nothing else is said."""

_PLAIN: dict[str, dict[str, Any]] = {
    "model": {"init_logit_bias": None, "multimodal_cfg": None},
    "vision": {
        "timm_model_name": None,
        "ls_init_value": None,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "global_average_pool": False,
        "input_patchnorm": False,
    },
    "text": {
        "hf_model_name": None,
        "hf_tokenizer_name": None,
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
        "embed_cls": False,
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "ls_init_value": None,
    },
}
"""What open_clip's configurations say of a plain CLIP, where they say it; another value is another computation."""
_EITHER = {
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": "default",
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_FREE = {
    "model": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
    | {"nonscalar_logit_scale", "output_dict", "cast_dtype"},
    "vision": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
    | {"attn_pooler_queries", "attn_pooler_heads", "output_tokens", "timm_model_pretrained", "timm_pool"}
    | {"timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"},
    "text": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"}
    | {"output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}
"""Sizes, which the weights show, and what only training uses."""


_SIZES = {
    "vision": {"width": "vision_width", "layers": "vision_layers", "patch_size": "patch_size"}
    | {"image_size": "image_size"},
    "text": {"width": "text_width", "layers": "text_layers", "context_length": "context_length"}
    | {"vocab_size": "vocab_size"},
}
"""Our names of open_clip's sizes."""
_HUGGING_FACE_SIZES = {
    "vision": {"hidden_size": "vision_width", "num_hidden_layers": "vision_layers", "patch_size": "patch_size"}
    | {"image_size": "image_size", "intermediate_size": "vision_mlp"},
    "text": {"hidden_size": "text_width", "num_hidden_layers": "text_layers", "vocab_size": "vocab_size"}
    | {"max_position_embeddings": "context_length", "intermediate_size": "text_mlp"},
}


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """What the weights do not show."""

    activation: Activation
    vision_heads: int | None = None
    """None: a head for every 64."""
    text_heads: int | None = None
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Sizes that the configuration states, by our names; those of the weights must be the same."""
    origin: str = ""
    """Where this comes from, in words."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content


def open_clip_unseen(path: Path) -> Unseen:
    """Read a configuration of open_clip: open_clip_config.json, or one of the package's model_configs.

    Raises:
        ValueError: it is something else, or of a CLIP that is computed in another way.
    """
    content = read_json(path)
    model = _object(path, content, "model_cfg", default=content)
    vision, text = (_object(path, model, f"{tower}_cfg") for tower in ("vision", "text"))
    for part, values in (("model", model), ("vision", vision), ("text", text)):
        plain = _PLAIN[part] | (_EITHER if part != "model" else {})
        for key, value in values.items():
            if key not in plain and key not in _FREE[part]:
                raise ValueError(f"{path}: {key} is unknown here, and might change what is computed; not read")
            if key in plain and value not in (None, plain[key], {}):
                raise ValueError(
                    f"{path}: {key} is {value!r}: such a CLIP is not read here, only plain ones "
                    f"({key} {json.dumps(plain[key])})"
                )
    head_width = _whole(path, vision, "head_width", HEAD_WIDTH)
    width = _whole(path, vision, "width", 768)
    is_resnet = isinstance(vision.get("layers"), list)
    unseen = Unseen(
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        vision_heads=(32 * width if is_resnet else width) // head_width,
        text_heads=_whole(path, text, "heads", 8),
        sizes=_sizes(vision, _SIZES["vision"]) | _sizes(text, _SIZES["text"]) | {"vision_width": width},
        origin=path.name,
    )
    return _with_preprocessing(path, unseen, _object(path, content, "preprocess_cfg", default={}))


def _with_preprocessing(path: Path, unseen: Unseen, values: Mapping[str, Any]) -> Unseen:
    """Add what open_clip's preprocess_cfg says."""
    if values.get("fill_color") or values.get("mode", "RGB") != "RGB":
        raise ValueError(f"{path}: pictures filled with another colour than black, or not RGB, are not read here")
    interpolation = values.get("interpolation") or "bicubic"
    return replace(
        unseen,
        pixel_mean=_three(path, values.get("mean") or PIXEL_MEAN),
        pixel_std=_three(path, values.get("std") or PIXEL_STD),
        resize=_one_of(path, "resize_mode", values.get("resize_mode") or "shortest", get_args(Resize)[1:]),
        # "random" is of training; open_clip uses bicubic then
        interpolation=_one_of(
            path, "interpolation", "bicubic" if interpolation == "random" else interpolation, get_args(Interpolation)
        ),
    )


def hugging_face_unseen(path: Path) -> Unseen:
    """Read config.json of Hugging Face, and preprocessor_config.json beside it, if it is there.

    Raises:
        ValueError: it is something else, or of a CLIP that is computed in another way.
    """
    content = read_json(path)
    if content.get("model_type") != "clip":
        raise ValueError(f"{path} is of a model of type {content.get('model_type')!r}: expected 'clip'")
    # older files have each twice, and what is in the second counts
    towers = [
        _object(path, content, f"{tower}_config") | _object(path, content, f"{tower}_config_dict", default={})
        for tower in ("text", "vision")
    ]
    activations = [tower.get("hidden_act", "quick_gelu") for tower in towers]
    if activations[0] != activations[1]:
        raise ValueError(f"{path}: the towers have different activations, {activations}: not read here")
    for tower in towers:
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{path}: layer_norm_eps is {tower['layer_norm_eps']}: only 1e-5 is read here")
    text_heads, vision_heads = (
        _whole(path, tower, "num_attention_heads", default) for tower, default in zip(towers, (8, 12), strict=True)
    )
    unseen = Unseen(
        activation=_one_of(path, "hidden_act", activations[0], get_args(Activation)),
        vision_heads=vision_heads,
        text_heads=text_heads,
        sizes=_sizes(towers[0], _HUGGING_FACE_SIZES["text"]) | _sizes(towers[1], _HUGGING_FACE_SIZES["vision"]),
        origin=path.name,
    )
    beside = path.with_name("preprocessor_config.json")
    return _with_processor(beside, unseen) if beside.is_file() else unseen


def _with_processor(path: Path, unseen: Unseen) -> Unseen:
    """Add what preprocessor_config.json says."""
    values = read_json(path)
    is_squash = isinstance(values.get("size"), dict) and "height" in values["size"]
    resample = values.get("resample", 3)
    if resample not in (2, 3):
        raise ValueError(f"{path}: resample is {resample!r}; expected 3 (bicubic) or 2 (bilinear)")
    for name in ("do_resize", "do_rescale", "do_normalize", *(() if is_squash else ("do_center_crop",))):
        if values.get(name) not in (None, True):
            raise ValueError(f"{path}: {name} is {values[name]!r}: a CLIP without it is not read here")
    factor = 1 / 255 if values.get("rescale_factor") is None else values["rescale_factor"]
    if type(factor) not in (int, float) or abs(255 * factor - 1) > 1e-6:
        raise ValueError(f"{path}: rescale_factor is {factor!r}; expected 1/255")
    sides = {name: _side(path, values, name) for name in ("size", "crop_size") if values.get(name) is not None}
    image_size = unseen.sizes.get("image_size", next(iter(sides.values()), None))
    for name, side in sides.items():
        if side != image_size:
            raise ValueError(
                f"{path}: {name} is {side}, but the model's pictures have {image_size}: such a CLIP is not read here"
            )
    return replace(
        unseen,
        pixel_mean=_three(path, values.get("image_mean") or PIXEL_MEAN),
        pixel_std=_three(path, values.get("image_std") or PIXEL_STD),
        resize="squash" if is_squash else "shortest",
        interpolation="bicubic" if resample == 3 else "bilinear",
        sizes=unseen.sizes if image_size is None else {**unseen.sizes, "image_size": image_size},
        origin=f"{unseen.origin}, {path.name}",
    )


def _side(path: Path, values: Mapping[str, Any], name: str) -> int:
    """Return the side of pictures, in pixels, that a size says: 224, {"shortest_edge": 224} or height and width."""
    value = values[name]
    sides = list(value.values()) if isinstance(value, dict) else [value]
    known = not isinstance(value, dict) or set(value) in ({"shortest_edge"}, {"height", "width"})
    if not known or len(set(map(repr, sides))) != 1:
        raise ValueError(f"{path}: {name} is {value!r}; expected one side, in pixels")
    return _whole(path, {name: sides[0]}, name, 0)


def _sizes(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """Return the sizes that a configuration states as whole numbers, by our names."""
    return {ours: values[theirs] for theirs, ours in names.items() if type(values.get(theirs)) is int}


def _object(
    path: Path, content: Mapping[str, Any], name: str, *, default: dict[str, Any] | None = None
) -> dict[str, Any]:
    value = default if content.get(name) is None else content[name]
    if not isinstance(value, dict):
        raise ValueError(f"{path} has no {name}: expected the configuration of a CLIP")
    return value


def _whole(path: Path, values: Mapping[str, Any], name: str, default: int) -> int:
    value = values.get(name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name} is {value!r}; expected a whole number above 0")
    return value


def _three(path: Path, values: Any) -> tuple[float, ...]:
    values = [values] * 3 if isinstance(values, int | float) else values
    if not isinstance(values, list | tuple) or [type(value) for value in values] not in ([float] * 3, [int] * 3):
        raise ValueError(f"{path}: mean or std is {values!r}; expected three numbers")
    return tuple(float(value) for value in values)


def _one_of(path: Path, name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{path}: {name} is {value!r}; expected {' or '.join(known)}")
    return value
