"""The packages whose files are imported, installed apart by `make references`; only the parts that compute."""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest

_STAND_INS = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "timm", "timm.layers")
_STAND_INS += ("transformers", "transformers.modeling_outputs")
"""What open_clip imports at the top, and its plain models do not use."""
_STAND_INS += ("omegaconf", "taming", "taming.models", "taming.models.vqgan", "youtokentome")
"""What DALLE-pytorch imports at the top for VQGANs and for one of its tokenizers."""


class _StandIn(types.ModuleType):
    """A module, every name of which is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def reference(name: str) -> Any:
    """Import a module of a package without running the __init__ of the folders it is in; skip where it is missing."""
    package, *inner = name.split(".")[:-1]
    found = next((Path(folder) / package for folder in sys.path if (Path(folder) / package).is_dir()), None)
    if found is None or not list(found.glob("*.py")):
        pytest.skip(f"{package} is not installed: `make references` does it")
    parents: dict[str, types.ModuleType] = {}
    for depth in range(len(inner) + 1):
        parent = types.ModuleType(".".join([package, *inner[:depth]]))
        parent.__path__ = [str(found.joinpath(*inner[:depth]))]
        parents[parent.__name__] = parent
    added = parents | {stand_in: _StandIn(stand_in) for stand_in in _STAND_INS}
    added = {key: value for key, value in added.items() if key not in sys.modules}
    sys.modules.update(added)
    try:
        return importlib.import_module(name)
    finally:
        for key in added:
            if key not in parents:
                sys.modules.pop(key, None)
