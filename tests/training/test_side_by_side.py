"""Stages as child processes: overlap, failure, interruption, a parent that is gone, and the time left in all."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.waiting import wait_for

import training.ranks.side_by_side
from training.ranks.environment import PARENT
from training.ranks.processes import launchers
from training.ranks.side_by_side import Job, TimeLeft, run_jobs
from training.ranks.stop import Interrupted

FAKE = """
import os, signal, sys, time
name, do, folder = sys.argv[1:4]
def stop(*_):
    print(f"stopped at step 1 of 2, saved in {name}", file=sys.stderr)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
mine = f"{folder}/{name}{os.environ.get('RANK', '')}"
with open(mine + ".part", "w") as file:
    file.write(str(os.getpid()))
os.rename(mine + ".part", mine)
def say(line):
    os.write(1, f"{line}\\n".encode())  # at once: print, unbuffered, can be stopped before the end of its line
say(f"{name} 1/2  loss 0.5")
say("warning: something")
def wait(what):
    while not os.path.exists(f"{folder}/{what}"):
        time.sleep(0.02)
if do.startswith("wait-for-"):
    wait(do.removeprefix("wait-for-"))
elif do == "fail":
    wait("clip")
    print("error: the disk is full", file=sys.stderr)
    sys.exit(1)
elif do == "be-killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif do == "be-restarted":
    print("error: a rank is lost", "supervisor: restart 1 of 3", sep="\\n")
elif do == "talk":
    while True:
        say("something")
        time.sleep(0.005)
elif do == "say":
    print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"])
else:
    time.sleep(60)
