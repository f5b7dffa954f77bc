"""Whether torch.compile works on this machine. A leaf: it knows no model, and every package may import it."""

import logging
import warnings
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

VARIANTS = 64
"""How often torch may compile one function anew, for other layers, dtypes and batch sizes, before it gives up: it
counts all layers together, and its own limit, 8, is for one model of one shape."""


def can_compile(device: torch.device | str) -> bool:
    """Return whether torch.compile works for a device, found out once by compiling something tiny.

    Where it does not, as without a C++ compiler, a warning says why: what asked for it is to go on uncompiled. Where it
    does, torch is told to keep `VARIANTS` versions of a function.
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
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        logger.warning("nothing is compiled, which only costs speed: torch.compile does not work here (%s)", reason)
        return False
    return True
