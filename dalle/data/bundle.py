"""A bundle: the directory of everything from captions to ranked pictures, and its models, checked to belong together.

It holds tokenizer.json, dvae/, dalle/ and clip/. Its transformer remembers the tokenizer and the dVAE it was trained
with; others, whose ids mean something else, are refused.

Letters: P captions  N pictures  I image positions  J image positions of the top rows  H, W pixels
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from dalle.best_of_n import Judge, Warnings
from dalle.budget import candidates_at_once, check_memory, decoded_at_once, memory_budget
from dalle.family.tokenizers import TextTokenizer, load_tokenizer
from dalle.family.transformers import Transformer, load_transformer
from dalle.sampling import SamplingDefaults, check_top_k, undisturbed
from dvae.codec import Codec, load_codec
from dvae.fast.model import optimised
from rerank import CLIP, score
from storage.errors import reason_of
from storage.models.directory import HOW_TO_MAKE, directory_hash

MODELS = ("dvae", "dalle", "clip")
PARTS = {"tokenizer.json": "`dalle-train tokenizer`", **{part: HOW_TO_MAKE[part] for part in MODELS}}
"""The parts of a bundle, and what makes each."""

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of sampling and decoding. In fp32 a candidate is the same at any batch size; CLIP is always fp32."""


class Bundle(NamedTuple):
    """The parts of a bundle."""

    tokenizer: TextTokenizer
    dalle: Transformer
    dvae: Codec
    clip: CLIP
    hashes: dict[str, str]
    """Part -> 16 hexadecimal digits."""


def load_bundle(path: Path, device: str | torch.device, precision: Precision) -> Bundle:
    """Load a bundle and check that its parts belong together.

    Raises:
        FileNotFoundError: the bundle, or a part of it, is missing.
        ValueError: a part is damaged, the transformer was trained with another tokenizer or dVAE, or the precision is
            unknown; or there is no such device.
    """
    device = usable_device(device)
    check_precision(precision)
    parts = {part: bundle_part(path, part) for part in PARTS}
    tokenizer = load_tokenizer(parts["tokenizer.json"])
    hashes = {part: directory_hash(parts[part]) for part in MODELS}
    dalle = matching_transformer(path, tokenizer, hashes["dvae"])
    return Bundle(
        tokenizer=tokenizer,
        dalle=dalle.to(device, DTYPES[precision]),
        dvae=load_codec(parts["dvae"], device),
        clip=CLIP.load(parts["clip"]).to(device),
        hashes={"tokenizer": tokenizer.hash, **hashes},
    )


