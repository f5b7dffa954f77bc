"""What a file is that was given as a checkpoint and is none: the usual causes of "Invalid magic number"."""

import re
import zipfile
from pathlib import Path

from storage.checkpoints.torch_files import ZIP_MAGIC

_OTHERS = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"\x89HDF": "is an HDF5 file (Keras, TensorFlow): expected weights of PyTorch or flax",
    b"GGUF": "is a GGUF file (llama.cpp): expected weights of PyTorch or flax",
    b"\x93NUMPY": "is a NumPy array: expected a checkpoint",
    b"\x89PNG": "is a picture: expected a checkpoint",
    b"\xff\xd8\xff": "is a picture: expected a checkpoint",
}
"""Other files by their first bytes."""


def wrong_file(path: Path) -> str | None:
    """Say what a file is if it cannot be a checkpoint, as the rest of a sentence; None if it may be one."""
    if path.is_dir():
        return "is a folder: expected a file"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    # the length at the start of a safetensors file can look like a letter, but has zeros
    text = start.lstrip().lower() if b"\0" not in start else b""
    if size == 0:
        return "is empty (0 bytes): download it again"
    if text.startswith(b"version https://git-lfs"):
        found = re.search(rb"size (\d+)", start)
        of = f" of {int(found[1]):,} bytes" if found else ""
        return f"is a Git LFS pointer, a text in place of the file{of}: get the file itself, with `git lfs pull`"
    if text.startswith(b"<"):
        return "is a web page, not a checkpoint: the download answered with an error or a login; download it again"
    if text.startswith((b'{"', b"{\n", b"[")) and start.isascii():
        return "is a JSON text: expected a checkpoint; give the weights beside it, or their folder"
    if start.startswith(ZIP_MAGIC) and not zipfile.is_zipfile(path):
        return f"is cut off: a zip file of {size:,} bytes without its end; download it again"
    return next((fault for magic, fault in _OTHERS.items() if start.startswith(magic)), None)
