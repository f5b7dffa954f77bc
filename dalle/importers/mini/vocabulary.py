"""Its tokenizer's vocabulary, from vocab.json and merges.txt, or from tokenizer.json."""

from pathlib import Path
from typing import Any

from dalle.family.texts.bart import BartTokenizer
from storage.text import parse_json, read_text

MASK = "<mask>"
"""A symbol that BART's vocabulary has, behind the others, and no text ever gets."""


def read_vocabulary(folder: Path, suffix: str = "", *, normalises: bool = True) -> tuple[BartTokenizer, list[Path]]:
    """Read the tokenizer of a folder.

    Args:
        folder: with vocab.json and merges.txt, or tokenizer.json.
        suffix: behind the names, as in vocab_mini.json.
        normalises: whether captions are to be normalised.

    Returns:
        The tokenizer, and the files that were read.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they hold something else.
    """
    vocab, merges, whole = folder / f"vocab{suffix}.json", folder / f"merges{suffix}.txt", folder / "tokenizer.json"
    if vocab.is_file() and merges.is_file():
        lines = [line for line in read_text(merges).split("\n") if line and not line.startswith("#version")]
        found: Any = read_json(vocab)
        pairs, files = [line.split(" ") for line in lines], [vocab, merges]
    elif whole.is_file() and not suffix:
        model = read_json(whole).get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise ValueError(f"{whole} is no byte-level BPE: expected the tokenizer.json of DALL·E mini")
        merged = model["merges"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merged]
        found, files = model.get("vocab"), [whole]
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: expected {vocab.name} and {merges.name}"
            + ("" if suffix else ", or tokenizer.json")
            + "; they are published beside the weights"
        )
    if not isinstance(found, dict) or not all(type(number) is int for number in found.values()):
        raise ValueError(f"{files[0]} is no vocabulary: expected symbols and their ids")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{files[-1]} is no list of merges: expected two symbols in each line")
    symbols = {symbol: number for symbol, number in found.items() if symbol != MASK}
    try:
        return BartTokenizer(symbols, [(left, right) for left, right in pairs], normalises=normalises), files
    except ValueError as error:
        raise ValueError(f"{' and '.join(file.name for file in files)} of {folder} do not fit: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; ValueError if it holds something else."""
    try:
        found = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object: download it again")
    return found
