"""A GPU that is not there: tensors on `cuda` have shapes, types and a device, and no contents; what waits is counted.

Tensors on the CPU are real, those on the GPU are torch's fake ones. What the host reads from the GPU is 1 everywhere,
and is counted as a wait, with the function of the product that reads it. So code for a GPU runs on any machine, as fast
as its host part, and shows mixed devices, wrong types, and every place where it would wait for the GPU.

Works with the CPU build of torch, given a C++ compiler, and with the CUDA build, on machines without a GPU.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import dvae.compilation

ROOT = Path(__file__).parents[2]
NAME, CAPABILITY, MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 80 << 30
STAGED_BYTES = 64 << 10
"""Ordinary memory that a driver copies at once when it is asked not to wait; more goes piece by piece, after all work
that is queued."""

CAN_PRETEND = sys.platform == "linux" and shutil.which("g++") is not None
"""Whether driver.cpp can be compiled here."""

aten = torch.ops.aten
MAX_COPIED, COPIED = 64, "_copied_from"
"""Of so few whole numbers that are copied to the GPU the host reads the same again; nothing changes them in place."""
_OF_UNKNOWN_SIZE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose result has a size that only the device knows."""
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class _FakeMode(FakeTensorMode):
    avoid_device_init = property(lambda self: True)  # type: ignore[assignment]  # whatever torch.cuda says below


@lru_cache(maxsize=1)
def _fake_mode() -> _FakeMode:
    """Return the one of this process: the product keeps masks for all models, and two modes do not mix."""
    return _FakeMode(allow_non_fake_inputs=True)


