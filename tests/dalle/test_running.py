"""How `dalle` and `dalle-train` begin and end as programs of their own."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dalle.cli import start, terminal
from dalle.cli.command import BROKEN_PIPE_CODE, run_command, run_program

ROOT = Path(__file__).parents[2]


def run(*argv: str, **options) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([sys.executable, *argv], **options)


@pytest.mark.parametrize(
    "module", ["dalle", *(pytest.param(f"dalle.{name}", marks=pytest.mark.slow) for name in ("cli", "cli.main"))]
)
def test_the_package_runs_like_the_command(module):
    with run("-m", module, "generate", "a cube", "--bundle", "nowhere") as program:
        shown, errors = program.communicate(timeout=120)
    assert (program.returncode, shown) == (1, "")
    assert errors.startswith("error: no bundle at nowhere")


@pytest.mark.parametrize("module", ["training", "training.cli.main"])
def test_the_package_of_training_runs_like_the_command(module):
    with run("-m", module) as program:
        shown, errors = program.communicate(timeout=120)
    assert (program.returncode, shown) == (1, "")
    assert "usage: dalle-train COMMAND" in errors


@pytest.mark.parametrize("unbuffered", [pytest.param("", marks=pytest.mark.slow), "1"])
@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(("dalle", "--help"), marks=pytest.mark.slow),
        ("training", "--help"),
        pytest.param(("training", "plan"), marks=pytest.mark.slow),
        ("training",),
    ],
)
def test_a_reader_that_has_gone_is_no_error(argv, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    # of the last one, which prints on stderr, nobody reads that
    broken = {"stderr": writing} if len(argv) == 1 else {"stdout": writing}
    with run("-m", *argv, env=environment, **broken) as program:
        os.close(writing)
        shown, errors = program.communicate(timeout=120)
    assert program.returncode == BROKEN_PIPE_CODE == 128 + signal.SIGPIPE
    assert not shown
    assert not errors


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_on_a_full_disk_is_named(unbuffered):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with run("-m", "training", "plan", stdout=full, env=environment) as program:
            _, errors = program.communicate(timeout=120)
    assert program.returncode == 1
    assert errors.startswith("error: No space left on device")
    assert len(errors.splitlines()) == 1
    assert unbuffered or errors == "error: No space left on device: standard output\n"


def test_a_broken_pipe_of_something_else_is_an_error(capsys):
    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert run_command(fail) == 1
    assert capsys.readouterr().err == "error: Broken pipe\n"


BLOCKED = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "WHERE":
            print("importing", flush=True)
            try:
                for _ in range(600):  # a signal just before a call of sleep is heard only after it
                    time.sleep(0.1)
            except BaseException as error:
                raise ImportError("hidden") from error

sys.meta_path.insert(0, Slow())
from dalle.cli.main import main
from training.cli.main import main as train
sys.exit((train if sys.argv[1] == "train" else main)(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("where", "argv"),
    [
        ("dalle.cli.command", ("dalle", "--help")),
        ("tyro", ("dalle", "--help")),
        ("torch", ("dalle", "generate", "x")),
        ("dalle.cli.command", ("train", "plan")),
        ("torch", ("train", "clip", "demo")),
    ],
)
def test_ctrl_c_is_one_line_while_modules_are_imported(where, argv):
    with run("-c", BLOCKED.replace("WHERE", where), *argv) as program:
        assert program.stdout.readline() == "importing\n"
        program.send_signal(signal.SIGINT)
        shown, errors = program.communicate(timeout=60)
    assert (program.returncode, shown, errors) == (1, "", "error: stopped\n")


def test_commands_hear_ctrl_c_themselves_once_they_run():
    seen = []

    class Named:
        def run(self) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    def read(arguments: list[str]) -> Named:
        seen.append(signal.getsignal(signal.SIGINT))
        return Named()

    start.begin()
    assert run_program(read, []) == 0
    assert seen == [start._stop, signal.default_int_handler]


def test_a_handler_of_the_caller_stays():
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start.begin()
        start.let_commands_stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, own)


def test_importing_dalle_loads_no_torch_and_the_programs_neither():
    modules = "dalle, dalle.cli.main, dalle.cli.command, training.cli.main"
    with run("-c", f"import sys, {modules}; print({{'torch', 'tyro', 'numpy'}} & {{*sys.modules}})") as program:
        shown, errors = program.communicate(timeout=60)
    assert (shown, errors) == ("set()\n", "")


def test_memory_that_is_short_is_one_line(capsys):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte")):

        def fail(error=error) -> None:
            raise error

        assert run_command(fail) == 1
        assert capsys.readouterr().err.startswith("error: not enough memory")


def test_names_in_a_table_cannot_steer_a_terminal(capsys):
    terminal.print_table(["score", "picture"], [["1.0", "a\x1b[2J\nb\udcff"]])
    assert capsys.readouterr().out == "score  picture\n  1.0  a\\x1b[2J\\nb\\udcff\n"
