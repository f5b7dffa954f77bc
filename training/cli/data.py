"""The commands of `dalle-train` about data: shards, check-data, duplicates."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dalle.cli.command import parse, resolve_device
from dalle.cli.options import Device
from dalle.data.reader import ShardData
from dalle.output.progress import progress_bar
from dalle.output.text import printable
from rerank import CLIP
from storage.stores.files import local_folder, upload_folder
from training.cli.options import Switch, given_options
from training.data.check_data import check_data
from training.data.check_report import report as check_report
from training.data.duplicates import EXCLUDED, SHEET, find_duplicates
from training.data.filters import FilterOptions, ShardFilter
from training.data.manifest import FILES, NEW_RECORDS
from training.data.shards import make_shards
from training.stages.inputs import CacheOptions

InCache = Annotated[CacheOptions, tyro.conf.arg(name="cache", help=""), tyro.conf.OmitArgPrefixes]
InFilter = Annotated[FilterOptions, tyro.conf.arg(name="filter", help=""), tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class ShardsCommand:
    """Make WebDataset shards from pictures and captions.

    The source is a folder of pictures with .txt captions beside them, a CSV, TSV or JSONL file, or the JSON of COCO.
    What is skipped is counted by reason: docs/data.md.
    """

    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """Of the command line."""
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder, table or annotation file."""
    out: Path
    """Folder for the shards and report.json."""
    images: Path | None = None
    """Folder that the table's picture names are relative to; by default the table's own."""
    samples_per_shard: int = 1000
    """Samples in one tar."""
    overwrite: Switch = False
    """Replace shards of the same name that are there."""
    follow_links: Switch = False
    """Follow links that lead out of the folder of pictures, and links to folders."""
    paper_filters: Switch = False
    """Filter as the paper does, as far as it says how: captions of at least 3 words that are not mostly boilerplate,
    and aspect ratios within 1/2 … 2. Filters that are given override it."""
    filters: InFilter

    def run(self) -> None:
        """Make them."""
        with progress_bar("pictures") as progress:
            made = make_shards(
                self.source,
                self.out,
                images=self.images,
                samples_per_shard=self.samples_per_shard,
                keep=self.keep(),
                overwrite=self.overwrite,
                follow_links=self.follow_links,
                progress=progress,
            )
        print(printable(made.table()))

    def keep(self) -> ShardFilter:
        """Return which pictures are kept."""
        chosen = ShardFilter.of_the_paper() if self.paper_filters else ShardFilter()
        names = {field.name for field in dataclasses.fields(FilterOptions)}
        given = given_options(self, self.arguments)
        return dataclasses.replace(chosen, **{name: value for name, value in given.items() if name in names})


@dataclass(frozen=True, kw_only=True)
class CheckDataCommand:
    """Check shards: read and decode everything in them once, and say what is wrong and what to do.

    Nothing in the shards is changed. What is found is no error: the exit code is 0.
    """

    data: tuple[str, ...]
    """Shards: files, folders, globs or brace ranges such as shards/{000000..000099}.tar; also those of image tokens."""
    out: Path | None = None
    """Folder for the manifest, or its URL in a store; training takes it as --manifest, and unchanged shards that it
    knows are not read again. By default only the report is printed."""
    workers: int | None = None
    """Processes that read, 0 for this one alone; by default one for each core."""
    tokenizer: Path | None = None
    """tokenizer.json, to count the captions' tokens; by default they are not counted."""
    exclude_keys: tuple[Path, ...] = ()
    """Files of samples that training with this manifest leaves out, such as its own duplicates.jsonl or unusable.jsonl,
    or the excluded.jsonl of `dalle-train duplicates`: lines of {"shard": …, "key": …}."""
    overwrite: Switch = False
    """Replace what the manifest in OUT knows: shards that have changed or are gone, and samples left out. A run that
    began with it may need it as it was."""
    copies: InCache

    def run(self) -> None:
        """Check them."""
        workers = self.workers if self.workers is not None else os.cpu_count() or 1
        self.copies.use_cache()
        with ExitStack() as stack:
            if self.out is None:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                out = local_folder(self.out, FILES, made=NEW_RECORDS)  # of a check that was interrupted
            progress = stack.enter_context(progress_bar("shards"))
            summary = check_data(
                self.data,
                out,
                workers=workers,
                tokenizer=self.tokenizer,
                exclude=self.exclude_keys,
                overwrite=self.overwrite,
                progress=progress,
            )
        if self.out is not None:
            upload_folder(self.out, FILES)
        print(printable(check_report(summary, self.out)))


@dataclass(frozen=True, kw_only=True)
class DuplicatesCommand:
    """Find near-duplicates by CLIP's features: within some pictures, or between those to train and to validate on.

    OUT gets pairs.jsonl, the pairs with their cosines (with --against: the nearest picture for each of those);
    pairs.png, which shows pairs by their cosine, to choose the threshold by; and excluded.jsonl, what to leave out.
    """

    data: tuple[str, ...]
    """Shards of pictures in which copies are looked for."""
    clip: Path
    """Directory of a CLIP, or of a bundle."""
    out: Path
    """Folder for what is found."""
    against: tuple[str, ...] = ()
    """Shards of validation pictures: pictures of --data near one of these are to be left out. By default the pictures
    of --data are compared among themselves, and the later one of two is to be left out."""
    threshold: float = 0.97
    """Cosine from which two pictures are taken to be the same. It depends on the CLIP: look at pairs.png."""
    workers: int = 1
    """Processes that read; 0 reads in this process."""
    device: Device = "auto"
    copies: InCache

    def run(self) -> None:
        """Find them."""
        self.copies.use_cache()
        directory = self.clip / "clip" if (self.clip / "clip").is_dir() else self.clip
        clip = CLIP.load(directory).to(resolve_device(self.device)).eval()
        data = ShardData.open(self.data, captions=False)
        against = ShardData.open(self.against, captions=False) if self.against else None
        with progress_bar("pictures") as progress:
            found = find_duplicates(
                data,
                against,
                clip,
                self.out,
                threshold=self.threshold,
                workers=self.workers,
                progress=progress,
            )
        print(found)
        if (self.out / SHEET).exists():
            print(f"to choose the threshold, look at {self.out / SHEET}")
        if found.n_excluded:
            print(f"to leave them out, give {self.out / EXCLUDED} to `dalle-train check-data --exclude-keys`")


Command = ShardsCommand | CheckDataCommand | DuplicatesCommand
COMMANDS: dict[str, type[Command]] = {
    "shards": ShardsCommand,
    "check-data": CheckDataCommand,
    "duplicates": DuplicatesCommand,
}


def read(verb: str, arguments: Sequence[str]) -> Command:
    """Return the command that the arguments after the verb say."""
    command: Command = parse(COMMANDS[verb], arguments, prog=f"dalle-train {verb}")
    return dataclasses.replace(command, arguments=tuple(arguments)) if isinstance(command, ShardsCommand) else command
