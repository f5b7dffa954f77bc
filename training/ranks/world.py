"""The ranks of a run: joining the process group that a launcher describes, and agreeing on things.

One process without a launcher is a world of its own.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # as below

from training.patches import set_group_timeout
from training.ranks.watchdog import (
    ATTEMPT,
    FIRST_STEP_FACTOR,
    TIMEOUT_S,
    Member,
    Watch,
    first_rank_holds_store,
    this_process,
)

Value = TypeVar("Value")

JOIN_S = 600.0
"""What the other ranks have to come, after this one."""
LONGEST_WAIT = timedelta(days=20)
"""For ranks that have more to do than this one, such as the first one alone; in milliseconds, it fits in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of a process among the ranks."""

    rank: int
    size: int
    device: torch.device
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    """What this rank watches while it trains; of the ranks that `join_world` has joined, all are known to it."""

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0


def join_world(timeout_s: float = TIMEOUT_S) -> World:
    """Join the process group that a launcher (`deepspeed`, `torchrun`) describes, or make one of a single process.

    A second call in the same process returns the group that is there.

    Args:
        timeout_s: seconds without progress after which the watch, not yet the group, ends a run.

    Raises:
        OSError: the other ranks do not come.
    """
    # 0.19.8 calls torch.distributed functions that torch 2.13 has renamed; every rank would say so for each of them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    watch = Watch(timeout_s=timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if use_cuda else "gloo"
        if launched:
            watch = _meet(backend, timeout_s)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch does not say so to mypy
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves every rank a thread per core: on one machine they slow each other tenfold.
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        if n_local > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_local))
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device, watch=watch)


def job_store(place: str, *, host: bool) -> Store:
    """Return a store that all ranks of the job see, at the address that the launcher gives.

    Args:
        place: the part of it that is meant; after a restart by torchrun, another one of that name.
        host: whether this process holds it, unless torchrun's agent does.
    """
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=host and not has_agent,
        timeout=timedelta(seconds=JOIN_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"{place}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _meet(backend: str, timeout_s: float) -> Watch:
    """Join the process group of all ranks; returns the watch over them, which has begun.

    An attempt of a supervised job has a place of its own in the store: at that of the one before, the addresses of the
    dead would be read.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place, host = f"ranks/{os.environ.get(ATTEMPT, '0')}", rank == 0 and first_rank_holds_store()
    store = job_store(place, host=host)
    members = _introduce(store, rank, size)
    watch = Watch(members, rank, PrefixStore("watch", job_store(place, host=False)), timeout_s)
    watch.start()
    # A rank that is gone breaks the connection, and a run that hangs is for the watch, which leaves stacks. What is no
    # run, such as training the tokenizer on the first rank, may take as long as it likes.
    group_timeout = max(LONGEST_WAIT, timedelta(seconds=2 * FIRST_STEP_FACTOR * timeout_s))
    set_group_timeout(group_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=group_timeout)
    return watch


def _introduce(store: Store, rank: int, size: int) -> list[Member]:
    """Let all ranks know which processes they are; returns all of them, in order."""
    store.set(f"member/{rank}", this_process(rank).to_json())
    members = []
    for other in range(size):
        try:
            members.append(Member.from_json(store.get(f"member/{other}")))
        except RuntimeError as error:
            raise OSError(f"rank {other} of {size} did not come within {JOIN_S:.0f} s ({error})") from None
    return members


def leave_world(*, after_error: bool = False) -> None:
    """Leave the process group; without it gloo aborts at interpreter exit.

    Args:
        after_error: do not wait for the other ranks, which may never come.
    """
    if not dist.is_initialized() or (after_error and dist.get_backend() != "gloo"):
        return  # NCCL would wait for the work that is under way; the launcher ends the other ranks
    if not after_error:
        dist.barrier()
    dist.destroy_process_group()


def agree(flag: bool, world: World) -> bool:
    """Return whether any rank raised its flag; every rank gets the same answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def on_first_rank(action: Callable[[], object], world: World) -> None:
    """Do something on the first rank while the others wait; where it fails, it fails on all of them.

    Raises:
        ValueError, OSError: what `action` raises; on the other ranks, an OSError that says so.
    """
    error: Exception | None = None
    if world.is_first:
        try:
            action()
        except (ValueError, OSError) as caught:
            error = caught
    if agree(error is not None, world):
        raise error if error is not None else OSError("stopped, because the first rank failed: see its message")


def require_same(values: Mapping[str, object], world: World) -> None:
    """Check that all ranks were given the same, compared by its representation.

    Raises:
        ValueError: they were not; names what differs.
    """
    if world.size == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest()[:7] for value in values.values()]
    low = torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=world.device)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    different = [name for name, is_same in zip(values, (low == high).tolist(), strict=True) if not is_same]
    if different:
        raise ValueError(
            f"the ranks differ in {' and '.join(different)}: start all of them with the same command, and let all "
            "see the same files"
        )


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the mean of a float tensor over all ranks."""
    if world.size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world.size


def max_over_ranks(value: float, world: World) -> float:
    """Return the largest of all ranks' values. Collective."""
    if world.size == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def from_all_ranks(value: Value, world: World) -> list[Value]:
    """Return the values of all ranks, in the order of the ranks. Collective."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
