"""A folder of captioned pictures as people have them goes through every command, and every picture is accounted for."""

import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.corrupt import noise
from support.sources import JOINED, OTHER_FILES, WRITTEN, write_folder, write_table

import dalle.cli.main
import training.cli.main
import training.plan.machine
import training.ranks.job
import training.recipes


class Door(NamedTuple):
    """What a command told of the pictures that it was given."""

    name: str
    n_in: int
    n_out: int
    left_out: Counter[str]

    @property
    def adds_up(self) -> bool:
        return self.n_in == self.n_out + self.left_out.total()


Run = Callable[..., str]


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text, re.MULTILINE)
    return 0 if match is None else int(match[1].replace(",", ""))


def reasons(text: str, pattern: str) -> Counter[str]:
    """Return the numbers and reasons that a text tells, each as the pattern's two groups."""
    found = re.findall(pattern, text, re.MULTILINE)
    return Counter({reason.strip(): int(count.replace(",", "")) for count, reason in found})


def of_shards(name: str, n: int, text: str) -> Door:
    """Read the report of `dalle-train shards`."""
    lines = text[text.index("skipped  ") :].splitlines()[1:]
    skipped = itertools.takewhile(lambda line: line.startswith("  "), lines)
    found = [re.match(r"  (\S.*?)  +([\d,]+)(  |$)", line) for line in skipped]
    left_out = Counter({match[1]: int(match[2].replace(",", "")) for match in found if match})
    left_out += Counter({JOINED: number(r"([\d,]+) joined to a picture", text)})
    return Door(name, number(r"^read +([\d,]+)", text), number(r"^written +([\d,]+)", text), left_out)


def of_check(name: str, n: int, text: str) -> Door:
    left_out = reasons(text, r"^    ([\d,]+) × (.*)$") + reasons(text, r"^  ([\d,]+) × (further picture)")
    return Door(name, n, number(r"^usable +([\d,]+)", text), left_out)


def of_encode(name: str, n: int, text: str) -> Door:
    left_out = Counter({"unusable": number(r"([\d,]+) pictures? (?:was|were) skipped", text)})
    return Door(name, n, number(r"encoded ([\d,]+) picture", text), left_out + _left_out_of_shards(text))


def of_training(name: str, n: int, text: str) -> Door:
    n_out = number(r"^(?:\w+:|tokenizer: .* captions of) ([\d,]+) samples?\b", text)
    return Door(name, n, n_out, _left_out_of_shards(text))


def _left_out_of_shards(text: str) -> Counter[str]:
    return reasons(text, r"left out of the shards: ([\d,]+) (without image|without caption|duplicates)")


def of_search(name: str, n: int, text: str) -> Door:
    left_out = [
        re.findall(r"([\d,]+) × (?!a link,)([^;,)\n]*)", line)
        for line in text.splitlines()
        if "left out of the folders" in line or "skipped" in line
    ]
    found = Counter({reason: int(count.replace(",", "")) for count, reason in itertools.chain.from_iterable(left_out)})
    n_out = number(r"note: ([\d,]+) pictures?, ", text) or len(re.findall(r"^ *-?\d\.\d{4}  ", text, re.MULTILINE))
    return Door(name, n, n_out, found)


