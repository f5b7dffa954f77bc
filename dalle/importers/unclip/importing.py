"""An unCLIP as diffusers has it, such as Karlo, into prior, decoder and upsampler; nothing in its files is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle.importers.bundles import StreamedModel
from dalle.importers.licence import stated_licence
from dalle.importers.unclip.configuration import Configuration, read_decoder, read_prior, read_upsampler
from dalle.importers.unclip.names import Found, Source, condition_sources, prior_sources, unet_sources
from rerank import CLIP
from rerank.model import TextStates
from storage.checkpoints.tensors import Tensors, open_tensors, sha256
from unclip.decoder import KIND as DECODER
from unclip.decoder import Decoder
from unclip.prior import KIND as PRIOR
from unclip.prior import Prior
from unclip.upsampler import KIND as UPSAMPLER
from unclip.upsampler import Upsampler

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Names of a part's weights, the first that is there is read."""
SCHEDULER_CONFIG = "scheduler_config.json"


@dataclass(frozen=True, kw_only=True)
class ImportedUnCLIP:
    """The parts of an unCLIP, whose weights are read while they are written, and what is to be said about them."""

    parts: Mapping[str, StreamedModel]
    """By the name of the directory that a part gets: prior, decoder, upsampler-256."""
    files: Mapping[Path, str]
    """The files that were read, and their sha256."""
    licence: str
    """Of the weights, as far as it is known here."""

    def __str__(self) -> str:
        """Return several lines for people."""
        read = [f"{path}, sha256 {digest[:16]}…" for path, digest in self.files.items()]
        sizes = {name: sum(weight.numel() for weight in part.like.values()) for name, part in self.parts.items()}
        return "\n".join(
            [
                *(f"{'read:' if number == 0 else '':<10}{line}" for number, line in enumerate(read)),
                "parts:    " + "; ".join(f"{name}, {size:,} parameters" for name, size in sizes.items()),
                "assumed:  embeddings that are not of unit length; the empty caption stands for none",
                f"licence:  {self.licence}",
            ]
        )

    def save(self, out: Path) -> None:
        """Write a directory for each part into a folder.

        Raises:
            ValueError: one of them is there, and is something else.
            OSError: it cannot be written.
        """
        digests = {f"{path.parent.name}/{path.name}": digest for path, digest in self.files.items()}
        metadata: dict[str, Any] = {"source_sha256": digests, "licence": self.licence}
        for name, part in self.parts.items():
            part.save(out / name, metadata)


def import_unclip(folder: Path | str, clip: CLIP) -> ImportedUnCLIP:
    """Read a folder of an unCLIP as diffusers writes it.

    Args:
        folder: with prior/, decoder/, text_proj/, their schedulers, and super_res_first/ and super_res_last/ if it
            enlarges.
        clip: the CLIP that it was trained with: its text tower tells what the empty caption is.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is something else, damaged, names code, or is of a model that is computed in another way, or
            the CLIP has other sizes.
    """
    folder = Path(folder)
    null = _empty_caption(clip)
    length = null.mask.shape[1]
    given = {"null_text.features": null.features[0], "null_text.states": null.states[0]}
    weights = {name: _weights(folder / name) for name in ("prior", "decoder", "text_proj")}
    prior = read_prior(_config(folder / "prior"), _schedule(folder / "prior_scheduler"), length)
    decoder = read_decoder(
        _config(folder / "decoder"),
        _config(folder / "text_proj"),
        _schedule(folder / "decoder_scheduler"),
        prior.text_len,
        length,
    )
    _check_clip(clip, folder, prior.embed_dim, prior.text_width, prior.text_len)
    with torch.device("meta"):
        models: dict[str, nn.Module] = {"prior": Prior(prior), "decoder": Decoder(decoder)}
    found_prior = Found(
        {"prior": weights["prior"]},
        prior_sources(prior.n_layers),
        {**given, "errors": torch.zeros(prior.n_steps)},
    )
    decoder_model = models["decoder"]
    assert isinstance(decoder_model, Decoder)
    found_decoder = Found(
        {"decoder": weights["decoder"], "text_proj": weights["text_proj"]},
        unet_sources(decoder_model.unet, "decoder") | condition_sources(decoder.n_tokens),
        given,
    )
    parts = {
        "prior": StreamedModel(kind=PRIOR, config=prior, state=found_prior, like=models["prior"].state_dict()),
        "decoder": StreamedModel(kind=DECODER, config=decoder, state=found_decoder, like=decoder_model.state_dict()),
    }
    if (folder / "super_res_first").is_dir():
        upsampler = _upsampler(folder, decoder.image_size, weights)
        parts[f"upsampler-{upsampler.config.image_size}"] = upsampler
    return ImportedUnCLIP(
        parts=parts,
        files={tensors.path: sha256(tensors.path) for tensors in weights.values()},
        licence=stated_licence(folder / "model_index.json") or "not stated here: see the page that it is from",
    )


def _upsampler(folder: Path, input_size: int, weights: dict[str, Tensors]) -> StreamedModel:
    """Return the upsampler of a folder, and add its weights to `weights`."""
    names = [name for name in ("super_res_first", "super_res_last") if (folder / name).is_dir()]
    weights |= {name: _weights(folder / name) for name in names}
    schedule = _schedule(folder / "super_res_scheduler")
    configs = [read_upsampler(_config(folder / name), schedule, input_size, has_last=len(names) == 2) for name in names]
    if configs[0] != configs[-1]:
        raise ValueError(f"{folder} has two networks of other sizes for enlarging; expected equal ones")
    with torch.device("meta"):
        model = Upsampler(configs[0])
    sources: dict[str, Source] = {}
    for name, ours in zip(names, ("unet", "last"), strict=False):
        sources |= unet_sources(model.unet, name, ours)
    state = Found({name: weights[name] for name in names}, sources, {})
    return StreamedModel(kind=UPSAMPLER, config=configs[0], state=state, like=model.state_dict())


def _empty_caption(clip: CLIP) -> TextStates:
    """Return what the text tower makes of the empty caption, without padding: unit length is not asked for."""
    assert clip.tokenizer is not None
    with torch.no_grad():
        told = clip.text_states(clip.tokenizer.tokenize([""], clip.config.context_length), normalise=False)
    length = int(told.mask.sum())
    return TextStates(told.features, told.states[:, :length], told.mask[:, :length])


def _check_clip(clip: CLIP, folder: Path, embed_dim: int, text_width: int, text_len: int) -> None:
    config = clip.config
    found = (config.embed_dim, config.text_width, config.context_length)
    if found != (embed_dim, text_width, text_len):
        raise ValueError(
            f"the CLIP has embeddings of {found[0]}, a text width of {found[1]} and {found[2]} positions, but {folder} "
            f"was trained with {embed_dim}, {text_width} and {text_len}: import the CLIP that it was trained with"
        )


def _config(folder: Path) -> Configuration:
    return Configuration(folder / "config.json")


def _schedule(folder: Path) -> Configuration:
    return Configuration(folder / SCHEDULER_CONFIG)


def _weights(folder: Path) -> Tensors:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no weights in {folder}: expected {' or '.join(WEIGHTS)}")
    return open_tensors(found)
