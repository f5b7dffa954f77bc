"""The original DALL·E (Ramesh et al. 2021): captions and image tokens as one stream, sampled and ranked."""

from importlib import import_module

TYPE_CHECKING = False  # importing typing takes as long as all else before a program hears Ctrl-C
if TYPE_CHECKING:
    from typing import Any

    from dalle.model import DALLE, DALLEConfig
    from dalle.pipeline import Pipeline
    from dalle.tokenizer import Tokenizer
    from dalle.unclip.pipeline import UnCLIP

__all__ = ["DALLE", "DALLEConfig", "Pipeline", "Tokenizer", "UnCLIP"]

_HOMES = {
    "DALLE": "dalle.model",
    "DALLEConfig": "dalle.model",
    "Pipeline": "dalle.pipeline",
    "Tokenizer": "dalle.tokenizer",
    "UnCLIP": "dalle.unclip.pipeline",
}


def __getattr__(name: str) -> "Any":
    """Import a public name on first use, so that a program pays only for the modules it needs."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dalle' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
