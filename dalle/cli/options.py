"""Options that several verbs share, and the checks of them."""

import tempfile
from pathlib import Path
from typing import Annotated

import tyro

DEFAULT_BUNDLE = Path("runs/demo")

Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Device = Annotated[
    str, tyro.conf.arg(metavar="DEVICE", help="Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:1.")
]
Caption = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION", help="What the pictures should show.")]
PictureSources = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="PICTURE...", help="Pictures, folders or shards (.tar).", help_behavior_hint="(one or more)"),
]
Bundle = Annotated[Path, tyro.conf.arg(metavar="DIR", help="Directory with tokenizer.json, dvae/, dalle/ and clip/.")]
UnCLIPBundle = Annotated[
    Path, tyro.conf.arg(metavar="DIR", help="Directory with clip/, decoder/, perhaps dvae/, and upsamplers.")
]
OwnCLIP = Annotated[
    Path | None,
    tyro.conf.arg(metavar="DIR", help="Directory of a CLIP.", help_behavior_hint="(default: the bundle's)"),
]
OwnDVAEs = Annotated[
    tuple[Path, ...],
    tyro.conf.arg(
        metavar="DIR...",
        help="Directories of dVAEs or VQGANs, or of bundles with them; put the pictures before them.",
        help_behavior_hint="(default: the bundle's)",
    ),
]
JSONLines = Annotated[
    bool,
    tyro.conf.arg(name="json", help="Print a JSON object per picture, not a table.", help_behavior_hint=""),
]

CaptionJSONLines = Annotated[
    bool,
    tyro.conf.arg(name="json", help="Print a JSON object per caption, not a table.", help_behavior_hint=""),
]


def check_writable(folder: Path) -> None:
    """Make a folder if need be, and fail now, not after an hour of computing, if it cannot be written to.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