def matching_transformer(bundle: Path, tokenizer: TextTokenizer, dvae_hash: str) -> Transformer:
    """Read a bundle's transformer, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or was trained with another tokenizer or dVAE.
    """
    dalle = load_transformer(bundle_part(bundle, "dalle"))
    for part, held in (("tokenizer", tokenizer.hash), ("dvae", dvae_hash)):
        trained_with = dalle.metadata.get(f"{part}_hash")
        if trained_with != held:
            raise ValueError(
                f"the transformer was trained with the {part} {trained_with or 'of an unknown hash'}, "
                f"{bundle} holds {held}: its tokens would mean something else; put the {part} it "
                "was trained with into the bundle, or train it again with `dalle-train transformer`"
            )
    return dalle


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device on which models can compute here; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device, or it cannot compute: a GPU that this torch has no code for, for example.
    """
    n_gpus = torch.cuda.device_count()
    name = str(device) if device != "auto" else "cuda" if n_gpus else "cpu"
    known = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if known is None or (name != "cpu" and int(known[1] or 0) >= n_gpus):
        known_ones = ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(n_gpus))])
        raise ValueError(f"there is no device {name!r} to compute on: give one of {known_ones}")
    try:
        torch.ones(1, device=name).add(1).item()
    except RuntimeError as error:
        raise ValueError(f"the device {name} cannot compute ({reason_of(error, 200)}): give cpu, or auto") from error
    return torch.device(name)


def check_precision(precision: str) -> None:
    """Raise ValueError for an unknown precision."""
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}: give {' or '.join(DTYPES)}")


def bundle_part(bundle: Path, part: str) -> Path:
    """Return the path of a part of a bundle.

    Raises:
        FileNotFoundError: it is not there; the message says what makes it.
    """
    if not (bundle / part).exists():
        raise missing_part(bundle, part)
    return bundle / part


def missing_part(bundle: Path, *parts: str) -> FileNotFoundError:
    """Return the error that says what makes parts that a bundle lacks, or that there is no bundle."""
    if not bundle.is_dir():
        return FileNotFoundError(
            f"no bundle at {bundle}: expected a directory with {', '.join(PARTS)}; `make demo` makes one in runs/demo"
        )
    made = [f"no {part}: make it with {(HOW_TO_MAKE | PARTS)[part]}" for part in parts]
    return FileNotFoundError(f"the bundle {bundle} has {'; and '.join(made)}")


class Sized(Protocol):
    """A model, or what stands for one."""

    @property
    def config(self) -> Any:
        """Its sizes."""


def check_sizes(tokenizer: TextTokenizer, dalle: Sized, dvae: Sized) -> None:
    """Raise ValueError unless tokenizer, transformer and dVAE have the same vocabularies and grid."""
    for what, of_transformer, of_part in (
        ("text tokens", dalle.config.text_vocab, tokenizer.vocab_size),
        ("image tokens", dalle.config.image_vocab, dvae.config.vocab_size),
        ("rows of image tokens", dalle.config.grid, dvae.config.grid),
    ):
        if of_transformer != of_part:
            part = "tokenizer" if what == "text tokens" else "dVAE"
            raise ValueError(
                f"the transformer has {of_transformer} {what}, the {part} has {of_part}: "
                f"use the {part} that the transformer was trained with"
            )


def sampling_defaults(dalle: Transformer) -> SamplingDefaults:
    """Return the sampling defaults in a transformer's metadata, or the paper's.

    Raises:
        ValueError: they are damaged, or do not fit the transformer.
    """
    try:
        defaults = SamplingDefaults.from_json(dalle.metadata.get("sampling", {}))
        check_top_k(defaults.top_k, dalle.config.image_vocab)
    except ValueError as error:
        raise ValueError(
            f'the sampling defaults of the transformer, "sampling" in the metadata of its config.json, cannot be used: '
            f"{error}; correct them, or take them out to sample as the paper does"
        ) from error
    return defaults


class LoadedBundle:
    """The models of a bundle in memory, and what they can do at once: pictures of tokens, scores, batches that fit.

    Args:
        tokenizer: of the captions.
        dalle: the transformer, with the metadata of its training; sampling and decoding happen in its precision,
            float32 or bfloat16.
        dvae: turns image tokens into pictures and pictures into image tokens.
        clip: ranks the pictures.
        hashes: part -> hash, for the metadata of the pictures.
        memory: bytes that a batch may take, beside the models; by default 2 GiB on a CPU, and half of what is free
            on a GPU.
        compile: compile the steps of sampling and the decoding of pictures, on a CPU: worth it for many candidates of
            large models.

    Raises:
        ValueError: the parts do not fit one another, memory is not above 0, or the transformer's sampling defaults
            cannot be used.
    """

    @undisturbed()
    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        dalle: Transformer,
        dvae: Codec,
        clip: CLIP,
        hashes: Mapping[str, str],
        memory: int | None = None,
        compile: bool = False,
    ) -> None:
        check_sizes(tokenizer, dalle, dvae)
        check_memory(memory)
        self.tokenizer = tokenizer
        self.dalle = dalle.eval().requires_grad_(False)
        self.dvae = dvae.eval().requires_grad_(False)
        self.clip = clip.eval().requires_grad_(False)
        self.hashes = dict(hashes)
        # a faster copy, for decoding alone: pictures to complete are encoded in float32
        is_plain = dalle.dtype == torch.float32 and not compile
        self._decoding_dvae = self.dvae if is_plain else optimised(self.dvae, dtype=dalle.dtype, compile=compile)
        self.memory = memory
        self.compile = compile
        self.defaults = sampling_defaults(dalle)
        """How the bundle is sampled and ranked unless told otherwise."""
        self._warnings = Warnings(bool(dalle.metadata.get("null_caption_probability")))

    @classmethod
    @undisturbed()
    def load(
        cls,
        bundle: str | Path,
        device: str | torch.device = "cpu",
        *,
        precision: Precision = "fp32",
        memory: int | None = None,
        compile: bool = False,
    ) -> Self:
        """Load a bundle and check that its parts belong together.

        Args:
            bundle: the directory.
            device: where to compute: cpu, cuda, cuda:1 …, or auto for a GPU if there is one.
            precision: of sampling and decoding; in bf16 they are faster, and a candidate depends on its batch.
            memory: see `LoadedBundle`.
            compile: see `LoadedBundle`.

        Raises:
            FileNotFoundError: the bundle, or a part of it, is missing.
            ValueError: a part is damaged, the transformer was trained with another tokenizer or dVAE, or an argument
                is out of range, or there is no such device.
        """
        parts = load_bundle(Path(bundle), device, precision)
        return cls(**parts._asdict(), memory=memory, compile=compile)

    @undisturbed()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn image tokens into pictures, all at once.

        Args:
            tokens: int64 (N, I), or the first of them (N, J), in whole rows.

        Returns:
            float32 (N, 3, H, W) in [0, 1], or the tops of the pictures.
        """
        grid = self.dalle.config.grid
        return self._decoding_dvae.decode(tokens.to(self.dalle.device).reshape(len(tokens), -1, grid))

    @undisturbed()
    def rank(self, captions: Sequence[str], images: Tensor) -> Tensor:
        """Return the cosines of P captions and pictures float (N, 3, H, W) in [0, 1]: float32 (P, N) on the CPU."""
        return score(self.clip, captions, images).cpu()

    def default_batch_size(
        self, n: int, *, n_captions: int = 1, guided: bool = False, early_abandon: bool = False
    ) -> int:
        """Return how many candidates to sample at once: see `candidates_at_once`.

        Early abandon decodes pictures while the batch is under way, which takes half of the memory.
        """
        budget = memory_budget(self.dalle.device, self.memory) // (2 if early_abandon else 1)
        return candidates_at_once(self.dalle, budget, n, n_captions=n_captions, guided=guided)

    def judge(self, caption: str, finish: Callable[[Tensor], Tensor] = lambda images: images) -> Judge:
        """Return what decodes and scores candidates of a caption; `finish` makes the pictures of the decoded ones."""

        def at_once(n: int) -> int:
            return decoded_at_once(self.dvae, memory_budget(self.dalle.device, self.memory), n)

        return Judge(caption, self.clip, lambda tokens: finish(self.decode(tokens)), at_once)
