"""The mark of the sheets that this program draws: they are no pictures of the folder that they lie in."""

from pathlib import Path

MARK = b"shET"
"""Name of an empty PNG chunk, the first one after the header, which other programs ignore and drop when they save."""
_PLACE = slice(37, 41)  # after the signature (8), the header (25) and the chunk's length (4)


def is_sheet(path: Path) -> bool:
    """Return whether a file is a sheet that this program drew; False if it cannot be read, or is no plain file."""
    if path.suffix.lower() != ".png" or not path.is_file():  # a pipe would never answer
        return False
    try:
        with path.open("rb") as file:
            return file.read(_PLACE.stop)[_PLACE] == MARK
    except OSError:
        return False
