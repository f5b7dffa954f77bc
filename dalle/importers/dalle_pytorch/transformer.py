"""DALLE-pytorch's transformer from the weights of its dalle.pt.

Its modules are wrapped in others by the options and by the version, so that the same weight has many names; what the
names of a weight end in is the same in all of them (lucidrains/DALLE-pytorch at 58c1e1a and its history).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dalle.family.dalle_pytorch.attention import Kind
from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.family.dalle_pytorch.model import DALLEPytorch
from dalle.importers.dalle_pytorch.hparams import Settings
from storage.checkpoints.tensors import Tensors, summary
from storage.models.directory import load_weights

_USED = {"num_text_tokens", "text_seq_len", "dim", "depth", "heads", "dim_head", "reversible", "attn_types"}
_USED |= {"stable", "shift_tokens", "rotary_emb", "shared_attn_ids", "shared_ff_ids", "share_input_output_emb"}
_USED |= {"sandwich_norm"}
_IGNORED = {"loss_img_weight", "ff_dropout", "attn_dropout", "optimize_for_inference"}
"""Settings that matter in training alone, or change nothing in the result."""
_IN_BRANCH = re.compile(
    r"transformer\.layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.((?:fn\.)*)"
    r"(scale|norm\.weight|norm\.bias|norm_out\.weight|norm_out\.bias|to_qkv\.weight|to_out\.0\.weight|to_out\.0\.bias"
    r"|net\.0\.weight|net\.0\.bias|net\.3\.weight|net\.3\.bias|attn_fn\.master_layout)"
)
"""Groups: layer and branch in one form and in the other, wrappers, and the weight."""
_OURS = {
    "to_qkv": ("attentions", "qkv"),
    "to_out": ("attentions", "out"),
    "net.0": ("mlps", "wide"),
    "net.3": ("mlps", "out"),
}
_KINDS: dict[str, Kind] = {
    "full": "full",
    "axial_row": "axial_row",
    "axial_col": "axial_col",
    "conv_like": "conv_like",
    "sparse": "sparse",
}
CAUSAL_WINDOW = (1, 5, 0)
"""Version since which the window of conv layers ends in its own cell."""
_LAYOUT = "attn_fn.master_layout"


@dataclass
class _Names:
    """Where the weights of the branches are."""

    of: dict[tuple[int, str], str] = field(default_factory=dict)
    """Name in the file, by number of the branch and end of the name."""
    depths: dict[tuple[int, str], int] = field(default_factory=dict)
    """Number of wrappers, by the same."""
    is_reversible: bool = False

    @property
    def n_layers(self) -> int:
        """Layers."""
        return max((number for number, _ in self.of), default=-1) // 2 + 1


@dataclass(frozen=True, kw_only=True)
class ImportedTransformer:
    """A transformer, and what is to be said about it."""

    model: DALLEPytorch
    version: str
    """Of the package that saved it; "" where the file does not say."""
    notes: Sequence[str]
    """What was decided where the file leaves a choice."""


def import_transformer(
    tensors: Tensors, *, codec_vocab: int, codec_grid: int, sparse_as_dense: bool = False
) -> ImportedTransformer:
    """Return the transformer of a file.

    Args:
        tensors: a dalle.pt.
        codec_vocab: image tokens of its VAE.
        codec_grid: rows of image tokens that the VAE gives; used where the weights do not show them.
        sparse_as_dense: whether sparse layers whose blocks are not in the file may attend to everything.

    Raises:
        ValueError: something is missing, unknown, of another size, or cannot be computed as it was.
    """
    path = tensors.path
    hparams = Settings(tensors, "hparams", used=_USED, ignored=_IGNORED)
    weights = tensors.under("weights.")
    names = _branch_names(weights)
    version = str(tensors.plain.get("version", ""))
    kinds, notes = _kinds(hparams, weights, names, version, sparse_as_dense)
    config = _config(hparams, weights, names, kinds, codec_vocab, codec_grid)
    with torch.device("meta"):
        model = DALLEPytorch(config)
    state = _state(model, weights, names)
    load_weights(model, state, path)
    return ImportedTransformer(model=model.eval(), version=version, notes=notes)


def _branch_names(weights: Tensors) -> _Names:
    names = _Names()
    for name in weights:
        if (found := _IN_BRANCH.fullmatch(name)) is None:
            continue
        layer, half, block, side, wrappers, end = found.groups()
        names.is_reversible |= block is not None
        number = 2 * int(layer or block) + (half == "1" or side == "g")
        if (number, end) in names.of:
            raise ValueError(f"{weights.path} has {names.of[number, end]} and {name}, which are the same weight")
        names.of[number, end], names.depths[number, end] = name, wrappers.count("fn.")
    if not names.of:
        holds = summary(list(weights)[:100], depth=2) or summary(list(weights.plain)[:100]) or "no weights"
        raise ValueError(f"{weights.path} holds {holds}: expected the weights of DALLE-pytorch's transformer")
    return names


def _kinds(
    hparams: Settings, weights: Tensors, names: _Names, version: str, sparse_as_dense: bool
) -> tuple[tuple[Kind, ...], list[str]]:
    """Return the attention of each layer, and what is to be said about it."""
    path, n_layers = weights.path, names.n_layers
    given = hparams.of_layers("attn_types", n_layers) or ["full"] * n_layers
    notes: list[str] = []
    if "mlp" in given:
        raise ValueError(
            f"{path} has layers of type mlp, the gMLPs of versions 0.13 and 0.14, which are not computed here"
        )
    if unknown := [kind for kind in given if kind not in _KINDS]:
        raise ValueError(f"{path} has layers of type {unknown[0]!r}, expected {', '.join(_KINDS)}")
    kinds = [_KINDS[kind] for kind in given]
    if "conv_like" in kinds and _version(version) < CAUSAL_WINDOW:
        kinds = ["conv_like_centred" if kind == "conv_like" else kind for kind in kinds]
        notes.append("conv_like layers see the 5×5 window around a cell, as before version 1.5.0")
    if "sparse" in kinds and (2 * kinds.index("sparse"), _LAYOUT) in names.of:
        notes.append("sparse layers see the blocks that are in the file, those of the first of them, as DeepSpeed does")
    elif "sparse" in kinds:
        n_sparse = kinds.count("sparse")
        if not sparse_as_dense:
            raise ValueError(
                f"{path} has {n_sparse} sparse layers, whose blocks DeepSpeed drew at random, but not the blocks: "
                "nobody can compute them as they were; --sparse-as-dense lets them see everything, for other, often "
                "worse pictures"
            )
        kinds = ["full" if kind == "sparse" else kind for kind in kinds]
        notes.append(
            f"{n_sparse} sparse layers see everything, since their blocks are lost: pictures are not as they were"
        )
    return tuple(kinds), notes


def _version(version: str) -> tuple[int, ...]:
    """Return a version's numbers; files of before 1.1.6 have none, which is less than any."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _config(
    hparams: Settings,
    weights: Tensors,
    names: _Names,
    kinds: tuple[Kind, ...],
    codec_vocab: int,
    codec_grid: int,
) -> DALLEPytorchConfig:
    path, depth = weights.path, hparams.whole("depth")
    if depth != names.n_layers:
        raise ValueError(f"{path} has {names.n_layers} layers, but its hparams say {depth}")
    text_vocab, text_len = hparams.whole("num_text_tokens"), hparams.whole("text_seq_len")
    try:
        n_head = weights.shape(f"to_logits.{_head(weights) + 1}.weight")[0]
        angles = weights.shape("transformer.pos_emb") if "transformer.pos_emb" in weights else None
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]}: it is cut, or of another model") from None
    n_text_ids = n_head - codec_vocab
    if n_text_ids not in (text_vocab, text_vocab + text_len):
        raise ValueError(
            f"{path} has {n_head} logits, but {text_vocab} text tokens, {text_len} pads and the {codec_vocab} image "
            "tokens of its VAE: the parts do not belong together"
        )
    has_shift = names.depths.get((1, "net.0.weight"), 0) > names.depths.get((1, "norm.weight"), 0) + 1
    found = {
        "reversible": names.is_reversible,
        "shift_tokens": has_shift,
        "rotary_emb": angles is not None,
        "share_input_output_emb": "text_emb.linear.weight" in weights,
        "sandwich_norm": (0, "norm_out.weight") in names.of,
    }
    for option, is_on in found.items():
        if hparams.says(option) and hparams.flag(option) != is_on:
            raise ValueError(
                f"{path}: hparams say {option} is {hparams.flag(option)}, but the weights are of the other"
            )
    try:
        return DALLEPytorchConfig(
            n_layers=depth,
            d_model=hparams.whole("dim"),
            n_heads=hparams.whole("heads"),
            d_head=hparams.whole("dim_head"),
            text_len=text_len,
            grid=_grid(weights, angles, text_len, codec_grid),
            text_vocab=text_vocab,
            image_vocab=codec_vocab,
            kinds=kinds,
            attention_of_layer=_numbered(hparams.of_layers("shared_attn_ids", depth), depth),
            mlp_of_layer=_numbered(hparams.of_layers("shared_ff_ids", depth), depth),
            has_own_pads=n_text_ids != text_vocab,
            is_reversible=names.is_reversible,
            is_stable=hparams.flag("stable"),
            shifts_tokens=has_shift,
            rotary=angles[-1] if angles else 0,
            has_sandwich_norms=found["sandwich_norm"],
            has_scales=(0, "scale") in names.of,
            shares_embeddings=found["share_input_output_emb"],
        )
    except ValueError as error:
        raise ValueError(f"{path} has impossible sizes: {error}") from error


