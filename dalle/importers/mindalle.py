"""minDALL-E into a transformer of ours (kakaobrain/minDALL-E at e548007)."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dalle.family.texts.charbpe import CharBPE
from dalle.family.variants.config import VariantConfig
from dalle.importers.variants import ImportedVariant, Source, n_layers, renamed, streamed
from dalle.sampling import SamplingDefaults
from storage.checkpoints.tensors import open_tensors, sha256, summary
from storage.tar import copy_members

SAMPLING = SamplingDefaults(top_k=256)
"""The most that its authors advise."""
LICENCE = "CC-BY-NC-SA 4.0, not for commercial use, as its repository says; of stage 1 nothing is stated"
STAGE_1, STAGE_2 = "stage1_last.ckpt", "stage2_last.ckpt"
VOCABULARY, MERGES = "bpe-16k-vocab.json", "bpe-16k-merges.txt"
HEAD_WIDTH = 64
"""Width of an attention head; weights do not show it."""

_NAMES = (
    (r"^text_embedding\.", "tok_emb_txt."),
    (r"^text_position_embedding\.", "pos_emb_txt."),
    (r"^image_embedding\.", "tok_emb_img."),
    (r"^place_embeddings\.0\.", "pos_emb_img."),
    (r"^final_norm\.0\.", "ln_f."),
    (r"^text_head\.", "head_txt."),
    (r"^image_head\.", "head_img."),
    (r"\.attention_norm\.", ".ln1."),
    (r"\.attention\.qkv\.", ".attn.(query|key|value)."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.mlp_norm\.", ".ln2."),
)
"""From our names to theirs, one after the other."""
_WHAT = f"minDALL-E's {STAGE_2}"


@contextmanager
def mindalle_files(source: Path, room: Path) -> Iterator[dict[str, Path]]:
    """Give the published files by their names, for as long as they are needed.

    Args:
        source: 1.3B.tar.gz, or a folder with what is in it, in `tokenizer` or side by side.
        room: an existing folder with room for what is in the tar file.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: it is a file, but no tar file, or damaged.
    """
    names = (VOCABULARY, MERGES, STAGE_1, STAGE_2)
    if not source.is_dir():
        if not source.exists():
            raise FileNotFoundError(f"no file {source}: expected minDALL-E's 1.3B.tar.gz, or a folder of its content")
        with TemporaryDirectory(prefix=".mindalle-", dir=room) as folder:
            copy_members(source, names, Path(folder))
            yield {name: Path(folder) / name for name in names}
        return
    found = {name: source / name for name in names}
    found |= {name: path for name in names if (path := source / "tokenizer" / name).is_file()}
    if missing := [name for name, path in found.items() if not path.is_file()]:
        raise FileNotFoundError(f"no {', '.join(missing)} in {source}: expected the content of minDALL-E's 1.3B.tar.gz")
    yield found


def import_mindalle(weights: Path, tokenizer: CharBPE) -> ImportedVariant:
    """Open the weights of minDALL-E's transformer.

    Args:
        weights: stage2_last.ckpt.
        tokenizer: of the captions, which knows the id of the pad.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, damaged, names code, or is computed in another way.
    """
    checkpoint = open_tensors(weights)
    tensors = checkpoint.under("state_dict.")
    try:
        text_len, _ = tensors.shape("pos_emb_txt.weight")
        n_places, d_model = tensors.shape("pos_emb_img.weight")
        text_vocab, _ = tensors.shape("tok_emb_txt.weight")
        image_vocab, _ = tensors.shape("tok_emb_img.weight")
    except (KeyError, ValueError):
        shown = summary(list(checkpoint)[:100], depth=2) or "no tensors"
        raise ValueError(f"{weights} is no minDALL-E: it holds {shown}; expected {_WHAT}") from None
    grid = math.isqrt(n_places)
    try:
        if grid**2 != n_places:
            raise ValueError(f"{n_places} image positions are no square")
        config = VariantConfig(
            n_layers=n_layers(tensors, "blocks."),
            d_model=d_model,
            n_heads=d_model // HEAD_WIDTH,
            text_len=text_len,
            grid=grid,
            text_vocab=text_vocab,
            image_vocab=image_vocab,
            attention="dense",
            variant="minDALL-E",
            pad=tokenizer.pad,
        )
    except ValueError as error:
        raise ValueError(f"{weights} has impossible sizes: {error}; expected {_WHAT}") from error

    def source(name: str) -> Source:
        found = renamed(name, _NAMES)
        parts = re.search(r"\((.*)\)", found)
        return Source([found.replace(parts[0], part) for part in parts[1].split("|")] if parts else [found])

    return ImportedVariant(
        model=streamed(config, tensors, source, what=_WHAT),
        files={weights: sha256(weights)},
        format=checkpoint.format,
        assumed="GELU by erf, captions in small letters",
        left=[name for name in checkpoint if not name.startswith("state_dict.")],
        licence=LICENCE,
        sampling=SAMPLING,
    )
