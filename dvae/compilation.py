"""Whether torch.compile works on this machine. A leaf: it knows no model, and every package may import it."""

import logging
import warnings
from functools import lru_cache

import torch

from storage.errors import reason_of

logger = logging.getLogger(__name__)

VARIANTS = 64
"""Versions of one function that torch may compile, for other layers, dtypes and batch sizes: it counts all layers
together, and its own limit of 8 suits one model of one shape."""


def can_compile(device: torch.device | str) -> bool:
    """Return whether torch.compile works for a device, tried once with a tiny function; if not, warn and say why.

    Callers continue uncompiled. Also raises torch's limit to `VARIANTS` versions of a function.
    """
    return _can_compile(torch.device(device).type)


@lru_cache
def _can_compile(device_type: str) -> bool:
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(lambda x: (x.sin() + 1).sum())
            compiled(torch.ones(64, device=device_type))
    except Exception as error:  # torch documents no type for what a missing or broken compiler raises
        reason = reason_of(error, 200)
        logger.warning("torch.compile does not work here (%s): nothing is compiled, which only costs speed", reason)
        return False
    return True
