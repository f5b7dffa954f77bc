"""Options of every kind of `dalle import-bundle`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """What every kind of bundle is told."""

    clip: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory of the CLIP that will rank its pictures, such as `dalle import-clip` writes; it is copied."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The bundle to write; it must not be there yet."""
