from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.models.directory import write_tensors

TYPES = [torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16]
TYPES += [torch.int16, torch.int8, torch.uint8, torch.bool]


def tensors() -> dict[str, Tensor]:
    mixed = {f"weight of {dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES}
    return mixed | {"ä scalar": torch.tensor(1.5), "none": torch.empty(0, 4), "b": torch.ones(3), "a": torch.ones(1)}


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs")
    write_tensors(tmp_path / "ours", tensors())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_and_tied_tensors_are_written_out(tmp_path: Path) -> None:
    buffer = torch.arange(12.0).reshape(3, 4)
    given = {"rows": buffer[1:], "columns": buffer.t(), "every": buffer[:, ::2], "again": buffer[1:]}
    write_tensors(tmp_path / "file", given)
    for name, tensor in load_file(tmp_path / "file").items():
        assert torch.equal(tensor, given[name])


class Dear(Mapping[str, Tensor]):
    """Tensors that are counted when they are looked up."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held, self.read = held, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def test_each_tensor_is_looked_up_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    dear = Dear({"b": torch.ones(2), "a": torch.zeros(3)})
    write_tensors(tmp_path / "file", dear, {name: tensor.to("meta") for name, tensor in dear.held.items()})
    assert dear.read == ["a", "b"]
    assert torch.equal(load_file(tmp_path / "file")["b"], torch.ones(2))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "missing or unexpected: b"),
        ({"a": torch.zeros(3)}, r"a is torch.float32 \(2,\) instead of torch.float32 \(3,\)"),
        ({"a": torch.zeros(2, dtype=torch.float16)}, "instead of torch.float16"),
    ],
)
def test_what_is_not_as_announced_is_refused(tmp_path: Path, like: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2)}, like)
