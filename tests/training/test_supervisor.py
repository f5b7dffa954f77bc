"""`--auto-restart`: the supervisor of a rank, and what the supervisors of a job agree on."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from support.waiting import PATIENCE_S, wait_for

import training.ranks.supervisor
from training.ranks.environment import ATTEMPT, PIPE
from training.ranks.supervisor import _Agreement, _ChildEnd, _Supervisor, _without_start

sys.path.append(str(Path(__file__).parents[1] / "faults"))

import jobs

CHILD = f"""
import os, signal, sys, time
attempt, rank = int(os.environ[{ATTEMPT!r}]), os.environ.get("RANK", "0")
def tell(word):
    os.write(int(os.environ[{PIPE!r}]), word.encode() + b"\\n")
def note(folder):
    with open(os.path.join(folder, "rank" + rank), "a") as file:
        file.write(str(attempt) + " ")
"""


def supervised(code: str, restarts: int) -> int:
    return _Supervisor([sys.executable, "-S", "-c", CHILD + code], restarts).run()


@pytest.mark.parametrize(
    "option",
    [
        ["--fresh"],
        ["--resume-from", "step00000002"],
        ["--resume-from=step00000002"],
        ["--resume_from", "step00000002"],
        ["--resume_from=step00000002"],
    ],
)
def test_a_restart_resumes_although_the_first_attempt_started_anew(tmp_path: Path, option: list[str]) -> None:
    calls = tmp_path / "calls"
    code = f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10)); tell('started'); sys.exit(1)"
    program = [sys.executable, "-S", "-c", CHILD + code]
    arguments = ["clip", *option, "--steps", "4"]
    assert _Supervisor([*program, *arguments], 1, [*program, *_without_start(arguments)]).run() == 1
    assert calls.read_text().splitlines() == [" ".join(arguments), "clip --steps 4"]


@pytest.mark.parametrize(
    ("code", "restarts", "expected"),
    [
        ("os.kill(os.getpid(), 9) if attempt < 2 else sys.exit(0)", 3, (0, 2)),
        ("os.kill(os.getpid(), 9)", 2, (-9, 2)),
        ("sys.exit(1)", 2, (1, 0)),
        ("tell('started'); sys.exit(1)", 2, (1, 2)),
        ("tell('lost'); sys.exit(1)", 1, (1, 1)),
        ("tell('started'); tell('final'); sys.exit(1)", 2, (1, 0)),
        ("tell('started'); sys.exit(0)", 2, (0, 0)),
    ],
)
def test_only_errors_that_may_not_recur_are_restarted_up_to_a_limit(
    code: str,
    restarts: int,
    expected: tuple[int, int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training.ranks.supervisor, "VERDICT_S", 0.1)
    assert supervised(code, restarts) == expected[0]
    assert capfd.readouterr().err.count(": restart ") == expected[1]


def test_a_signal_to_the_supervisor_stops_the_child_without_a_restart(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "signal.signal(15, lambda *_: sys.exit(0)); tell('started'); print('ready', flush=True); time.sleep(60)"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert supervised(code, 3) == 0
    assert "restart" not in capfd.readouterr().err


def test_an_error_that_would_recur_is_heard_before_the_child_ends() -> None:
    supervisor, heard = _Supervisor([], 2), []
    code = "tell('started'); tell('final'); time.sleep(60)"
    supervisor._command = [sys.executable, "-S", "-c", CHILD + code]
    agreement = _Agreement(0)
    ends = threading.Thread(target=lambda: heard.append(supervisor._run_child(0, agreement)))
    ends.start()
    wait_for(agreement.is_over)
    assert not heard
    assert supervisor._child is not None
    supervisor._child.kill()
    ends.join(PATIENCE_S)
    assert heard[0].told == {"started", "final"}


def test_a_rank_that_lost_another_waits_for_the_other_one_s_error() -> None:
    supervisor, agreement = _Supervisor([], 2), _Agreement(0)
    threading.Timer(0.5, agreement.give_up).start()
    assert supervisor._next_attempt(0, _ChildEnd(code=1, told=frozenset({"lost"})), agreement) is None
    assert agreement.attempt() == 0, "no attempt was begun"


def test_the_first_rank_to_ask_decides_for_all_whether_to_resume() -> None:
    agreement = _Agreement(1)
    assert not agreement.resumes(1)
    agreement.note_first_step()
    assert not agreement.resumes(1), "as for whoever asked before"
    assert agreement.resumes(2)


def _supervise_rank(rank: int, port: int, code: str, codes: "multiprocessing.Queue[tuple[int, int]]") -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    codes.put((rank, supervised(code, 5)))


@pytest.mark.slow
def test_ranks_meet_in_one_attempt_although_one_of_them_fails_twice(tmp_path: Path) -> None:
    code = f"note({str(tmp_path)!r})\n"
    code += "if rank == '1' and attempt < 2: os.kill(os.getpid(), 9)\n"
    code += "if rank == '0' and attempt < 2: time.sleep(3); tell('lost'); sys.exit(1)\n"
    context = multiprocessing.get_context("forkserver")
    codes = context.Queue()
    port = jobs.free_port()
    ranks = [context.Process(target=_supervise_rank, args=(rank, port, code, codes)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        assert dict(codes.get(timeout=120) for _ in ranks) == {0: 0, 1: 0}
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    assert (tmp_path / "rank0").read_text().split() == ["0", "2"]
    assert (tmp_path / "rank1").read_text().split() == ["0", "1", "2"]
