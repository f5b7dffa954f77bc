"""Published DALL·E mini and mega, from flax files or min-dalle's, into a transformer and a tokenizer of ours."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle.family.mini.config import MEGA, MINI, MiniConfig
from dalle.family.mini.model import DALLEMini
from dalle.family.texts.bart import BartTokenizer
from dalle.importers.mini.configuration import check_computation, compare_sizes
from dalle.importers.mini.names import Place, flax_places, min_dalle_places
from dalle.importers.mini.vocabulary import read_json, read_vocabulary
from storage.checkpoints.tensors import Tensors, open_tensors, sha256, summary
from storage.models.stored import n_weights

HEAD_WIDTH = 64
"""Width of an attention head of both published models; weights do not show it."""
GUIDANCE = 10.0
"""Of the authors' own notebook, which calls it condition scale."""
LICENCES = {
    "dalle-mini": "Apache-2.0, as the pages of dalle-mini and dalle-mega say",
    "min-dalle": "MIT, as the page of the converted files says; the weights that were converted are Apache-2.0",
}
_SPECIAL = {"start_of_text": "<s>", "pad": "<pad>", "end_of_text": "</s>"}


@dataclass(frozen=True, kw_only=True)
class ImportedMini:
    """A DALL·E mini or mega, and what is to be said about it."""

    model: DALLEMini
    """On the CPU, float32."""
    tokenizer: BartTokenizer
    files: Mapping[Path, str]
    """The files that were read, and their sha256."""
    format: str
    """Of the weights."""
    left: Sequence[str]
    """Names of what was not used."""
    licence: str
    """Of the weights, as far as it is known here."""

    def __str__(self) -> str:
        """Return several lines for people."""
        config = self.model.config
        read = [f"{path}, sha256 {digest[:16]}…" for path, digest in self.files.items()]
        parts = [f"{n_weights(part):,}" for part in (self.model.encoder, self.model.decoder)]
        normalised = "normalised as its authors do, words behind # left whole" if self.tokenizer.normalises else "as is"
        return "\n".join(
            [
                *(f"{'read:' if number == 0 else '':<10}{line}" for number, line in enumerate(read)),
                f"model:    {name_of(config)}, {self.format}, {' + '.join(parts)} parameters (encoder + decoder), "
                f"{config.text_len} positions of text, {config.grid}×{config.grid} image tokens",
                f"assumed:  {config.n_heads} heads, exact GELU, start of image {config.start_of_image}; "
                f"captions: {normalised}; guidance {GUIDANCE:g}",
                f"left:     {summary(list(self.left), depth=2) or 'nothing'}",
                f"licence:  {self.licence}",
            ]
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Kept beside the weights: where they are from, and how to sample."""
        return {
            "source": name_of(self.model.config),
            "source_sha256": {path.name: digest for path, digest in self.files.items()},
            "source_format": self.format,
            "licence": self.licence,
            "sampling": {"guidance": GUIDANCE},
            # it is sampled with the empty caption; how often it saw that is not published
            "null_caption_probability": True,
        }


def name_of(config: MiniConfig) -> str:
    """Return which of the published models has these sizes."""
    widths = {(of.encoder_layers, of.d_model): name for of, name in ((MINI, "DALL·E mini"), (MEGA, "DALL·E mega"))}
    return widths.get((config.encoder_layers, config.d_model), "a DALL·E mini of other sizes")


def import_min_dalle(folder: Path, *, image_vocab: int) -> ImportedMini:
    """Read min-dalle's files: encoder.pt, decoder.pt, vocab.json and merges.txt; mini's may have _mini in their names.

    Args:
        folder: of these files.
        image_vocab: tokens of the codec.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is something else, damaged, names code, or is of another model.
    """
    suffix = "_mini" if not (folder / "encoder.pt").is_file() and (folder / "encoder_mini.pt").is_file() else ""
    files = [folder / f"{tower}{suffix}.pt" for tower in ("encoder", "decoder")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"no {' and '.join(missing)} in {folder}: expected the files of kuprel/min-dalle")
    towers = dict(zip(("encoder", "decoder"), map(open_tensors, files), strict=True))
    for tower, tensors in towers.items():
        _require(tensors, "embed_tokens.weight", "layers.0.glu.fc0.weight", tower=tower)
    encoder, decoder = towers.values()
    tokenizer, texts = read_vocabulary(folder, suffix)
    with _sizes_of(folder):
        n_text_ids, d_model = encoder.shape("embed_tokens.weight")
        config = _config(
            tokenizer,
            image_vocab,
            encoder_layers=_count(encoder),
            decoder_layers=_count(decoder),
            d_model=d_model,
            n_heads=d_model // HEAD_WIDTH,
            d_glu=encoder.shape("layers.0.glu.fc0.weight")[0],
            text_len=encoder.shape("embed_positions.weight")[0],
            grid=_grid(decoder.shape("embed_positions.weight")[0]),
            n_text_ids=n_text_ids,
            n_image_ids=decoder.shape("embed_tokens.weight")[0],
            start_of_image=image_vocab,
            norm_scales="layers.0.pre_self_attn_layer_norm.weight" in encoder,
        )
    names = [f"{tower}.{name}" for tower, tensors in towers.items() for name in tensors]
    model = _filled(config, names, min_dalle_places, lambda name: _of_tower(towers, name), folder)
    return ImportedMini(
        model=model,
        tokenizer=tokenizer,
        files={file: sha256(file) for file in (*files, *texts)},
        format=f"min-dalle's {encoder.format}",
        left=[],
        licence=LICENCES["min-dalle"],
    )


def import_dalle_mini(folder: Path, *, image_vocab: int) -> ImportedMini:
    """Read the published files: flax_model.msgpack, config.json, and the tokenizer's; raises as `import_min_dalle`."""
    weights, config_file = folder / "flax_model.msgpack", folder / "config.json"
    if missing := [file.name for file in (weights, config_file) if not file.is_file()]:
        raise FileNotFoundError(f"no {' and '.join(missing)} in {folder}: expected the files of dalle-mini/dalle-mini")
    said = read_json(config_file)
    check_computation(said, config_file)
    tensors = open_tensors(weights)
    is_stacked = any(".FlaxBartEncoderLayers." in name for name in tensors)
    layer = "layers.FlaxBartEncoderLayers" if is_stacked else "layers.FlaxBartEncoderLayer_0"
    encoder, decoder = tensors.under("model.encoder."), tensors.under("model.decoder.")
    _require(tensors, "model.encoder.embed_tokens.embedding", f"model.encoder.{layer}.GLU_0.Dense_0.kernel")
    tokenizer, texts = read_vocabulary(folder, normalises=bool(said.get("normalize_text", False)))
    with _sizes_of(weights):
        n_text_ids, d_model = encoder.shape("embed_tokens.embedding")
        config = _config(
            tokenizer,
            image_vocab,
            encoder_layers=_flax_count(encoder, is_stacked=is_stacked),
            decoder_layers=_flax_count(decoder, is_stacked=is_stacked),
            d_model=d_model,
            n_heads=said.get("encoder_attention_heads", d_model // HEAD_WIDTH),
            d_glu=encoder.shape(f"{layer}.GLU_0.Dense_0.kernel")[-1],
            text_len=encoder.shape("embed_positions.embedding")[0],
            grid=_grid(decoder.shape("embed_positions.embedding")[0]),
            n_text_ids=n_text_ids,
            n_image_ids=decoder.shape("embed_tokens.embedding")[0],
            start_of_image=said.get("decoder_start_token_id", image_vocab),
            norm_scales=f"{layer}.LayerNorm_0.scale" in encoder,
        )
    compare_sizes(said, config, config_file)

    def places(ours: list[str]) -> Iterable[tuple[str, Place]]:
        return flax_places(ours, is_stacked=is_stacked)

    return ImportedMini(
        model=_filled(config, list(tensors), places, tensors.__getitem__, weights),
        tokenizer=tokenizer,
        files={file: sha256(file) for file in (weights, config_file, *texts)},
        format=tensors.format,
        left=[],
        licence=LICENCES["dalle-mini"],
    )


def _of_tower(towers: Mapping[str, Tensors], name: str) -> Tensor:
    tower, rest = name.split(".", 1)
    return towers[tower][rest]


def _require(tensors: Tensors, *names: str, tower: str = "") -> None:
    """Raise ValueError unless a file has names that every DALL·E mini has."""
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(
            f"{tensors.path} is no {f'{tower} of a ' if tower else ''}DALL·E mini: it has no {missing[0]}, but "
            f"{summary(list(tensors)[:100]) or 'no tensors'}"
        )


@contextmanager
def _sizes_of(source: Path) -> Iterator[None]:
    """Name a file in what is wrong with the sizes of its weights."""
    try:
        yield
    except LookupError as error:
        raise ValueError(f"{source} has no {error.args[0]}: it is no DALL·E mini, or cut") from error
    except ValueError as error:
        raise ValueError(f"{source} has impossible sizes: {error}; expected a DALL·E mini") from error


def _config(tokenizer: BartTokenizer, image_vocab: int, **sizes: Any) -> MiniConfig:
    """Return the sizes that weights show, with the text ids that the vocabulary does."""
    if missing := [symbol for symbol in _SPECIAL.values() if symbol not in tokenizer.vocab]:
        raise ValueError(f"the vocabulary has no {', '.join(missing)}: it is not that of a DALL·E mini")
    sizes |= {name: tokenizer.vocab[symbol] for name, symbol in _SPECIAL.items()}
    return MiniConfig(**sizes, text_vocab=tokenizer.vocab_size, image_vocab=image_vocab)


def _grid(n_positions: int) -> int:
    """Return the side of the grid of image positions."""
    grid = math.isqrt(n_positions)
    if grid**2 != n_positions:
        raise ValueError(
            f"the decoder has {n_positions} image positions, which are no square grid: older models have 259; get "
            "one of today's files"
        )
    return grid


def _count(tensors: Tensors) -> int:
    return len({match[1] for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))})