"""
"""Stands for `dalle-train NAME`: does what its second argument says."""


@pytest.fixture(autouse=True)
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(training.ranks.side_by_side, "PROGRAM", (sys.executable, "-S", str(tmp_path / "fake.py")))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, said: list[str]) -> Iterator[Callable[..., None]]:
    """Runs fake stages; afterwards, none of their processes may be left."""

    def run_stages(ranks: int = 1, **stages: str) -> None:
        jobs = [Job(stage=n, arguments=(n, do, str(tmp_path)), ranks=ranks, threads=3) for n, do in stages.items()]
        run_jobs(jobs, TimeLeft([[{name: 10.0} for name in stages]]), said.append)

    yield run_stages
    pids = [int(path.read_text()) for path in tmp_path.iterdir() if not path.suffix]
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_stages_side_by_side_run_at_the_same_time(run: Callable[..., None], said: list[str]) -> None:
    run(dvae="wait-for-clip", clip="wait-for-dvae")  # one after the other would wait for ever
    assert sorted(said) == [
        "clip 1/2  loss 0.5",
        "clip: warning: something",
        "dvae 1/2  loss 0.5",
        "dvae: warning: something",
    ]


def test_the_ranks_of_a_stage_are_told_who_they_are(run: Callable[..., None], said: list[str]) -> None:
    run(ranks=2, clip="say")
    assert {"clip: 0 2 3", "clip rank 1: 1 2 3"} <= set(said)


def test_a_stage_that_fails_stops_the_others_and_its_error_is_that_of_all(
    run: Callable[..., None], said: list[str]
) -> None:
    with pytest.raises(OSError, match=r"^dvae: the disk is full$"):
        run(dvae="fail", clip="sleep")
    assert "clip: stopped at step 1 of 2, saved in clip" in said
    assert not any("error" in line for line in said)


def test_an_error_that_a_supervisor_restarts_after_is_no_failure(run: Callable[..., None], said: list[str]) -> None:
    run(dvae="be-restarted")
    assert said[-1] == "dvae: supervisor: restart 1 of 3 (dvae: a rank is lost)"


def test_a_stage_that_is_killed_is_named_with_the_signal(run: Callable[..., None]) -> None:
    with pytest.raises(OSError, match="dvae: its process was ended by SIGKILL"):
        run(dvae="be-killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_all_save(
    tmp_path: Path, run: Callable[..., None], said: list[str], number: int
) -> None:
    def interrupt() -> None:
        wait_for(lambda: len(said) == 4)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="the same command"):
        run(dvae="sleep", clip="sleep")
    assert sum("stopped at step 1" in line for line in said) == 2


def test_a_signal_reaches_children_that_never_stop_talking(run: Callable[..., None], said: list[str]) -> None:
    def interrupt() -> None:
        wait_for(lambda: len(said) > 50)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted):
        run(dvae="talk", clip="talk")
    assert sum("stopped at step 1" in line for line in said) == 2


def test_a_child_that_is_stopped_alone_stops_all(tmp_path: Path, run: Callable[..., None], said: list[str]) -> None:
    def interrupt() -> None:
        wait_for(lambda: len(said) == 4)
        os.kill(int((tmp_path / "clip").read_text()), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted):
        run(dvae="sleep", clip="sleep")
    assert sum("stopped at step 1" in line for line in said) == 2


def test_a_second_interrupt_ends_at_once(tmp_path: Path, run: Callable[..., None], said: list[str]) -> None:
    stubborn = FAKE.replace("    sys.exit(0)", "    return")
    (tmp_path / "fake.py").write_text(stubborn)

    def interrupt() -> None:
        wait_for(lambda: len(said) == 2)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: len(said) == 3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(clip="sleep")


def test_a_parent_of_several_stages_is_a_launcher_even_if_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert launchers(os.getpid())[-1].pid == os.getppid()
    assert not any(process.is_gone() for process in launchers(os.getpid()))
    monkeypatch.setenv(PARENT, str(2**22 + 1))  # above the largest number of a process
    assert [process.is_gone() for process in launchers(os.getpid())] == [True]


@pytest.mark.slow
def test_no_child_is_left_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from training.ranks.side_by_side import Job, TimeLeft, run_jobs\n"
        "import training.ranks.side_by_side, sys\n"
        "child = 'from training.ranks.watch import Watch; import os, time; watch = Watch(); watch.start(); '\n"
        "child += 'print(os.getpid(), flush=True); time.sleep(99)'\n"
        "training.ranks.side_by_side.PROGRAM = (sys.executable, '-c', child)\n"
        "jobs = [Job(stage=name, arguments=()) for name in ('dvae', 'clip')]\n"
        "run_jobs(jobs, TimeLeft([]), lambda line: print(line, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [Path("/proc", parent.stdout.readline().split()[-1]) for _ in range(2)]
    assert all(child.exists() for child in children)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not any(child.exists() and " Z " not in (child / "stat").read_text() for child in children))


def test_the_time_left_follows_the_plan_and_the_measured_speed() -> None:
    now = 0.0
    phases = [[{"dvae-warmup": 100.0, "dvae": 20.0}, {"clip": 60.0}], [{"transformer": 200.0}]]
    left = TimeLeft(phases, now=lambda: now)
    assert left.left_s() == 320
    left.begin("dvae")
    left.begin("clip")
    now = 10.0
    assert left.left_s() == 310
    left.hear("dvae-warmup: resuming from step 0 of 100")
    now = 20.0  # 10% in 10 s, as planned
    left.hear("dvae-warmup 10/100  loss 1.0  10 s left")
    assert left.left_s() == pytest.approx(90 + 20 + 200)
    now = 40.0  # then at half of the speed: 20% in 30 s, which is the speed of all that is to come, too
    left.hear("dvae-warmup 20/100  loss 1.0  10 s left")
    assert left.left_s() == pytest.approx(0.8 * 150 + 1.5 * (20 + 200))
    left.end("dvae")
    left.hear("clip 50/100  loss 1.0")
    left.hear("clip 50/100  validation: loss 1.0")
    left.end("clip")
    left.hear("something else")
    now = 45.0
    left.begin("transformer")
    left.hear("transformer: resuming from step 50 of 100")
    now = 95.0
    left.hear("transformer 75/100  loss 1.0")
    assert left.left_s() == pytest.approx(50)
    left.end("transformer")
    assert left.left_s() == 0
    assert str(left) == "about 0 s left in all, 1:35 so far"


def test_a_part_that_went_on_counts_for_what_it_did_not_for_all_of_it() -> None:
    now = 0.0
    left = TimeLeft([[{"clip": 100.0}], [{"transformer": 200.0}]], now=lambda: now)
    left.begin("clip")
    left.hear("clip: resuming from step 50 of 100")
    now = 50.0  # the other half, as planned
    left.end("clip")
    assert left.left_s() == pytest.approx(200)
