"""Published CLIPs, from OpenAI's files, open_clip's and Hugging Face's, into a CLIP of ours; nothing in them is run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.importers.clip_configs import HEAD_WIDTH, Unseen, hugging_face_unseen, open_clip_unseen, read_json
from dalle.importers.clip_names import Style, find_clip, left_out, sources
from dalle.importers.clip_vocabulary import read_vocabulary
from dalle.importers.licence import stated_licence
from rerank import CLIP, CLIPConfig
from rerank.blocks import Activation
from storage.checkpoints.tensors import Tensors, open_tensors, sha256, summary
from storage.models.directory import load_weights

PUBLISHED = {
    "40d36571": "ViT-B/32",
    "5806e77c": "ViT-B/16",
    "b8cca3fd": "ViT-L/14",
    "3035c92b": "ViT-L/14@336px",
    "afeb0e10": "RN50",
    "8fa8567b": "RN101",
    "7e526bd1": "RN50x4",
    "52378b40": "RN50x16",
    "be1cfb55": "RN50x64",
}
"""OpenAI's nine models by the first digits of their files' sha256 (openai/CLIP at d05afc4, clip/clip.py)."""
OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG = "open_clip_config.json", "config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Names of weights in a folder, the first that is there is read."""


@dataclass(frozen=True, kw_only=True)
class ImportedCLIP:
    """A CLIP, and what is to be said about it."""

    clip: CLIP
    """On the CPU, in evaluation mode, float32."""
    weights: Path
    """The file that was read."""
    sha256: str
    """Of that file."""
    format: str
    """Of that file, in words."""
    name: str
    """What OpenAI calls it; "" for all others."""
    origin: str
    """Where activation and view of pictures come from."""
    left: Sequence[str]
    """Names of what was not used."""
    licence: str
    """Of the weights, as far as it is known here."""

    def __str__(self) -> str:
        """Return several lines for people."""
        config = self.clip.config
        n_parameters = sum(parameter.numel() for parameter in self.clip.parameters())
        heads = f"{config.vision_heads} and {config.text_heads} heads"
        return "\n".join(
            [
                f"read:     {self.weights}, {self.format}, sha256 {self.sha256[:16]}…",
                f"model:    {self.name or 'CLIP'}, {n_parameters:,} parameters, {heads}, "
                f"pictures of {config.image_size} pixels, {config.context_length} positions of text",
                f"assumed:  {config.activation}; pictures: {config.resize}, {config.interpolation}, "
                f"mean {_shown(config.pixel_mean)}, deviation {_shown(config.pixel_std)} ({self.origin})",
                f"left:     {summary(list(self.left), depth=2) or 'nothing'}",
                f"licence:  {self.licence}",
            ]
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Kept beside the weights."""
        return {
            "source": self.name or self.weights.name,
            "source_sha256": self.sha256,
            "source_format": self.format,
            "licence": self.licence,
        }


def import_clip(
    source: Path | str,
    *,
    vocabulary: Path | None = None,
    config: Path | None = None,
    activation: Activation | None = None,
    image_size: int | None = None,
) -> ImportedCLIP:
    """Read a published CLIP.

    Args:
        source: OpenAI's .pt; weights of open_clip or Hugging Face; or a folder with such weights.
        vocabulary: OpenAI's merges; None for a file beside the weights.
        config: of open_clip or Hugging Face; None for the one beside the weights.
        activation: only for weights without a configuration, which do not show it.
        image_size: side in pixels that pictures shall have; positions are interpolated. None for the model's own.

    Raises:
        FileNotFoundError: a file is missing; the message says where to get it.
        ValueError: a file is something else, damaged, names code, or is of a CLIP that is computed in another way.
    """
    weights = _weights_file(Path(source))
    tensors = open_tensors(weights)
    part, style = find_clip(tensors)
    unseen = _unseen(part, style, weights, config, activation)
    try:
        found = _config(part, style, unseen)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{weights} has impossible sizes: {error}; expected a CLIP") from error
    _compare_sizes(found, unseen, weights)
    tokenizer = read_vocabulary(vocabulary, weights.parent, found.vocab_size)
    wanted = replace(found, image_size=image_size or found.image_size)
    with torch.device("meta"):
        clip = CLIP(wanted, tokenizer)
    state = _state(clip, part, style)
    if wanted != found:
        if wanted.resnet:
            raise ValueError(f"{weights} has a ResNet, which sees {found.image_size} pixels: leave out the image size")
        name = "vision.position_embedding"
        state[name] = interpolated_positions(state[name], wanted.image_size // wanted.patch_size)
    load_weights(clip, state, weights)
    digest = sha256(weights)
    name = PUBLISHED.get(digest[:8], "")
    return ImportedCLIP(
        clip=clip.eval(),
        weights=weights,
        sha256=digest,
        format=tensors.format,
        name=f"OpenAI's {name}" if name else "",
        origin=unseen.origin,
        left=tensors.unused(),
        licence=_licence(weights, is_openai=_is_openai(part)),
    )


def interpolated_positions(positions: Tensor, grid: int) -> Tensor:
    """Return position embeddings of another grid: (n² + 1, D) to (grid² + 1, D), bicubic and antialiased.

    The first row, of the class token, stays. As open_clip does it.
    """
    n = math.isqrt(len(positions) - 1)
    grid_1DYX = positions[1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    resized_1DYX = F.interpolate(grid_1DYX, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1], resized_1DYX.permute(0, 2, 3, 1).reshape(grid**2, -1)])


def _weights_file(source: Path) -> Path:
    """Return the file with the weights: the source, or one in it."""
    if not source.is_dir():
        return source
    found = next((source / name for name in WEIGHTS if (source / name).is_file()), None)
    if found is not None:
        return found
    if parts := sorted(source.glob("*.index.json")):
        raise ValueError(f"{source} has its weights in several files ({parts[0].name}): expected one file")
    raise FileNotFoundError(f"no weights in {source}: expected {', '.join(WEIGHTS)}, or give the file itself")


def _is_openai(part: Tensors) -> bool:
    """Return whether it has the numbers that only OpenAI's own files hold."""
    return "input_resolution" in part


def _unseen(part: Tensors, style: Style, weights: Path, config: Path | None, activation: Activation | None) -> Unseen:
    """Return what the weights do not show, from the configuration, or from the caller."""
    beside = weights.with_name(OPEN_CLIP_CONFIG if style == "OpenAI" else HUGGING_FACE_CONFIG)
    if config is None and beside.is_file() and not _is_openai(part):
        config = beside
    if config is not None:
        if not config.is_file():
            raise FileNotFoundError(f"no file {config}: expected a configuration of open_clip or Hugging Face")
        is_hugging_face = "model_type" in read_json(config)
        unseen = hugging_face_unseen(config) if is_hugging_face else open_clip_unseen(config)
        if activation not in (None, unseen.activation):
            raise ValueError(f"{config} says {unseen.activation}, but the activation was given as {activation}")
        return unseen
    if _is_openai(part):
        if activation not in (None, "quick_gelu"):
            raise ValueError(f"{weights} is one of OpenAI's, all of which have quick_gelu, not {activation}")
        return Unseen(activation="quick_gelu", origin="as all of OpenAI's")
    if activation is None:
        raise ValueError(
            f"{weights} does not show which activation its model has, and with the wrong one every score is a little "
            f"wrong: put its {beside.name} beside it, or say --activation quick_gelu (OpenAI's, and those trained "
            "from them) or gelu (LAION-2B, DataComp)"
        )
    return Unseen(activation=activation, origin="as given; pictures as OpenAI's")


def _config(part: Tensors, style: Style, unseen: Unseen) -> CLIPConfig:
    """Return sizes as the weights show them."""
    is_hugging_face = style == "Hugging Face"
    if is_hugging_face:
        text, text_blocks, fc = "text_model.embeddings.", "text_model.encoder.layers", "mlp.fc1.weight"
        tokens, places = "token_embedding.weight", "position_embedding.weight"
    else:
        text = "text." if "text.token_embedding.weight" in part else ""
        text_blocks, fc = f"{text}transformer.resblocks", "mlp.c_fc.weight"
        tokens, places = "token_embedding.weight", "positional_embedding"
    vocab_size, text_width = part.shape(f"{text}{tokens}")
    projection = part.shape("text_projection.weight" if is_hugging_face else f"{text}text_projection")
    text_mlp = part.shape(f"{text_blocks}.0.{fc}")[0]
    return CLIPConfig(
        **_vision(part, unseen, is_hugging_face=is_hugging_face),
        context_length=part.shape(f"{text}{places}")[0],
        vocab_size=vocab_size,
        text_width=text_width,
        text_layers=_count(text_blocks, part),
        text_heads=_heads(unseen.text_heads, text_width),
        text_mlp=None if text_mlp == 4 * text_width else text_mlp,
        embed_dim=projection[0 if is_hugging_face else 1],
        activation=unseen.activation,
        pixel_mean=unseen.pixel_mean,
        pixel_std=unseen.pixel_std,
        resize=unseen.resize,
        interpolation=unseen.interpolation,
    )


def _compare_sizes(found: CLIPConfig, unseen: Unseen, weights: Path) -> None:
    """Raise ValueError unless the weights have the sizes that the configuration says: heads do not show in them."""
    sizes = {
        **vars(found),
        "vision_mlp": found.vision_mlp or 4 * found.vision_width,
        "text_mlp": found.text_mlp or 4 * found.text_width,
    }
    for name, said in unseen.sizes.items():
        if sizes[name] != said:
            raise ValueError(
                f"{weights} has {name} {sizes[name]}, but {unseen.origin} says {said}: it is of another model"
            )


def _vision(part: Tensors, unseen: Unseen, *, is_hugging_face: bool) -> dict[str, Any]:
    """Return the sizes of the image tower."""
    if "visual.attnpool.positional_embedding" in part:
        width = part.shape("visual.layer1.0.conv1.weight")[0]
        stages = tuple(_count(f"visual.layer{stage}", part) for stage in range(1, 5))
        return {
            "image_size": 32 * _grid(part.shape("visual.attnpool.positional_embedding")[0]),
            "patch_size": 32,
            "vision_width": width,
            "vision_layers": sum(stages),
            "vision_heads": _heads(unseen.vision_heads, 32 * width),
            "resnet": stages,
        }
    if is_hugging_face:
        patches, places = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
        tower, blocks, fc = "vision_model.", "encoder.layers", "mlp.fc1.weight"
    else:
        tower, patches, places = "visual.", "conv1.weight", "positional_embedding"
        blocks, fc = "transformer.resblocks", "mlp.c_fc.weight"
    width, _, patch_size, _ = part.shape(f"{tower}{patches}")
    mlp = part.shape(f"{tower}{blocks}.0.{fc}")[0]
    return {
        "image_size": patch_size * _grid(part.shape(f"{tower}{places}")[0]),
        "patch_size": patch_size,
        "vision_width": width,
        "vision_layers": _count(f"{tower}{blocks}", part),
        "vision_heads": _heads(unseen.vision_heads, width),
        "vision_mlp": None if mlp == 4 * width else mlp,
    }


def _heads(said: int | None, width: int) -> int:
    return width // HEAD_WIDTH if said is None else said


def _grid(n_positions: int) -> int:
    """Return the side of the grid whose positions, and one more, these are."""
    grid = math.isqrt(max(0, n_positions - 1))
    if grid**2 + 1 != n_positions:
        raise ValueError(f"{n_positions} positions of the image are not those of a square and one more")
    return grid


def _count(prefix: str, part: Tensors) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in part if (match := pattern.match(name))})


def _state(clip: CLIP, part: Tensors, style: Style) -> dict[str, Tensor]:
    """Return the weights by our names, one read after the other.

    Raises:
        ValueError: one is missing, or one is left that belongs to another kind of CLIP.
    """
    names = list(clip.state_dict())
    found = sources(clip.config, names, style, has_text_prefix="text.token_embedding.weight" in part)
    state: dict[str, Tensor] = {}
    for name, source in zip(names, found, strict=True):
        if missing := [wanted for wanted in source.names if wanted not in part]:
            raise ValueError(f"{part.path} has no {missing[0]}: it is cut, or of another kind of CLIP")
        state[name] = source.read(part)
    state["logit_scale"] = state["logit_scale"].reshape(())
    if unknown := [name for name in part.unused() if not left_out(name)]:
        raise ValueError(
            f"{part.path} has {len(unknown)} weights that no plain CLIP has, {unknown[0]} among them: not read here"
        )
    return state


def _licence(weights: Path, *, is_openai: bool) -> str:
    """Return what is known of the weights' licence."""
    if is_openai:
        return "MIT, as their repository; the model card calls deployment out of scope"
    return stated_licence(weights) or "not stated in these files: see the page that they are from"


def _shown(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