def _grid(weights: Tensors, angles: tuple[int, ...] | None, text_len: int, codec_grid: int) -> int:
    """Return the grid's width as the weights show it; the angles of before version 1.1.2 lack the last position."""
    if angles is None:
        names = [f"image_pos_emb.{name}" for name in ("weights.0", "weights_0")]
        return next((weights.shape(name)[1] for name in names if name in weights), codec_grid)
    squares = [n for n in (math.prod(angles[:-1]) - text_len - 1, math.prod(angles[:-1]) - text_len) if n > 0]
    return next((math.isqrt(n) for n in squares if math.isqrt(n) ** 2 == n), codec_grid)


def _numbered(ids: Sequence[str], n_layers: int) -> tuple[int, ...]:
    """Return 0, 1, 2 … for ids in the order in which they are first met; without ids nothing is shared."""
    first = list(dict.fromkeys(ids))
    return tuple(first.index(one) for one in ids) if ids else tuple(range(n_layers))


def _head(weights: Tensors) -> int:
    """Return the place of the last norm: versions 0.12.1 to 0.12.4 have something without weights before it."""
    return 1 if "to_logits.2.weight" in weights else 0


@dataclass(frozen=True)
class _Source:
    """Where a weight of ours comes from."""

    names: list[str]
    """In the file; all but the first repeat it."""
    change: Callable[[Tensor], Tensor] | None = None