class Phantom(TorchDispatchMode):
    """The GPU. Enter it by `phantom_gpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = _fake_mode()
        self.waits: Counter[str] = Counter()
        """What the host waited for, as `what at module:function`."""
        self.collectives: Counter[str] = Counter()
        """Calls of torch.distributed with tensors of the GPU."""
        self.is_recording = False
        """Whether a CUDA graph is being recorded."""
        self.watch: Callable[..., object] = lambda *_: None
        """Called with every operation on tensors of the GPU."""
        self.reads: dict[str, float] = {}
        """What some places, as in `waits`, read instead of 1."""
        self._pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation: for real if all of it is on the CPU."""
        options = dict(kwargs or {})
        # in inference mode torch leaves it to a mode to take operations apart
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **options)
        tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        target = options.get("device")
        if func in (aten.is_pinned.default, aten._pin_memory.default):
            return self._pinning(func, tensors[0])
        if not any(map(is_on_gpu, tensors)) and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **options)
        self.watch(func, args)
        if "generator" in options:
            options["generator"] = None  # one of a GPU cannot be made, and draws nothing here
        if func is aten._local_scalar_dense.default:
            self.wait("read one value")
            return self.reads.get(_place(), read_from(tensors[0]).item())
        if func is aten.equal.default:
            self.wait("compare")
            return True
        if func is aten._to_copy.default:
            self._note_copy(tensors[0], target, bool(options.get("non_blocking")))
            if target is not None and torch.device(target).type == "cpu":
                return read_from(tensors[0], options.get("dtype"))
            if not is_on_gpu(tensors[0]) and tensors[0].numel() <= MAX_COPIED and not tensors[0].is_floating_point():
                with self.fake:
                    sent = func(*args, **options)
                setattr(sent, COPIED, tensors[0].clone())
                return sent
        if func is aten.copy_.default:
            to, source = args[0], args[1]
            self._note_copy(source, to.device, len(args) > 2 and bool(args[2]))
            if not is_on_gpu(to):
                return to.fill_(1)
        if func in _OF_UNKNOWN_SIZE and options.get("output_size") is None:
            self.wait(f"size of {func.name().removeprefix('aten::').split('.')[0]}")
            return self._of_unknown_size(func, args, options)
        if func in _INDEXING:
            self._note_indices(tensors[0], args[1])
            if func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
                return self._of_unknown_size(func, args, options)
        with self.fake:
            return func(*args, **options)

    def wait(self, what: str) -> None:
        """Count a wait of the host for the GPU, at the line of the product that is running."""
        if self.is_recording:
            raise RuntimeError(f"{what}: not allowed while a CUDA graph is recorded")
        self.waits[f"{what} at {_place()}"] += 1

    def _note_copy(self, source: Tensor, target: Any, non_blocking: bool) -> None:
        kind = source.device.type if target is None else torch.device(target).type
        if is_on_gpu(source) and kind == "cpu":
            if not non_blocking:
                self.wait("read")
        elif not is_on_gpu(source) and kind == "cuda":
            is_pinned = source.untyped_storage().data_ptr() in self._pinned
            if not non_blocking or (not is_pinned and source.nbytes > STAGED_BYTES):
                self.wait("copy to the GPU")

    def _note_indices(self, indexed: Tensor, indices: Sequence[Tensor | None]) -> None:
        for index in indices:
            if index is None or not is_on_gpu(indexed):
                continue
            if not is_on_gpu(index):
                self.wait("index by places on the CPU")
            elif index.dtype == torch.bool:
                self.wait("index by a mask")

    def _of_unknown_size(self, func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Return what an operation gives for ones in place of what only the device knows."""
        with torch._C._DisableTorchDispatch():
            real = func(*tree_map(lambda x: read_from(x) if isinstance(x, Tensor) else x, args), **options)
        with self.fake:
            return tree_map(lambda x: aten._to_copy(x, device="cuda") if isinstance(x, Tensor) else x, real)

    def _pinning(self, func: Any, tensor: Tensor) -> Any:
        if func is aten.is_pinned.default:
            return tensor.untyped_storage().data_ptr() in self._pinned
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned  # kept: its address stays its own
        return pinned


def is_on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is one of the phantom's."""
    return isinstance(tensor, FakeTensor) and tensor.device.type == "cuda"


def read_from(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return what the host reads from a tensor of the GPU: what it was copied from, or else ones.

    Of bytes, in which DeepSpeed keeps whether a gradient overflowed, it reads zeros; of a row of numbers of samples or
    candidates, 0, 1, 2 and so on.
    """
    shape, dtype = tuple(tensor.shape), dtype or tensor.dtype
    with torch._C._DisableTorchDispatch():
        if (copied := getattr(tensor, COPIED, None)) is not None:
            return copied.to(dtype, copy=True)
        if tensor.dtype == torch.int64 and len(shape) == 1:
            return torch.arange(shape[0], dtype=dtype, device="cpu")
        return torch.full(shape, int(tensor.dtype != torch.uint8), dtype=dtype, device="cpu")


def _place() -> str:
    """Return the innermost function of the product that is running, or of DeepSpeed."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            parts = path.relative_to(ROOT)
            if parts.parts[0] in ("dalle", "dvae", "rerank", "storage", "training", "unclip"):
                return f"{parts.with_suffix('').as_posix()}:{frame.f_code.co_name}"
        if "deepspeed" in path.parts:
            return f"deepspeed {path.stem}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "a check"


# ------------------------------------------------------------------------------------------ what surrounds tensors


class _Attention(TorchFunctionMode):
    """Computes fused attention by its formula: which kernel suits is asked of a driver that is not there."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "cuda":
            mask = options.get("attn_mask")
            if mask is not None and mask.device != args[0].device:
                raise RuntimeError(f"attn_mask is on {mask.device}, the queries are on {args[0].device}")
            if len({x.dtype for x in args[:3]}) > 1:
                raise RuntimeError(f"query, key and value are {', '.join(str(x.dtype) for x in args[:3])}")
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else args[0].dtype
            with torch.autocast("cuda", enabled=False):
                given = [x.to(dtype) for x in args]
                return aten._scaled_dot_product_attention_math(*given, **options)[0]
        return func(*args, **options)


def _stream(phantom: Phantom) -> mock.MagicMock:
    """Return a stream, an event or a graph: everything is done at once, and waiting for it is counted."""
    done = mock.MagicMock()
    done.synchronize.side_effect = lambda *_: phantom.wait("synchronize")
    return done


def _replacements(phantom: Phantom) -> dict[str, Any]:
    """Return the attributes of torch.cuda that would ask a driver."""

    @contextlib.contextmanager
    def nothing(*_: object, **__: object) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def recording(_graph: object, **_: object) -> Iterator[None]:
        phantom.wait("record a CUDA graph")
        phantom.is_recording = True
        try:
            yield
        finally:
            phantom.is_recording = False

    stream = _stream(phantom)
    made = type("Stream", (), {"__new__": lambda *_, **__: _stream(phantom)})  # a class, as annotations want one
    properties = SimpleNamespace(
        name=NAME,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=MEMORY,
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448,
    )
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": nothing,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        **dict.fromkeys(
            ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), lambda *_: 0
        ),
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"), lambda *_: None),
        "synchronize": lambda *_: phantom.wait("synchronize"),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        **dict.fromkeys(("Stream", "Event", "CUDAGraph"), made),
        "stream": nothing,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "graph": recording,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: phantom.is_recording,
    }


def _collective(phantom: Phantom, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(is_on_gpu(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
            return original(*args, **kwargs)
        phantom.collectives[name] += 1
        done = SimpleNamespace(wait=lambda *_: None, is_completed=lambda: True)
        return done if kwargs.get("async_op") else None

    return call


COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


@contextlib.contextmanager
def pretended_driver(phantom: Phantom) -> Iterator[None]:
    """Let torch.cuda and torch.distributed answer as if there were a GPU."""
    original = torch.Generator

    class AnyGenerator(original):  # type: ignore[misc, valid-type]
        def __new__(cls, _device: Any = "cpu") -> Any:
            return original("cpu")

    with contextlib.ExitStack() as stack:
        _driver().pretend()
        stack.callback(_driver().stop)
        for name, value in _replacements(phantom).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in ("range_push", "range_pop"):  # marks for a profiler
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name))
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, _collective(phantom, name, getattr(dist, name))))
        stack.enter_context(mock.patch.object(torch, "Generator", AnyGenerator))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda self: self.cpu().tolist()))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
        stack.enter_context(mock.patch.object(FakeTensor, "record_stream", create=True))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _take_data))
        stack.enter_context(mock.patch.object(dvae.compilation, "_can_compile", return_value=False))
        yield


@contextlib.contextmanager
def phantom_gpu() -> Iterator[Phantom]:
    """Run what is within with a GPU that is not there; torch.cuda says that there is one."""
    phantom = Phantom()
    lifted_before = torch._C._only_lift_cpu_tensors()
    with pretended_driver(phantom), torch.autograd.set_multithreading_enabled(False), phantom, _Attention():
        torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(…, device="cuda")` is seen as a copy
        try:
            yield phantom
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted_before)


def _take_data(parameter: Tensor, other: Tensor) -> None:
    """Give a parameter the data of another tensor, as `nn.Module.to` does with tensors that are not fake."""
    parameter.data = other


def _address(tensor: Tensor) -> int:
    """Return a number that is another one for memory of other tensors."""
    return int(tensor.untyped_storage()._cdata) + int(tensor.storage_offset()) * tensor.element_size()


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    """Return driver.cpp, compiled for this torch once."""
    home, source = Path(torch.__file__).parent, Path(__file__).parent / "driver.cpp"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    library = Path(__file__).parent / "__pycache__" / f"driver-{torch.__version__}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source), f"-L{home / 'lib'}"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", str(made)], check=True)
        made.replace(library)
    return ctypes.CDLL(str(library))
