"""The states of a process's random generators, as tensors: torch's on the CPU and the GPU, NumPy's and Python's.

Data and noise have their own generators; these states cover code that uses the global ones, such as dropout.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_file(rank: int) -> str:
    """Return the name of the file with a rank's random states."""
    return f"random_{rank:05d}.safetensors"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's global generators; of GPUs, of `device` alone."""
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, python_words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, words), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python": torch.tensor(python_words),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that `random_states` returned.

    Raises:
        ValueError, KeyError, RuntimeError: the states are damaged.
    """
    *words, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item())
    )
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
