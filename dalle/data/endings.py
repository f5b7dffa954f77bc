"""Endings of names, in any case: pictures, pictures of formats that are not read, captions.

Folders, tables, shards, `dalle rank` and `dalle search` judge names by these alone.
"""

from pathlib import PurePath

from dvae.images import FORMATS

READ_ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
"""Files with these endings count as pictures; their contents tell the format."""

_PHONE = "save it as JPEG, for example with heif-convert"
_CAMERA = "develop it to JPEG or TIFF"
_DRAWING = "draw it as PNG"
_LAYERS = "export it as PNG"
_OTHER = "save it as PNG or JPEG"
NOT_READ_ENDINGS = {
    **dict.fromkeys((".heic", ".heif", ".hif", ".heics", ".heifs"), _PHONE),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srw"), _CAMERA),
    **dict.fromkeys((".orf", ".rw2", ".raf", ".pef", ".x3f", ".raw", ".3fr", ".iiq", ".erf", ".kdc"), _CAMERA),
    **dict.fromkeys((".svg", ".svgz", ".eps", ".ai", ".wmf", ".emf", ".cdr"), _DRAWING),
    **dict.fromkeys((".psd", ".psb", ".xcf", ".kra", ".ora", ".afphoto"), _LAYERS),
    **dict.fromkeys((".jxl", ".jxr", ".wdp", ".hdp", ".bpg", ".flif", ".qoi", ".tga", ".ico", ".cur", ".icns"), _OTHER),
    **dict.fromkeys((".dds", ".exr", ".hdr", ".pcx", ".dib", ".pict", ".pct", ".ras", ".sgi", ".pam", ".pfm"), _OTHER),
    **dict.fromkeys((".xbm", ".xpm", ".fits", ".fit", ".dcm", ".djvu", ".avifs"), _OTHER),
}
"""Endings of pictures that are not read, each with what to do."""

CAPTION_ENDINGS = (".txt", ".cap", ".text", ".caption", ".json")
"""Files that hold captions, beside pictures and in shards."""


def ending_of(name: str | PurePath) -> str:
    """Return the ending of a name in small letters, ".jpg"; "" where there is none."""
    return PurePath(name).suffix.lower()


def is_picture(name: str | PurePath) -> bool:
    """Return whether a name is that of a picture that is read; hidden files are none."""
    return ending_of(name) in READ_ENDINGS and not PurePath(name).name.startswith(".")


def not_read(name: str | PurePath) -> str | None:
    """Return why the picture of that name is not read, and what to do; None for any other name, and hidden files.

    The reason is the same for all names with this ending, so that they can be counted.
    """
    ending = ending_of(name)
    if ending not in NOT_READ_ENDINGS or PurePath(name).name.startswith("."):
        return None
    return f"format {ending} is not read: {NOT_READ_ENDINGS[ending]}"