def _sources(model: DALLEPytorch, weights: Tensors, names: _Names) -> Mapping[str, _Source]:
    """Return where each weight of a model comes from."""
    config, found = model.config, {}
    for (number, end), name in names.of.items():
        layer = number // 2
        head, _, leaf = end.rpartition(".")
        if end == _LAYOUT:
            if "layout" not in found and config.kinds[layer] == "sparse":
                found["layout"] = _Source([name], _one_layout)
        elif end == "scale":
            found[f"branches.{number}.scale"] = _Source([name], torch.flatten)
        elif head in ("norm", "norm_out"):
            found[f"branches.{number}.{end}"] = _Source([name])
        else:
            part, ours = _OURS[head.removesuffix(".0") if head.startswith("to_") else head]
            shared = config.attention_of_layer[layer] if part == "attentions" else config.mlp_of_layer[layer]
            found.setdefault(f"{part}.{shared}.{ours}.{leaf}", _Source([])).names.append(name)
    norm = _head(weights)
    for leaf in ("weight", "bias"):
        found[f"final_norm.{leaf}"] = _Source([f"to_logits.{norm}.{leaf}"])
        repeats = [f"{part}.linear.{leaf}" for part in ("text_emb", "image_emb")] if config.shares_embeddings else []
        found[f"head.{leaf}"] = _Source([f"to_logits.{norm + 1}.{leaf}", *repeats])
    if not config.shares_embeddings:
        found["text_embedding.weight"] = _Source(["text_emb.weight"])
        found["image_embedding.weight"] = _Source(["image_emb.weight"])
    if config.rotary:
        R, S = config.rotary, config.length
        found["cosines"] = _Source(["transformer.pos_emb"], lambda angles: angles.reshape(-1, R)[:S].cos())
        found["sines"] = _Source(["transformer.pos_emb"], lambda angles: angles.reshape(-1, R)[:S].sin())
    else:
        dot = "." if "image_pos_emb.weights.0" in weights else "_"
        found["text_places.weight"] = _Source(["text_pos_emb.weight"])
        for i, ours in enumerate(("row_places", "column_places")):
            found[f"{ours}.weight"] = _Source([f"image_pos_emb.weights{dot}{i}"], lambda x: x.reshape(-1, x.shape[-1]))
    return found


def _one_layout(layout_HNN: Tensor) -> Tensor:
    """Return the blocks that all heads see, float32 (N, N)."""
    if layout_HNN.ndim != 3 or not bool((layout_HNN == layout_HNN[:1]).all()):
        raise ValueError("its sparse layers' heads see different blocks, or their blocks have another form")
    return (layout_HNN[0] != 0).float()


def _state(model: DALLEPytorch, weights: Tensors, names: _Names) -> dict[str, Tensor]:
    """Return the weights by our names, one read after the other.

    Raises:
        ValueError: one is missing, one is left, or two that should be the same differ.
    """
    sources = _sources(model, weights, names)
    state: dict[str, Tensor] = {}
    for ours in model.state_dict():
        source = sources.get(ours)
        if missing := [ours] if source is None else [name for name in source.names if name not in weights]:
            raise ValueError(f"{weights.path} has no {missing[0]}: it is cut, or of another model")
        assert source is not None
        weight = weights[source.names[0]]
        for name in source.names[1:]:
            if not torch.equal(weights[name], weight):
                raise ValueError(f"{weights.path}: {name} is not {source.names[0]}, which it should repeat")
        state[ours] = weight if source.change is None else source.change(weight)
    if unknown := [name for name in weights.unused() if not _is_left_out(name)]:
        raise ValueError(
            f"{weights.path} has {len(unknown)} weights that no DALLE-pytorch has as its hparams say, {unknown[0]} "
            "among them: another version, or other settings"
        )
    return state


def _is_left_out(name: str) -> bool:
    """Return whether a name is the VAE's, read apart, or no weight's: a mask, or the blocks of later layers."""
    return name.startswith("vae.") or name == "logits_mask" or name.endswith(_LAYOUT)
