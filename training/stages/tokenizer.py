"""The transformer's tokenizer: a BPE trained on all captions."""

from pathlib import Path

from dalle.output.text import Say
from dalle.tokenizer import Tokenizer
from training.recipes import Recipe
from training.stages.inputs import Inputs, all_captions
from training.stages.locks import stage_lock

MAX_VOCAB = 1_000_000
"""Entries; memory for all of them is taken at once."""


def train_tokenizer(recipe: Recipe, inputs: Inputs, say: Say) -> Path:
    """Train the BPE on all captions of the shards; returns the file.

    Raises:
        ValueError: the vocabulary is too large; or the file exists, and `inputs.fresh` does not say to replace it.
    """
    if recipe.text_vocab > MAX_VOCAB:
        raise ValueError(f"vocab_size must be at most {MAX_VOCAB:,}, got {recipe.text_vocab:,}")
    path = inputs.out / "tokenizer.json"
    if path.exists() and not inputs.fresh:
        raise ValueError(
            f"{path} is there, and a transformer may have been trained with it: give another --out, or --fresh to "
            "replace it"
        )
    with stage_lock(inputs.out, "tokenizer"):
        data, _ = inputs.open(captions=True, encoded=True)
        tokenizer = Tokenizer.train(all_captions(data), vocab_size=recipe.text_vocab)
        tokenizer.save(path)
    say(f"tokenizer: {tokenizer.vocab_size} entries from the captions of {len(data)} samples, saved as {path}")
    return path
