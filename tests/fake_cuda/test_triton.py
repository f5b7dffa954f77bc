"""What a GPU compiles is compiled for one that is not there: to Triton, and from Triton to the machine code of an H100.

Needs the packages of a CUDA build of torch: `make fake-cuda`.
"""

import importlib
import importlib.util
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from phantom import Phantom, pretended_driver
from torch import Tensor

import dvae.compilation
from dalle.model import DALLE, DALLEConfig
from dalle.sparse_attention import block_mask_attention, prepare_compilation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: make fake-cuda"),
]
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


@pytest.fixture
def phantom() -> Iterator[Phantom]:
    for name in ("compile_fx", "graph", "kernel.flex.flex_attention", "runtime.triton_heuristics", "async_compile"):
        importlib.import_module(f"torch._inductor.{name}")  # now: parts of torch are replaced below
    found = Phantom()
    with pretended_driver(found):
        yield found


@contextmanager
def generated(sources: list[str]) -> Iterator[None]:
    """Collect the code that torch generates; what was compiled then computes shapes alone."""
    from torch._inductor.graph import GraphLowering

    def module_of(graph: GraphLowering) -> Any:
        sources.append(graph.codegen()[0].value)
        outputs_of = graph.orig_gm

        def call(given: list[Any]) -> list[Any]:
            found = outputs_of(*given)
            given.clear()
            return list(found)

        return types.SimpleNamespace(call=call, __file__="")

    with mock.patch.object(GraphLowering, "compile_to_module", module_of):
        torch._dynamo.reset()
        yield


def machine_code(name: str, source: str, folder: Path) -> list[bytes]:
    """Compile a kernel's source as torch does; returns the machine code of each of its configurations."""
    path = folder / f"{name}.py"
    path.write_text(source)
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), module.__dict__)
    kernel = getattr(module, name)
    return [kernel._precompile_config(config).kernel.asm["cubin"] for config in kernel.configs]


def compiled(function: Callable[..., Tensor], given: list[Tensor], folder: Path, phantom: Phantom) -> set[str]:
    """Compile a function and its backward pass; returns the names of the kernels that became machine code."""
    sources: list[str] = []
    with phantom.fake, torch.autograd.set_multithreading_enabled(False), generated(sources):
        function(*given).sum().backward()
    kernels = dict(found for code in sources for found in KERNEL.findall(code))
    for name, source in kernels.items():
        assert all(machine_code(name, source, folder))
    assert len(sources) >= 2, "forward and backward"
    return set(kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_flex_attention_at_the_papers_size_becomes_kernels_of_a_gpu(
    kind: str, dtype: torch.dtype, phantom: Phantom, tmp_path: Path
) -> None:
    with phantom.fake:
        given = [torch.empty(2, 4, 1280, 64, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3)]
        attend = partial(block_mask_attention, kind=kind, text_len=256, grid=32, kernel=11)
    names = compiled(attend, given, tmp_path, phantom)
    assert any("flex_attention" in name and "backward" not in name for name in names)
    assert any("flex_attention_backward" in name for name in names)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_compiled_layers_become_kernels_of_a_gpu(precision: str, phantom: Phantom, tmp_path: Path) -> None:
    sizes = DALLEConfig(n_layers=3, d_model=128, n_heads=2, text_len=64, grid=16, text_vocab=64, image_vocab=64)
    with phantom.fake, mock.patch.object(dvae.compilation, "_can_compile", return_value=True):
        model = DALLE(sizes).to("cuda", torch.bfloat16 if precision == "bfloat16" else torch.float32)
        prepare_compilation(sizes.kinds, sizes.text_len, sizes.grid, sizes.conv_kernel, model.device)
        h_BSD = torch.empty(2, sizes.stream.length, 128, dtype=model.dtype, device="cuda", requires_grad=True)
        for block in model.blocks:
            block.compile(dynamic=False)

    def layers(h_BSD: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "autocast"):
            for block, kind in zip(model.blocks, sizes.kinds, strict=True):
                h_BSD = block(h_BSD, model._attend(kind))
            return h_BSD

    names = compiled(layers, [h_BSD], tmp_path, phantom)
    assert any("flex_attention_backward" in name for name in names)
    assert any("layer_norm" in name for name in names)
