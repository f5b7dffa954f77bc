"""The settings in a file of DALLE-pytorch: what the weights do not show."""

from collections.abc import Collection, Mapping
from itertools import cycle, islice
from typing import Any

from storage.checkpoints.tensors import Tensors

_DEFAULTS = {"heads": 8, "dim_head": 64}
"""What the package takes where a file says nothing; everything else is required, or off."""
_OFF = (None, False, 0, "", "None")


class Settings:
    """The settings under a name, such as "hparams"; all of a file's must be known.

    Args:
        tensors: the file.
        name: of the settings.
        used: names that are read.
        ignored: names that are not, because they only matter in training.

    Raises:
        ValueError: there are none, or one is unknown and not off.
    """

    def __init__(self, tensors: Tensors, name: str, *, used: Collection[str], ignored: Collection[str]) -> None:
        self._path, self._name = tensors.path, name
        self._values: Mapping[str, Any] = tensors.under(f"{name}.").plain
        names = dict.fromkeys(key.split(".")[0] for key in self._values)
        if not names:
            raise ValueError(
                f"{tensors.path} has no {name}: expected a file that DALLE-pytorch's training script saved"
            )
        for key in names:
            if key not in used and key not in ignored and self._values.get(key, True) not in _OFF:
                raise ValueError(
                    f"{tensors.path}: {name} say {key}, which is not known here: another version or a fork"
                )

    def whole(self, key: str) -> int:
        """Return a whole number.

        Raises:
            ValueError: it is missing, or something else.
        """
        value = self._values.get(key, _DEFAULTS.get(key))
        if type(value) is not int:
            raise ValueError(f"{self._path}: {self._name} say {key} is {value!r}, expected a whole number")
        return value

    def flag(self, key: str) -> bool:
        """Return whether an option is on; one that is missing is off."""
        return self._values.get(key) not in _OFF

    def says(self, key: str) -> bool:
        """Return whether the settings name it, on or off."""
        return key in self._values

    def of_layers(self, key: str, n_layers: int) -> list[str]:
        """Return the values of a setting that goes round the layers, one a layer; empty if it says nothing."""
        values = [str(value) for name, value in self._values.items() if name.startswith(f"{key}.")]
        return list(islice(cycle(values), n_layers))