class Walk(NamedTuple):
    """The commands of a walk from a folder to pictures, and what reads their output."""

    run: Run
    """Runs "dalle" or "dalle-train" with arguments; returns all that it prints."""
    work: Path
    """Where everything is written."""
    recipe: str
    steps: int

    def doors(self, folder: Path, n: int, table: Path, n_rows: int, captions: Iterable[str]) -> Iterator[Door]:
        """Go through every command; yields what each told."""
        work, train = self.work, ("--steps", self.steps, "--global-batch", 4)
        shards, bundle = work / "shards", work / "bundle"
        made = of_shards("shards FOLDER", n, self.run("dalle-train", "shards", folder, "--out", shards))
        yield made
        text = self.run("dalle-train", "shards", table, "--out", work / "of-table")
        of_table = of_shards("shards TABLE", n_rows, text)
        yield of_table
        checks = ("check-data", "--out", work / "manifest", "--data", shards)
        yield of_check("check-data of those of FOLDER", made.n_out, self.run("dalle-train", *checks))
        checks = ("check-data", "--data", work / "of-table")
        yield of_check("check-data of those of TABLE", of_table.n_out, self.run("dalle-train", *checks))
        yield from self._stages(shards, bundle, made.n_out, train)
        text = self.run(
            "dalle", "generate", *captions, "--bundle", bundle, "--out", work / "samples", "-n", 2, "--keep", 1
        )
        n_lines = len((work / "samples" / "results.jsonl").read_text().splitlines())
        yield Door("generate, a picture for each caption", n_lines, number(r"([\d,]+) pictures? in", text), Counter())
        for verb in ("search", "search", "rank"):  # the second one uses what the first has kept
            where = ("a red cube", folder, "--bundle", bundle, "--out", work / verb)
            top = ("--top", 3) if verb == "search" else ()
            yield of_search(f"{verb} FOLDER", n, self.run("dalle", verb, *where, *top))

    def raw(self, folder: Path, n: int, bundle: Path) -> Iterator[Door]:
        """Give the commands a shard as `tar` makes one of the folder: its n pictures and other files.

        Links are counted twice there, as members that are never looked at, and as samples without a picture.
        """
        shard = self.work / "raw" / "raw.tar"
        shard.parent.mkdir()
        with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(folder, ".")
        yield of_check("check-data RAW", n, self.run("dalle-train", "check-data", "--data", shard))
        yield of_search("rank RAW", n, self.run("dalle", "rank", "a red cube", shard, "--bundle", bundle))
        out = ("--out", self.work / "raw-bundle", "--steps", self.steps, "--global-batch", 4, "--max-bad-fraction", 1)
        yield of_training("clip RAW", n, self.run("dalle-train", "clip", self.recipe, "--data", shard, *out))
        out = ("--dvae", bundle / "dvae", "--out", self.work / "raw-tokens", "--crops", 1, "--max-bad-fraction", 1)
        yield of_encode("encode RAW", n, self.run("dalle-train", "encode", "--data", shard, *out))

    def _stages(self, shards: Path, bundle: Path, n: int, train: tuple[object, ...]) -> Iterator[Door]:
        out, tokens = ("--out", bundle), self.work / "tokens"
        text = self.run("dalle-train", "tokenizer", self.recipe, "--data", shards, *out)
        yield of_training("tokenizer", n, text)
        for stage in ("dvae", "clip"):
            text = self.run("dalle-train", stage, self.recipe, "--data", shards, *out, *train)
            yield of_training(f"{stage}, {self.steps} steps", n, text)
        encode = ("encode", "--data", shards, "--dvae", bundle / "dvae", "--out", tokens, "--crops", 1)
        yield of_encode("encode", n, self.run("dalle-train", *encode))
        text = self.run("dalle-train", "transformer", self.recipe, "--data", tokens, *out, *train)
        yield of_training(f"transformer, {self.steps} steps", n, text)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(training.plan.machine, "usable_cores", lambda: 1)
    monkeypatch.setitem(training.recipes.RECIPES, "tiny", tiny.recipe)
    monkeypatch.setattr(training.ranks.job, "leave", lambda **_: None)
    mains = {"dalle": dalle.cli.main.main, "dalle-train": training.cli.main.main}

    def run(program: str, *arguments: object) -> str:
        code = mains[program]([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out + output.err

    return run


def drawn(n: int) -> Iterator[tuple[Image.Image, str]]:
    rng = np.random.default_rng(0)
    return ((noise(rng), f"a drawing of {i} things, in grey and red") for i in range(n))


@pytest.mark.slow
def test_every_picture_of_a_real_folder_is_told_at_every_door(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "My Pictures"
    made = write_folder(folder, drawn(8), 130)
    fates = write_table(folder, made, 130)
    doors = list(Walk(run, tmp_path, "tiny", 2).doors(folder, len(made), folder / "captions.csv", 130, ["a red cube"]))
    assert [door for door in doors if not door.adds_up] == []
    told = {door.name: Counter({WRITTEN: door.n_out}) + door.left_out for door in doors}
    assert told["shards FOLDER"] == Counter(one.fate for one in made)
    assert told["shards TABLE"] == fates


@pytest.mark.slow
def test_every_picture_of_a_folder_that_is_a_tar_is_told(tmp_path: Path, run: Run, bundle: Path) -> None:
    made = write_folder(tmp_path / "pictures", drawn(8), 130)
    n = len(made) + len(OTHER_FILES)
    doors = list(Walk(run, tmp_path, "tiny", 2).raw(tmp_path / "pictures", n, bundle))
    assert [door for door in doors if not door.adds_up] == []
