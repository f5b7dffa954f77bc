"""`dalle study`: a page on which people compare the pictures of two systems, and the count of their votes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from dalle.evaluation.given import given_files
from dalle.evaluation.nested.captions import Row, chosen_rows, read_rows
from dalle.evaluation.study.page import key_path, write_study
from dalle.evaluation.study.votes import FAST_S, count, read_votes, seconds_of, table
from dalle.output.text import counted, printable
from dvae.images import open_image

Folder = Annotated[Path | None, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Write a page on which people choose between two systems: the more realistic picture, and the better fit.

    The page is one file that needs no network. Each person saves a file of votes; --count adds them up.
    """

    first: Annotated[Folder, tyro.conf.arg(metavar="[A", help_behavior_hint="")] = None
    """Folder of the first system's pictures."""
    second: Annotated[Folder, tyro.conf.arg(metavar="B", help_behavior_hint="")] = None
    """Folder of the second system's."""
    captions: Annotated[Folder, tyro.conf.arg(metavar="CAPTIONS]", help_behavior_hint="")] = None
    """Their captions, one a line, or .jsonl."""
    images: int | None = None
    """Captions to ask about; by default all."""
    votes: int = 5
    """People that are to vote on each pair."""
    seed: int = 0
    """Of the order of the pairs, and of who is on the left."""
    page: Path = Path("runs/study.html")
    """The page; its key, which says who is on which side, is written beside it."""
    count: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="CSV ...")] = ()
    """Files of votes to count instead, of this page."""
    exclude: tuple[str, ...] = ()
    """Voters who do not count, as the paper left one out."""

    def run(self) -> None:
        """Write the page, or print the counts."""
        if self.votes < 1:
            raise ValueError(f"--votes is {self.votes}; it must be at least 1")
        if self.count:
            self._count()
            return
        if self.first is None or self.second is None or self.captions is None:
            raise ValueError("give two folders of pictures and their captions: dalle study A B CAPTIONS")
        every = sorted(read_rows(self.captions), key=lambda row: row.number)
        rows = chosen_rows(every, self.images)
        first, second = (_pictures(folder, every, rows) for folder in (self.first, self.second))
        key = write_study(first, second, rows, self.page, seed=self.seed)
        print(
            f"{counted(len(rows), 'pair')} in {printable(str(self.page))}: give it to {counted(self.votes, 'person')} "
            f"and count with `dalle study --page {printable(str(self.page))} --count CSV …`; keep {printable(str(key))}"
        )

    def _count(self) -> None:
        key = key_path(self.page)
        if not key.is_file():
            raise FileNotFoundError(
                f"no key at {key}, without which votes cannot be counted: give the page that was voted on with --page"
            )
        votes, n_captions = read_votes(self.count, key)
        strangers = sorted({*self.exclude} - {vote.voter for vote in votes})
        if strangers:
            voters = ", ".join(sorted({vote.voter for vote in votes}))
            raise ValueError(f"--exclude names {strangers[0]!r}, who is not among the voters ({voters})")
        counting = [vote for vote in votes if vote.voter not in self.exclude]
        if not counting:
            raise ValueError("--exclude names all voters, so there is nothing to count: leave somebody in")
        print(table(count(counting, self.votes, n_captions), self.votes))
        for voter, seconds in seconds_of(counting).items():
            if seconds < FAST_S:
                print(
                    f"{printable(voter)} answers within {seconds:.2f} s, too fast to look: leave the voter out with "
                    f"--exclude {printable(voter)}"
                )
        for voter in self.exclude:
            print(f"left out: {printable(voter)}")


def _pictures(folder: Path, every: Sequence[Row], rows: Sequence[Row]) -> Iterator[Image.Image]:
    """Yield the pictures of some rows of a folder that has those of all."""
    files = dict(zip((row.number for row in every), given_files(folder, every), strict=True))
    return (open_image(files[row.number]) for row in rows)
