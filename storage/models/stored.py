"""Models that are saved as directories and loaded from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from storage.models.directory import load_directory, load_weights, save_directory

Config = TypeVar("Config")


class StoredModel(nn.Module, Generic[Config]):
    """A model that is saved as a directory and loaded from it."""

    kind: ClassVar[str]
    """Kind of the directory, in its config.json."""
    config_type: ClassVar[type[Any]]
    """Class of its configuration."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        """Metadata of the directory this model was loaded from; empty for a new model."""

    def save(self, path: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
        """Write config and weights as a directory, atomically.

        Args:
            path: the directory to write.
            metadata: what else to remember, such as `tokenizer_hash` and `dvae_hash`; values must be JSON. By default
                what the model has.
        """
        kept = dict(self.metadata if metadata is None else metadata)
        save_directory(Path(path), self.kind, self.config, self.state_dict(), metadata=kept)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Return the model of a directory, on the CPU, in evaluation mode; `metadata` holds what was saved with it.

        Raises:
            FileNotFoundError: if there is no such directory.
            ValueError: if it holds something else, or is damaged.
        """
        config, state, metadata = load_directory(Path(path), cls.kind, cls.config_type)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, state, path)
        model.metadata = dict(metadata)
        return model.eval()


def n_weights(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
