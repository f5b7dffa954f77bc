"""The project's own promises: dependencies, changelog, docs/paper.md, tests that can be collected without any data."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("storage", "dalle", "dvae", "rerank", "training", "unclip")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULE_OF = {
    "pillow": "PIL",
    **{name: name.replace("-", "_") for name in ("flask-cors", "python-multipart", "prometheus-client")},
}
"""Distributions that are imported under another name."""


def distributions(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def modules(requirements: Iterable[str]) -> set[str]:
    return {MODULE_OF.get(name, name) for name in distributions(requirements)}


def third_party(folder: Path) -> set[str]:
    """Top-level names imported by the files of a folder that are neither Python's nor ours."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                targets = [node.module or ""]
            else:
                continue
            # torch's writer is only a door to the tensorboard distribution
            names |= {"tensorboard" if name == "torch.utils.tensorboard" else name.split(".")[0] for name in targets}
    return names - set(sys.stdlib_module_names) - {*PACKAGES, "benchmarks"}


def test_runtime_dependencies_are_exactly_what_is_imported() -> None:
    used = set().union(*(third_party(ROOT / package) for package in PACKAGES))
    declared = modules(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]  # those of s3, gs, az and hf are imported by fsspec
    optional = modules([*extras["wandb"], *extras["http"], *extras["import"], *extras["serve"]])
    assert used - declared == optional, "imported, but not in pyproject.toml's dependencies, or optional and never used"
    assert declared - used == set(), "in pyproject.toml's dependencies, but never imported"


def test_tests_import_only_what_the_development_install_brings() -> None:
    declared = modules([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    of_the_tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"support", "servers"}
    assert third_party(ROOT / "tests") - declared - of_the_tests == set()


def test_every_dependency_has_a_tested_version_in_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert distributions([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]) - pinned == set()


def test_every_file_beside_the_code_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = [f"{name.replace('.', '/')}/{one}" for name, some in settings["package-data"].items() for one in some]
    installed = {path for pattern in patterns for path in ROOT.glob(pattern)}
    files = {path for name in PACKAGES for path in (ROOT / name).rglob("*.*") if path.is_file()}
    assert {path for path in files if path.suffix != ".py" and "__pycache__" not in path.parts} == installed


def test_the_changelog_has_an_entry_for_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(rf"^## \[{re.escape(PROJECT['version'])}\].*?\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    assert entry is not None, f"CHANGELOG.md has no entry for version {PROJECT['version']}"
    assert re.search(r"^- \S", entry[1], re.M), f"the entry for {PROJECT['version']} lists nothing"


def test_no_file_holds_the_marks_of_a_merge() -> None:
    marks = re.compile(r"^(?:<{7} |>{7} |={7}$)", re.M)
    paths = [path for name in (*PACKAGES, "tests", "benchmarks", "docs") for path in (ROOT / name).rglob("*")]
    texts = [path for path in (*paths, *ROOT.glob("*")) if path.suffix in {".py", ".md", ".toml", ".cfg", ".txt"}]
    assert len(texts) > 150
    assert not [str(path) for path in texts if marks.search(path.read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_all_tests_can_be_collected_without_data_network_or_home(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for name in (*PACKAGES, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(ROOT / "docs", clone / "docs")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    # which `make bench` installs, and torchmetrics then imports
    environment["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (tmp_path / "home").exists(), "collecting wrote to the home directory"


# ------------------------------------------------------------------------------------------------ docs/paper.md

REFERENCE = re.compile(r"`((?:storage|dalle|dvae|rerank|training|unclip)/[\w/]+\.py)(?::([\w.]+))?`")


def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """Functions, classes, methods and module-level names of a file, with their first and last lines."""
    found: dict[str, tuple[int, int]] = {}

    def visit(body: Iterable[ast.stmt], prefix: str) -> None:
        for node in body:
            lines = (node.lineno, node.end_lineno or node.lineno)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = lines
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[prefix + node.target.id] = lines
            elif isinstance(node, ast.Assign):
                found.update({prefix + target.id: lines for target in node.targets if isinstance(target, ast.Name)})

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def paper_rows() -> list[list[str]]:
    """The rows of the tables of docs/paper.md: section, code, deviation."""
    lines = (ROOT / "docs/paper.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "Paper"]


def deviations() -> Iterator[tuple[str, str, str]]:
    """Every "Deviation:" in the code: file, innermost function or class, file:line."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            names = definitions(path)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if "Deviation:" in line:
                    around = [name for name, (first, last) in names.items() if first <= number <= last]
                    yield file, max(around, key=len, default=""), f"{file}:{number}"


def test_every_place_that_the_paper_table_names_exists() -> None:
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    references = REFERENCE.findall(text)
    assert len(references) > 30
    wrong = [
        f"{file}:{name}"
        for file, name in references
        if not (ROOT / file).is_file() or (name and name not in definitions(ROOT / file))
    ]
    assert not wrong, f"docs/paper.md names what is not there: {', '.join(wrong)}"


def test_every_row_of_the_paper_table_has_three_cells_and_names_code_or_says_that_there_is_none() -> None:
    for row in paper_rows():
        assert len(row) == 3, f"a row of docs/paper.md has {len(row)} cells: {row}"
        section, code, deviation = row
        assert REFERENCE.search(code) or code == "not implemented", f"{section}: name file:function"
        assert deviation, f"{section}: say what deviates, or none"


def test_every_deviation_in_the_code_is_in_the_paper_table() -> None:
    listed = {
        f"{file}:{name}" if name else file
        for row in paper_rows()
        if row[2] != "none"
        for file, name in REFERENCE.findall(row[1])
    }
    missing = [place for file, name, place in deviations() if (f"{file}:{name}" if name else file) not in listed]
    assert not missing, f"deviations that docs/paper.md does not list: {', '.join(missing)}"


def test_the_paper_table_covers_the_paper() -> None:
    sections = " ".join(row[0] for row in paper_rows())
    for section in (
        "2.1",
        "2.2",
        "2.3",
        "2.4",
        "2.5",
        "2.6",
        "A.1",
        "A.2",
        "A.3",
        "B.1",
        "B.2",
        "C",
        "D",
        "E",
        "F",
        "G",
    ):
        assert re.search(rf"(?<![\w.]){re.escape(section)}(?![\w.])", sections), f"section {section} has no row"
