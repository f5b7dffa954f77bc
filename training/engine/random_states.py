"""The states of a process's random generators, as tensors: torch's on the CPU and the GPU, NumPy's and Python's.

What a step sees is drawn from generators of its own. These are for whatever draws from the global ones, such as
dropout.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's global generators; of the GPUs, that of `device`."""
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
    """Put this process's global generators into the states that `random_states` returned.

    Raises:
        ValueError, KeyError, RuntimeError: they are no such states.
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
