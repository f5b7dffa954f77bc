"""A dalle.pt of DALLE-pytorch as the parts of a bundle, and a vae.pt as a codec; nothing in them is run."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dalle.family.dalle_pytorch.config import DALLEPytorchConfig
from dalle.family.texts.published import PublishedText
from dalle.importers.dalle_pytorch.texts import import_tokenizer
from dalle.importers.dalle_pytorch.transformer import ImportedTransformer, import_transformer
from dalle.importers.dalle_pytorch.vae import ImportedCodec, import_codec
from dalle.sampling import SamplingDefaults
from storage.checkpoints.tensors import Tensors, open_tensors, sha256, summary

LICENCE = "not stated in the file: that of whoever trained it; DALLE-pytorch itself is MIT"
_KEPT = 1 - 0.9
"""Share of all logits, text's included, that its generate.py samples from unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class ImportedVAE:
    """A codec from a vae.pt, or from a dalle.pt."""

    codec: ImportedCodec
    source: Path
    sha256: str
    """Of that file."""
    format: str
    """Of that file, in words."""
    left: Sequence[str]
    """Names of what was not used."""

    def __str__(self) -> str:
        """Return several lines for people."""
        return "\n".join(
            [
                f"read:     {self.source}, {self.format}, sha256 {self.sha256[:16]}…",
                f"codec:    {_codec_shown(self.codec)}",
                f"left:     {summary(list(self.left), depth=2) or 'nothing'}",
                f"licence:  {LICENCE}",
            ]
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Kept beside the weights."""
        return {
            "source": f"{self.codec.name}, {self.source.name}",
            "source_sha256": self.sha256,
            "source_format": self.format,
            "licence": LICENCE,
        }


@dataclass(frozen=True, kw_only=True)
class ImportedDALLE(ImportedVAE):
    """Transformer, codec and tokenizer from a dalle.pt."""

    transformer: ImportedTransformer
    tokenizer: PublishedText
    tokenizer_name: str

    def __str__(self) -> str:
        """Return several lines for people."""
        config = self.transformer.model.config
        n_parameters = sum(parameter.numel() for parameter in self.transformer.model.parameters())
        version = self.transformer.version or "before 1.1.6"
        read, codec, *rest = super().__str__().splitlines()
        return "\n".join(
            [
                read,
                f"model:    DALLE-pytorch {version}, {n_parameters:,} parameters, {config.n_layers} layers of "
                f"{config.d_model}, {config.n_heads} heads of {config.d_head}, {_options(config)}",
                f"text:     {self.tokenizer_name}, {config.text_vocab:,} ids, {config.text_len} positions",
                codec,
                f"assumed:  {'; '.join(self.transformer.notes) or 'nothing'}",
                *rest,
            ]
        )

    @property
    def transformer_metadata(self) -> dict[str, Any]:
        """Kept beside the transformer's weights."""
        config = self.transformer.model.config
        top_k = max(1, int(_KEPT * (config.n_text_ids + config.image_vocab)))
        sampling = SamplingDefaults(top_k=top_k if top_k < config.image_vocab else None)
        return {
            **self.metadata,
            "source": f"DALLE-pytorch {self.transformer.version}".strip() + f", {self.source.name}",
            "assumed": list(self.transformer.notes),
            "sampling": asdict(sampling),
        }


def import_vae(source: Path | str) -> ImportedVAE:
    """Read the codec of a vae.pt, or that in a dalle.pt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, is damaged, names code, or is computed in another way.
    """
    tensors = open_tensors(source)
    codec = import_codec(tensors)
    return ImportedVAE(codec=codec, **_of_file(tensors))


def import_dalle(
    source: Path | str,
    *,
    tokenizer: Path | None = None,
    vocabulary: Path | None = None,
    sparse_as_dense: bool = False,
) -> ImportedDALLE:
    """Read the parts of a bundle from a dalle.pt.

    Args:
        source: the file that DALLE-pytorch's training script saved.
        tokenizer: see `import_tokenizer`; also for the next.
        vocabulary: CLIP's merges.
        sparse_as_dense: see `import_transformer`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is something else, damaged, names code, or is of a model that is computed in another way.
    """
    tensors = open_tensors(source)
    codec = import_codec(tensors)
    if not tensors.under("weights.vae."):
        raise ValueError(f"{source} is a VAE, without a transformer: expected a dalle.pt; `dalle import-dvae` takes it")
    sizes = codec.codec.config
    transformer = import_transformer(
        tensors, codec_vocab=sizes.vocab_size, codec_grid=sizes.grid, sparse_as_dense=sparse_as_dense
    )
    n_ids = transformer.model.config.text_vocab
    text, name = import_tokenizer(tokenizer, vocabulary, tensors.path.parent, n_ids)
    return ImportedDALLE(codec=codec, transformer=transformer, tokenizer=text, tokenizer_name=name, **_of_file(tensors))


def _of_file(tensors: Tensors) -> dict[str, Any]:
    path = tensors.path
    return {"source": path, "sha256": sha256(path), "format": tensors.format, "left": tensors.unused()}


def _codec_shown(imported: ImportedCodec) -> str:
    config = imported.codec.config
    return (
        f"{imported.name}, {config.vocab_size:,} tokens, {config.grid}×{config.grid} of a picture of "
        f"{config.image_size} pixels, which are in {imported.pixels} inside"
    )


def _options(config: DALLEPytorchConfig) -> str:
    """Return the options of a transformer in words."""
    kinds = Counter(config.kinds)
    options = {
        "reversible": config.is_reversible,
        "stable": config.is_stable,
        "shifted tokens": config.shifts_tokens,
        "rotary": bool(config.rotary),
        "sandwich norms": config.has_sandwich_norms,
        "shared layers": len({*config.attention_of_layer}) + len({*config.mlp_of_layer}) < 2 * config.n_layers,
        "shared embeddings": config.shares_embeddings,
        "one pad for all": not config.has_own_pads,
    }
    shown = [f"attention {', '.join(f'{kind} ({n})' for kind, n in kinds.items())}"]
    return "; ".join([*shown, *(name for name, is_on in options.items() if is_on)])
