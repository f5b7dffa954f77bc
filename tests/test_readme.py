"""What README.md and the pages promise: commands parse, Python runs, links lead somewhere, the file tree is true."""

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dalle.cli.main
import training.cli.main
from training.drawings.shapes import held_out_reason
from training.drawings.shapes import parse as parse_caption
from training.recipes import recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{name}.md": (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in (
        "sample",
        "serve",
        "tokenizers",
        "train",
        "cluster",
        "data",
        "evaluation",
        "faults",
        "results",
        "weights",
        "dalle2",
    )
}
PROGRAMS = ("dalle", "dalle-train")
LAUNCHERS = ("deepspeed", "torchrun")


def code_blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def command_lines() -> Iterator[list[str]]:
    """The words of every command in the shell blocks of all pages; continued lines joined, comments left out.

    Where "…" stands for options, it is left out.
    """
    for page in PAGES.values():
        for block in code_blocks("sh", page):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[-1] != "…":
                    yield words


def our_commands() -> list[list[str]]:
    """Command lines from `dalle` or `dalle-train` on, also behind a launcher."""
    found = []
    for words in command_lines():
        start = next((i for i, word in enumerate(words) if word in PROGRAMS), None)
        if start is not None:
            assert start == 0 or words[0] in LAUNCHERS, f"unexpected words before the program: {' '.join(words)}"
            found.append(words[start:])
    return found


def parse(words: list[str]) -> Any:
    if words[0] == "dalle-train":
        return training.cli.main.read(words[1:])
    return dalle.cli.main.read(words[1:])


@pytest.mark.parametrize("words", our_commands(), ids=" ".join)
def test_a_command_of_the_pages_parses_and_its_recipe_exists(words: list[str]) -> None:
    name = getattr(parse(words), "recipe", None)
    assert name is None or recipe(name).name == name


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(SystemExit):
        parse(["dalle", "paint", "a red cube"])
    with pytest.raises(SystemExit):
        parse(["dalle-train", "dvae", "demo", "--data", "shards", "--out", "runs/x", "--no-such-option", "1"])


def test_the_pages_show_every_command() -> None:
    shown = {(words[0], words[1]) for words in our_commands()}
    verbs = {
        ("dalle", verb)
        for verb in ("generate", "edit", "rank", "score", "search", "reconstruct", "evaluate", "study", "serve")
    }
    verbs |= {("dalle", f"import-{kind}") for kind in ("dvae", "clip", "vqgan")}
    stages = ("shards", "plan", "all", "tokenizer", "dvae", "clip", "encode", "transformer", "evaluate", "status")
    assert verbs | {("dalle-train", stage) for stage in stages} <= shown
    assert ["make", "demo"] in command_lines()  # which is `dalle-train demo`


def test_captions_of_the_pages_for_the_demonstration_are_trained_ones() -> None:
    commands = [parse(words) for words in our_commands() if words[1] == "generate" and "--bundle" not in words]
    captions = [caption for command in commands for caption in command.captions]
    assert len(captions) >= 3
    for caption in captions:
        assert held_out_reason(parse_caption(caption)) is None, caption


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    used = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"demo", "test"} <= used <= targets


def test_the_python_of_the_readme_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = code_blocks("python")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(bundle)
    (tmp_path / "example.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = runpy.run_path("example.py")["result"]
    assert len(result.images) == 8


def test_the_file_tree_of_the_design_is_the_repository() -> None:
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    (tree,) = [block for block in re.findall(r"```text\n(.*?)```", design, re.S) if "benchmarks/" in block]
    listed: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        listed.add(folder if name == folder else folder + name)
    gone = sorted(name for name in listed if not (ROOT / name).exists())
    assert not gone, f"docs/design.md lists what is not there: {', '.join(gone)}"
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("storage", "dvae", "rerank", "unclip", "dalle", "training")
        for path in (ROOT / package).rglob("*.py")
        if not path.stem.startswith("__")
    }
    assert not modules - listed, f"the file tree of docs/design.md lacks {', '.join(sorted(modules - listed))}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_or_names_exist(page: str) -> None:
    links = [link for link in re.findall(r"\[[^\]]*\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    named = re.findall(r"`((?:storage|dalle|dvae|rerank|training|unclip|docs|tests)/[\w/.]+\.(?:py|md))`", PAGES[page])
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page} names what is not there: {', '.join(missing)}"


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 130


def test_the_python_of_the_readme_is_three_lines() -> None:
    (block,) = code_blocks("python")
    assert len(ast.parse(block).body) <= 3