def _flax_count(part: Tensors, *, is_stacked: bool) -> int:
    name = next((name for name in part if ".LayerNorm_0." in name and name.startswith("layers.")), None)
    if name is None:
        raise ValueError(f"{part.path} has no layers")
    if is_stacked:
        return part.shape(name)[0]
    return len({match[1] for name in part if (match := re.match(r"layers\.\w+_(\d+)\.", name))})


def _filled(
    config: MiniConfig,
    found: Sequence[str],
    places: Callable[[list[str]], Iterable[tuple[str, Place]]],
    read: Callable[[str], Tensor],
    source: Path,
) -> DALLEMini:
    """Return the model with the weights of a file, each tensor of which is read once.

    Raises:
        ValueError: one is missing, left, or of another shape.
    """
    with torch.device("meta"):
        model = DALLEMini(config)
    wanted: dict[str, list[Place]] = {}
    for name, place in places(list(model.state_dict())):
        wanted.setdefault(name, []).append(place)
    held = set(found)
    problems = [f"{name} is missing" for name in wanted if name not in held]
    problems += [f"{name} is unexpected" for name in found if name not in wanted]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights of {source} are not those of a DALL·E mini: {'; '.join(problems[:3])}{more}")
    model = model.to_empty(device="cpu").requires_grad_(False)
    weights = dict(model.named_parameters())
    for name, all_places in wanted.items():
        tensor = read(name)
        for place in all_places:
            try:
                place.fill(weights[place.weight], tensor)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{source}, {name}: {error}; its tensors are not of one model") from error
    return model.eval()
