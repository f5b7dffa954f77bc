"""OpenAI's merges, from the files in which they are published."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from rerank.tokenizer import CLIPTokenizer
from storage.text import parse_json

PUBLISHED = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
NAMES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt", "tokenizer.json")
"""Names of the file beside weights: OpenAI's, and the two of Hugging Face."""
MAX_BYTES = 32 * 2**20
"""Of a file, unpacked; larger ones are refused."""
_SPECIAL = 2 + 2 * 256
"""Ids that are no merges: start and end of text, and the bytes, inside a word and at its end."""


def read_vocabulary(path: Path | None, beside: Path, vocab_size: int) -> CLIPTokenizer:
    """Return OpenAI's tokenizer with as many ids as a model has.

    Args:
        path: the file; None for one beside the weights.
        beside: the folder of the weights.
        vocab_size: of the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, has too few merges, or its ids are not the model's.
    """
    path = path or next((beside / name for name in NAMES if (beside / name).is_file()), None)
    if path is None or not path.is_file():
        missing = f"no file {path}" if path else f"none of {', '.join(NAMES)} in {beside}"
        raise FileNotFoundError(
            f"CLIP needs the merges of its tokenizer, but there is {missing}: get {PUBLISHED} and say --vocabulary FILE"
        )
    merges = _merges(path)
    wanted = vocab_size - _SPECIAL
    if len(merges) < wanted:
        raise ValueError(f"{path} has {len(merges):,} merges, but the model needs {wanted:,}: get {PUBLISHED}")
    try:
        tokenizer = CLIPTokenizer.openai(merges[:wanted])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get {PUBLISHED}") from error
    _compare(path, tokenizer)
    return tokenizer


def _merges(path: Path) -> Sequence[tuple[str, str]]:
    """Read merges from OpenAI's list, or from a file of Hugging Face."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
        # the first line names the version; merges are pairs
        lines = parse_json(text)["model"]["merges"] if path.suffix == ".json" else text.split("\n")[1:]
        pairs = [tuple(line.split() if isinstance(line, str) else line) for line in lines if line]
        if not all(len(pair) == 2 and all(isinstance(symbol, str) for symbol in pair) for pair in pairs):
            raise ValueError("a line is not two symbols")
    except (OSError, EOFError, zlib.error, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of merges ({error}): get {PUBLISHED}") from error
    return [(left, right) for left, right in pairs]


def _compare(path: Path, tokenizer: CLIPTokenizer) -> None:
    """Raise ValueError unless the ids that Hugging Face's vocab.json says, if it is beside the merges, are these."""
    beside = path.with_name("vocab.json")
    if path.name != "merges.txt" or not beside.is_file():
        return
    try:
        published = parse_json(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not valid JSON ({error}): download it again") from error
    ids = tokenizer.ids
    different = [symbol for symbol in ids if not isinstance(published, dict) or published.get(symbol) != ids[symbol]]
    if different:
        raise ValueError(
            f"{beside} gives {len(different):,} symbols other ids than {path.name} does, {different[0]!r} among them: "
            "another tokenizer than OpenAI's, which is not read here"
        )
