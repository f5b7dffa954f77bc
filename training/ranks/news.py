"""News between ranks, through the job's store: which rank is lost, that the job hangs, how far each rank is.

Reading and writing happen in a thread of their own, because the store's host may be the one that hangs. All ranks hear
within a second. Heartbeats go around between hosts: the rank before each host's first one listens to it.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but torch does not say so to mypy

from training.ranks.environment import first_rank_holds_store
from training.ranks.processes import Member

POLL_S = 0.5
"""Seconds between two looks at the other ranks."""
HEARTBEAT_S = 5.0
"""Seconds between two heartbeats of a rank."""
MAX_SILENCE_S = 60.0
"""Seconds without a heartbeat after which a rank on another host counts as lost."""
ANSWER_S = 3.0
"""Seconds for all ranks to tell their positions when the job hangs."""


@dataclass(frozen=True, kw_only=True)
class LostRank:
    """A rank that has ended before the others."""

    member: Member
    reason: str
    """Its error, or how it was noticed; empty if neither is known."""


@dataclass(frozen=True, kw_only=True, order=True)
class RankPosition:
    """How far a rank is; of two ranks, the smaller one is behind."""

    touches: int
    """Parts of the training loop that it has ended."""
    is_waiting: bool
    """Whether it waits for other ranks. The job hangs because of those that do not."""
    step: int = field(compare=False)
    """The last step that it has ended; -1 before the first."""


def ranks_behind(positions: Mapping[int, RankPosition], n_ranks: int) -> list[int]:
    """Return the ranks that hold the others up: those without an answer, otherwise those with the smallest position.

    Empty if all ranks stand at the same place.
    """
    silent = [rank for rank in range(n_ranks) if rank not in positions]
    if silent:
        return silent
    least = min(positions.values())
    found = [rank for rank, position in sorted(positions.items()) if position == least]
    return found if len(found) < n_ranks else []


class News:
    """Exchanges news with the other ranks, in its thread.

    Args:
        members: all ranks in order, two or more.
        rank: of this process.
        store: the job's, for news alone.
        position: tells how far this rank is.
        on_lost: called in the thread for every rank that is found or heard to be lost.
        is_hung: is set when any rank says that the job hangs; when it is set here, the others hear of it.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rank: int,
        store: Store,
        *,
        position: Callable[[], RankPosition],
        on_lost: Callable[[LostRank], None],
        is_hung: threading.Event,
    ) -> None:
        self._members, self._rank, self._store = members, rank, store
        self._position, self._on_lost, self._is_hung = position, on_lost, is_hung
        place, following = members[rank].place, members[(rank + 1) % len(members)]
        self._listened_to = following if following.place != place else None
        self._heartbeat, self._heard_at = "", time.monotonic()
        self._holder = members[0] if first_rank_holds_store() else None
        self._holder_here = self._holder.process if self._holder is not None and members[0].place == place else None
        self._lost: LostRank | None = None
        self._positions: dict[int, RankPosition] | None = None
        self._is_answered = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="news", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, unless the store holds it up."""
        self._stopped.set()
        self._thread.join(2 * POLL_S)

    def tell_lost(self, lost: LostRank) -> None:
        """Tell all ranks which one is lost, within `POLL_S`; the first call counts."""
        self._lost = self._lost or lost

    def positions(self, wait_s: float) -> dict[int, RankPosition] | None:
        """Return the positions of the ranks that answered, once the job hangs; None if the store does not answer."""
        self._is_answered.wait(wait_s)
        return self._positions

    def _run(self) -> None:
        has_told, beaten_at = False, 0.0
        try:
            while not self._stopped.wait(POLL_S):
                if self._holder_here is not None and self._holder_here.is_gone():
                    return  # torch would print a stack of C++ for a store that is gone
                if self._lost is not None and not has_told:
                    has_told = True
                    text = json.dumps({"rank": self._lost.member.rank, "reason": self._lost.reason})
                    self._store.compare_set("lost", "", text)
                self._read_lost()
                if time.monotonic() - beaten_at > HEARTBEAT_S:
                    beaten_at = time.monotonic()
                    self._store.set(f"heartbeat/{self._rank}", str(beaten_at))
                    self._listen()
                if self._is_hung.is_set() or self._store.check(["hung"]):
                    self._exchange_positions()
                    return
        except RuntimeError:  # the store is gone
            if not self._stopped.wait(2 * POLL_S) and self._holder is not None:
                self._on_lost(LostRank(member=self._holder, reason=""))

    def _read_lost(self) -> None:
        if self._store.check(["lost"]):
            lost = json.loads(self._store.get("lost"))
            self._on_lost(LostRank(member=self._members[lost["rank"]], reason=lost["reason"]))

    def _listen(self) -> None:
        """Count the next host's rank as lost if it has been silent for too long."""
        if self._listened_to is None:
            return
        key = f"heartbeat/{self._listened_to.rank}"
        heartbeat = str(self._store.get(key)) if self._store.check([key]) else ""
        if heartbeat != self._heartbeat:
            self._heartbeat, self._heard_at = heartbeat, time.monotonic()
        elif time.monotonic() - self._heard_at > MAX_SILENCE_S:
            self._on_lost(LostRank(member=self._listened_to, reason=f"not heard of for {MAX_SILENCE_S:.0f} s"))

    def _exchange_positions(self) -> None:
        """Tell all ranks that the job hangs, and read how far they are."""
        self._store.set("hung", "1")
        self._is_hung.set()
        self._store.set(f"position/{self._rank}", json.dumps(asdict(self._position())))
        time.sleep(ANSWER_S)
        self._positions = {
            rank: RankPosition(**json.loads(self._store.get(key)))
            for rank in range(len(self._members))
            if self._store.check([key := f"position/{rank}"])
        }
        self._is_answered.set()
