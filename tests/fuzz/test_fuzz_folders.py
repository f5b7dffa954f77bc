"""Folders of pictures with captions in files beside them."""

from collections import Counter
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from doors import Door, fuzz, require_kept
from hypothesis import given
from odd import expected_captions
from odd_folders import folders, write

from dalle.data.endings import CAPTION_ENDINGS, ending_of, is_picture
from dalle.data.reader import ShardData
from training.data.shards import make_shards
from training.data.sources.listing import list_source
from training.data.sources.pictures import Listing


def check_all_is_told_of(listing: Listing, folder: Path) -> None:
    """Require that every file is a picture, a caption of one, or counted among the others."""
    told = {picture.name for picture in listing.pictures}
    told |= {name for names in listing.others.values() for name in names}
    hidden = [name for names in listing.others.values() for name in names if PurePath(name).name.startswith(".")]
    captions: Counter[tuple[str, bool]] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in told or any(PurePath(name).is_relative_to(one) for one in hidden):
            continue
        require_kept(ending_of(name) in CAPTION_ENDINGS, f"{name!r} is told of nowhere")
        has_picture = any(
            is_picture(one) for one in told if PurePath(one).with_suffix("") == PurePath(name).with_suffix("")
        )
        skipped = any(PurePath(one).with_suffix("") == PurePath(name).with_suffix("") for one in told)
        require_kept(has_picture or skipped, f"{name!r} is beside no picture")
        captions[PurePath(name).with_suffix("").as_posix(), ending_of(name) == ".json"] += 1
    require_kept(max(captions.values(), default=1) == 1, f"a second caption: {captions}")
    names = [picture.name for picture in listing.pictures]
    require_kept(len(names) == len(set(names)), "a picture twice")


@fuzz(1000)
@given(files=folders())
def test_folders(files: dict[bytes, bytes], tmp_path: Path, door: Door) -> None:
    with TemporaryDirectory(dir=tmp_path) as name:
        folder = Path(name)
        write(files, folder)

        def check() -> int:
            listing = list_source(folder, None)
            check_all_is_told_of(listing, folder)
            for picture in listing.pictures:
                text = (folder / picture.name).with_suffix(".txt")
                if picture.skip is None and text.is_file() and text.stat().st_size:
                    found = [line for line in picture.captions if line]
                    require_kept(found == expected_captions(text.read_bytes()), (picture.name, found))
            return sum(picture.skip is not None for picture in listing.pictures)

        door.knock(check, names=folder.name)


@fuzz(100)
@given(files=folders())
def test_folders_become_shards(files: dict[bytes, bytes], tmp_path: Path, door: Door) -> None:
    with TemporaryDirectory(dir=tmp_path) as name, TemporaryDirectory(dir=tmp_path) as out:
        folder = Path(name)
        write(files, folder)

        def check() -> int:
            report = make_shards(folder, Path(out))
            require_kept(report.n_rows == report.n_samples + report.n_skipped, report)
            data = ShardData.open([out], captions=True)
            require_kept(len(data) == report.n_samples, f"{len(data)} samples of {report.n_samples}")
            require_kept(sum(len(data.read(i).captions) for i in range(len(data))) == report.n_captions, report)
            return report.n_skipped

        door.knock(check, names=folder.name)
