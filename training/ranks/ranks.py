"""The ranks of a run: join the process group that a launcher describes, and agree on values.

One process without a launcher is a group of one.
"""

import hashlib
import json
import os
import sys
import time
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
from training.ranks.environment import ATTEMPT, first_rank_holds_store, has_agent_store
from training.ranks.processes import Member, this_member
from training.ranks.watch import FIRST_STEP_FACTOR, TIMEOUT_S, Watch

Value = TypeVar("Value")

POLL_S = 0.1
JOIN_S = 600.0
"""Seconds to wait for the other ranks to join."""
MAX_WAIT = timedelta(days=20)
"""Timeout of collectives: long, because the first rank may work alone for days; under 2³¹ ms."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a run, as one of them sees them."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of ranks."""
    device: torch.device
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    """The watch of this rank while it trains; it knows all ranks once `join` has joined them."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


def join(timeout_s: float = TIMEOUT_S) -> Ranks:
    """Join the process group that a launcher (`deepspeed`, `torchrun`) describes, or make one of a single process.

    A second call in the same process returns the same group.

    Args:
        timeout_s: seconds without progress in a run after which the watch ends it.

    Raises:
        OSError: other ranks have not joined within `JOIN_S`.
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
    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), device=device, watch=watch)


def job_store(place: str, *, host: bool) -> Store:
    """Return a part of the store that all ranks of the job see, at the address that the launcher gives.

    Args:
        place: name of the part.
        host: whether this process holds the store, unless the launcher does.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=host and not has_agent_store(),
        timeout=timedelta(seconds=JOIN_S),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(place, store)


def _meet(backend: str, timeout_s: float) -> Watch:
    """Join the process group of all ranks; return the watch over them, started."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place, host = f"ranks/{os.environ.get(ATTEMPT, '0')}", rank == 0 and first_rank_holds_store()
    store = job_store(place, host=host)
    members, turn = _introduce(store, rank, size)
    # every start has a part of the store of its own: in that of an earlier one gloo would find dead processes
    for_watch = PrefixStore("watch", PrefixStore(turn, job_store(place, host=False)))
    watch = Watch(members, rank, for_watch, timeout_s)
    watch.start()
    # Collectives need no timeout: a rank that is gone breaks the connection, and the watch ends a run that hangs.
    # Outside runs, the first rank may work alone for as long as it takes, such as to train the tokenizer.
    group_timeout = max(MAX_WAIT, timedelta(seconds=2 * FIRST_STEP_FACTOR * timeout_s))
    set_group_timeout(group_timeout)
    own = PrefixStore(turn, store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=group_timeout)
    return watch


def _introduce(store: Store, rank: int, size: int) -> tuple[list[Member], str]:
    """Exchange the processes of all ranks; return all ranks in order, and the name of this start of theirs.

    A launcher's store outlives the ranks that it starts again, and launchers of several hosts may count restarts
    differently. So the first rank begins a turn, the others enter the newest, and the first rank names those that it
    met there: a rank that it did not name had read the number of an earlier turn.
    """
    me, deadline = this_member(rank).to_json(), time.monotonic() + JOIN_S
    if rank == 0:
        turn = store.add("turn", 1)
        store.set(f"{turn}/0", me)
        store.set(f"{turn}/all", json.dumps([_heard(store, f"{turn}/{other}", other, size) for other in range(size)]))
    entered = 0
    while True:
        turn = store.add("turn", 0)
        if rank and turn > entered:
            store.set(f"{turn}/{rank}", me)
            entered = turn
        if turn and store.check([f"{turn}/all"]):
            named = json.loads(store.get(f"{turn}/all"))
            if me in named:
                return [Member.from_json(text) for text in named], f"turn {turn}"
        if time.monotonic() > deadline:
            raise OSError(f"rank 0 of {size} has not joined within {JOIN_S:.0f} s")
        time.sleep(POLL_S)


def _heard(store: Store, key: str, rank: int, size: int) -> str:
    try:
        return bytes(store.get(key)).decode()
    except RuntimeError as error:
        raise OSError(f"rank {rank} of {size} has not joined within {JOIN_S:.0f} s ({error})") from None


def leave(*, after_error: bool = False) -> None:
    """Leave the process group; without it gloo aborts at interpreter exit.

    Args:
        after_error: do not wait for the other ranks, which may be gone.
    """
    if not dist.is_initialized() or (after_error and dist.get_backend() != "gloo"):
        return  # NCCL would wait for the work that is under way; the launcher ends the other ranks
    if not after_error:
        dist.barrier()
    # DeepSpeed, which is loaded only if an engine was built, has groups of its own: they would outlive torch's
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    if deepspeed_comm is not None and deepspeed_comm.is_initialized():
        deepspeed_comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def agree(flag: bool, ranks: Ranks) -> bool:
    """Return whether `flag` is true on any rank; the same on all. Collective."""
    if ranks.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=ranks.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def on_first_rank(action: Callable[[], object], ranks: Ranks) -> None:
    """Call a function on the first rank while the others wait. Collective.

    Raises:
        ValueError, OSError: the error of `action`; on the other ranks, an OSError that says that it failed.
    """
    error: Exception | None = None
    if ranks.is_first:
        try:
            action()
        except (ValueError, OSError) as caught:
            error = caught
    if agree(error is not None, ranks):
        raise error if error is not None else OSError("stopped, because the first rank failed: see its message")


def require_same(values: Mapping[str, object], ranks: Ranks) -> None:
    """Check that values are the same on all ranks, by their `repr`. Collective.

    Raises:
        ValueError: some are not; names them.
    """
    if ranks.size == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest()[:7] for value in values.values()]
    low = torch.tensor([int.from_bytes(digest, "big") for digest in digests], device=ranks.device)
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    different = [name for name, is_same in zip(values, (low == high).tolist(), strict=True) if not is_same]
    if different:
        raise ValueError(
            f"the ranks differ in {' and '.join(different)}: start all of them with the same command, and let all "
            "see the same files"
        )


def mean_over_ranks(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean of a float tensor over all ranks. Collective."""
    if ranks.size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / ranks.size


def max_over_ranks(value: float, ranks: Ranks) -> float:
    """Return the maximum of a value over all ranks. Collective."""
    if ranks.size == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def from_all_ranks(value: Value, ranks: Ranks) -> list[Value]:
    """Return the values of all ranks, in the order of the ranks. Collective."""
    if ranks.size == 1:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Value | None, ranks: Ranks) -> Value | None:
    """Return the first rank's value. Collective."""
    if ranks.size == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]
