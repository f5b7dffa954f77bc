import dataclasses
import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from storage.models import directory
from storage.models.directory import ADDED_LATER, directory_hash, load_directory, load_weights, save_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 4
    kinds: tuple[str, ...] = ("row", "column")
    n_layers: int = dataclasses.field(default=1, metadata=ADDED_LATER)
    wide: int | None = dataclasses.field(default=None, metadata=ADDED_LATER)
    mean: tuple[float, ...] = dataclasses.field(default=(0.5,), metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width ({self.width}) must be positive")


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(5, dtype=torch.bfloat16)}


def save(path: Path, **changes: object) -> None:
    arguments = {"kind": "dvae", "config": Config(), "state": state()} | changes
    save_directory(path, **arguments)


def edit(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_directory_gives_back_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "runs" / "m", metadata={"step": 3}, files={"tokenizer.json": b"{}"})
    config, loaded, metadata = load_directory(tmp_path / "runs" / "m", "dvae", Config)
    assert config == Config()
    assert metadata == {"step": 3}
    assert loaded.keys() == state().keys()
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in state().items()
    )
    assert {file.name for file in (tmp_path / "runs" / "m").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_slices_of_one_buffer_and_tied_weights_are_saved(tmp_path: Path) -> None:
    buffer = torch.arange(10.0)
    save(tmp_path / "m", state={"a": buffer[:4], "b": buffer[4:], "c": buffer[:4], "d": buffer[::2]})
    loaded = load_directory(tmp_path / "m", "dvae", Config)[1]
    assert torch.equal(loaded["c"], buffer[:4])
    assert torch.equal(loaded["d"], buffer[::2])
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 1000


def test_saving_again_replaces_the_whole_directory_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save(tmp_path / "m", files={"tokenizer.json": b"{}"})
    save(tmp_path / "m", config=Config(width=9))
    assert load_directory(tmp_path / "m", "dvae", Config)[0].width == 9
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not (tmp_path / "m" / "tokenizer.json").exists()
    for _ in range(2):
        save(tmp_path / "n", files={"extra.json": b"{}"})  # the caller's own


@pytest.mark.parametrize("step", ["write_tensors", "flush", "_swap"])
def test_a_full_disk_leaves_the_old_directory_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    save(tmp_path / "m")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory, step, full)
    with pytest.raises(OSError, match=r"cannot save the dvae in .*No space left on device.*unchanged") as caught:
        save(tmp_path / "m", config=Config(width=9))
    assert caught.value.errno == errno.ENOSPC
    assert load_directory(tmp_path / "m", "dvae", Config)[0].width == 4
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_old_directory_returns_when_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "m")
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="unchanged"):
        save(tmp_path / "m", config=Config(width=9))
    assert load_directory(tmp_path / "m", "dvae", Config)[0].width == 4
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_a_crash_between_the_renames_left_is_named(tmp_path: Path) -> None:
    save(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    with pytest.raises(FileNotFoundError, match=r"interrupted save left the previous one in .*\.m\.old"):
        load_directory(tmp_path / "m", "dvae", Config)
    save(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_other_files_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that belong to no model"):
        save(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors.bak", ".git", "pytorch_model.bin"])
def test_a_model_beside_other_files_is_never_replaced(name: str, tmp_path: Path) -> None:
    save(tmp_path / "m")
    (tmp_path / "m" / name).write_text("years of work")
    with pytest.raises(ValueError, match=rf"m holds files that belong to no model \({name}\): choose a new"):
        save(tmp_path / "m", config=Config(width=9))
    assert (tmp_path / "m" / name).read_text() == "years of work"
    assert load_directory(tmp_path / "m", "dvae", Config)[0].width == 4


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ('{"model_type": "bert", "hidden_size": 768}', "is missing or not ours"),
        ("[]", "is missing or not ours"),
        ("{", "is missing or not ours"),
        (None, "is missing or not ours"),
        ('{"format": 1, "kind": "clip"}', r"says format 1, kind 'clip'; expected format 1, kind 'dvae'"),
        ('{"format": 99, "kind": "dvae"}', r"says format 99, kind 'dvae'; expected format 1, kind 'dvae'"),
    ],
)
def test_a_directory_of_another_program_or_kind_is_never_replaced(
    description: str | None, words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights of others")
    if description is not None:
        (tmp_path / "config.json").write_text(description)
    with pytest.raises(ValueError, match=f"is not replaced: its config.json {words}"):
        save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights of others"


def test_metadata_that_is_not_json_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save(tmp_path / "m")
    with pytest.raises(ValueError, match="must be JSON values"):
        save(tmp_path / "m", metadata={"path": tmp_path})
    load_directory(tmp_path / "m", "dvae", Config)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_missing_directory_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no dvae in .*/m: expected config.json and model.safetensors, but there is no"
    ):
        load_directory(tmp_path / "m", "dvae", Config)
    save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"but model.safetensors is missing; train one with `dalle-train dvae`,"
    ):
        load_directory(tmp_path / "m", "dvae", Config)
    with pytest.raises(FileNotFoundError, match="is a file, not a directory"):
        load_directory(tmp_path / "m" / "config.json", "dvae", Config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "clip"}, "holds a clip, not a dvae"),
        ({"format": 2}, "has format 2, but this version reads 1"),
        ({"surprise": 1}, "has unknown surprise"),
        ({"config": {"width": 4}}, "lacks kinds"),
        ({"config": {"width": 4, "kinds": [], "depth": 1}}, "has unknown depth"),
        ({"config": {"width": 0, "kinds": []}}, r"is not valid: width \(0\) must be positive"),
        ({"config": {"width": "x", "kinds": []}}, "is not valid: width is 'x', of type str; expected a whole number"),
        ({"config": {"width": 4.0, "kinds": []}}, "is not valid: width is 4.0, of type float"),
        ({"config": {"width": 1 << 40, "kinds": []}}, "is not valid: width is above 16,777,216"),
        ({"config": {"width": 4, "kinds": [], "n_layers": 3}}, r"n_layers 3, but model\.safetensors has 2 weights"),
        ({"config": {"width": 4, "kinds": [], "wide": True}}, "wide is True, of type bool; expected a whole number"),
        ({"config": {"width": 4, "kinds": [], "mean": ["a"]}}, "mean is 'a', of type str; expected a number"),
        ({"config": [4]}, "must be JSON objects"),
        ({"weights_sha256": "0" * 64}, "is damaged: its sha256 is"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_words(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    save(tmp_path / "m")
    edit(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=message):
        load_directory(tmp_path / "m", "dvae", Config)


def test_invalid_json_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m")
    for text in ("{", "[]", "\x00", "[" * 100_000):
        (tmp_path / "m" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json (is not valid JSON|does not describe a model)"):
            load_directory(tmp_path / "m", "dvae", Config)


def test_truncated_and_corrupted_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"\x07", b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load_directory(tmp_path / "m", "dvae", Config)
    edit(tmp_path / "m", weights_sha256=directory._sha256(weights))
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_directory(tmp_path / "m", "dvae", Config)


def test_weights_that_are_whole_numbers_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", state={"weight": torch.arange(12)})
    with pytest.raises(ValueError, match=r"holds torch\.int64 in 'weight', expected floating-point weights"):
        load_directory(tmp_path / "m", "dvae", Config)


def test_the_hash_names_kind_config_and_weights_but_not_metadata(tmp_path: Path) -> None:
    variants = {
        "a": {},
        "metadata": {"metadata": {"step": 1}},
        "kind": {"kind": "clip"},
        "config": {"config": Config(width=5)},
        "weights": {"state": {"weight": torch.zeros(3, 4)}},
    }
    hashes = {}
    for name, changes in variants.items():
        save(tmp_path / name, **changes)
        hashes[name] = directory_hash(tmp_path / name)
    assert len(hashes["a"]) == 16
    assert int(hashes["a"], 16) >= 0
    assert hashes["metadata"] == hashes["a"]
    assert len({hashes["a"], hashes["kind"], hashes["config"], hashes["weights"]}) == 4


def test_weights_that_do_not_fit_a_module_are_named() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 3)
    good = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="weights in m do not fit its configuration: bias is missing"):
        load_weights(module, {"weight": good["weight"]}, "m")
    with pytest.raises(ValueError, match="gain is unexpected"):
        load_weights(module, good | {"gain": torch.ones(1)}, "m")
    with pytest.raises(ValueError, match=r"bias has the shape \(4,\) instead of \(3,\)"):
        load_weights(module, good | {"bias": torch.zeros(4)}, "m")
    load_weights(module, good, "m")
    assert torch.equal(module(torch.ones(1, 4)), torch.full((1, 3), 4.0))
    assert module.weight.requires_grad


def test_weights_can_be_read_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save(tmp_path / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {0o644}
