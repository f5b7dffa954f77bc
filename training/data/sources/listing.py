"""Sources of captioned pictures: folders with captions beside them, CSV, TSV and JSONL tables, COCO's annotations.

Nothing in a source is executed or downloaded, and no link is followed out of its folder unless that is asked for.
"""

import os
from pathlib import Path

from training.data.sources.folders import list_folder
from training.data.sources.pictures import Listing
from training.data.sources.records import json_file_rows, json_line_rows, list_rows
from training.data.sources.tables import table_rows

_EXPECTED = "expected a folder of pictures, or a .csv, .tsv, .jsonl or COCO .json file"
_PANDAS = "write it as JSONL, for example with pandas: DataFrame.to_json(FILE, orient='records', lines=True)"
_UNPACK = "unpack it first"
_ADVICE = {
    ".parquet": _PANDAS,
    ".arrow": _PANDAS,
    ".feather": _PANDAS,
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save it as CSV in UTF-8"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".tgz"), _UNPACK),
    ".txt": "if it is a table with a header, call it .csv",
}


def list_source(source: Path, images: Path | None, *, follow_links: bool = False) -> Listing:
    """Return the pictures of a folder or table, in its order.

    Args:
        source: folder of pictures with captions beside them, or a .csv, .tsv, .jsonl or COCO .json file.
        images: folder of the pictures that a table names; None looks beside the table and in "images" beside it.
        follow_links: whether links may lead out of the folder of pictures.

    Raises:
        FileNotFoundError: no such source or folder of pictures.
        ValueError: the source cannot be understood, or has no pictures.
        OSError: it cannot be read.
    """
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"no folder of pictures {images}")
    if source.is_dir():
        if images is not None:
            raise ValueError(f"{source} is a folder with captions beside its pictures: leave --images out")
        return list_folder(source, follow_links=follow_links)
    if not source.exists():
        raise FileNotFoundError(f"no {source}: {_EXPECTED}")
    path = Path(os.path.abspath(source))
    roots = [path.parent, path.parent / "images"] if images is None else [Path(os.path.abspath(images))]
    match path.suffix.lower():
        case ".csv" | ".tsv":
            rows = table_rows(path, roots)
        case ".jsonl" | ".ndjson":
            rows = json_line_rows(path)
        case ".json":
            rows, coco_folder = json_file_rows(path)
            if images is None and coco_folder is not None:
                roots.append(coco_folder)
        case ".tar":
            raise ValueError(f"{source} is a shard already: shards, img2dataset's included, are used as they are")
        case suffix:
            advice = f"; {_ADVICE[suffix]}" if suffix in _ADVICE else ""
            raise ValueError(f"{source} is a file of type {suffix or 'none'}: {_EXPECTED}{advice}")
    listing = list_rows(rows, roots, follow_links=follow_links)
    if not listing.pictures:
        raise ValueError(f"{source} lists no pictures: expected a row for each below the header")
    return listing
