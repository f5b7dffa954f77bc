"""Starting a run: plain Python, `torchrun`, `deepspeed`, and two machines, which two network namespaces stand for."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from support.ranks import LAUNCHERS, launch, losses_of, transformer_command

from training.run_files import read_metrics

pytestmark = pytest.mark.slow

TINY_CLI = Path(__file__).parent / "support" / "tiny_cli.py"
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = Path(sys.executable).parent
ADDRESSES = ("10.231.77.1", "10.231.77.2")
PATIENCE_S = 300


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started; it leads a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.fixture(scope="module")
def plain_losses(untrained: Path) -> list[float]:
    """Losses of one process that no launcher started."""
    bundle = shutil.copytree(untrained / "bundle", untrained / "plain")
    command = [sys.executable, "-m", "training.cli", *transformer_command(untrained, bundle, 0)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        end(process)
    assert process.returncode == 0, output
    assert "global batch 4 = 4 per process × 1 process × 1 accumulated" in output
    assert re.search(r"^transformer: \d+ samples in \d+ shards?$", output, re.MULTILINE)
    return losses_of(bundle)


@pytest.mark.parametrize(("launcher", "port"), [("deepspeed", 30201), ("torchrun", 30202)])
def test_every_launcher_gives_the_losses_of_plain_python(
    tmp_path: Path, untrained: Path, plain_losses: list[float], launcher: str, port: int
) -> None:
    assert set(LAUNCHERS) == {"deepspeed", "torchrun"}
    bundle = shutil.copytree(untrained / "bundle", tmp_path / "bundle")
    code, output = launch(launcher, port, transformer_command(untrained, bundle, 3))
    assert code == 0, output
    assert "global batch 4 = 2 per process × 2 processes × 1 accumulated" in output
    assert losses_of(bundle) == pytest.approx(plain_losses, abs=1e-5)


# ------------------------------------------------------------------------------------------------ two machines


@dataclass(frozen=True)
class Machine:
    """A network namespace with an interface of its own."""

    name: str
    interface: str
    address: str

    def start(self, command: list[str], **more: str) -> "subprocess.Popen[str]":
        # gloo takes the address that the host's name resolves to, which is another machine's loopback here
        variables = environment(GLOO_SOCKET_IFNAME=self.interface, **more)
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def ip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=30)


def namespaces() -> list[str]:
    """Return the names of the network namespaces of these tests that are there."""
    return [line.split()[0] for line in ip("netns", "list").stdout.splitlines() if line.startswith("dalle-")]


def take_down(names: list[str]) -> None:
    """Delete network namespaces, after everything that runs in them."""
    for name in names:
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30).stdout
        for pid in inside.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def set_up(suffix: int) -> list[Machine]:
    """Make two network namespaces that a cable joins: a pair of veth interfaces."""
    machines = [Machine(f"dalle-{suffix}-{i}", f"v{suffix}x{i}", address) for i, address in enumerate(ADDRESSES)]
    for machine in machines:
        ip("netns", "add", machine.name)
    first, second = machines
    ip("link", "add", first.interface, "netns", first.name, "type", "veth", "peer", "name", second.interface)
    ip("link", "set", second.interface, "netns", second.name)
    for machine in machines:
        inside = functools.partial(ip, "-n", machine.name)
        inside("address", "add", f"{machine.address}/24", "dev", machine.interface)
        inside("link", "set", machine.interface, "up")
        inside("link", "set", "lo", "up")
    return machines


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("two machines need network namespaces: the program `ip` and the rights of root")
    take_down([name for name in namespaces() if not Path(f"/proc/{name.split('-')[1]}").exists()])  # of killed tests
    names = [f"dalle-{os.getpid()}-{i}" for i in range(2)]
    try:
        try:
            made = set_up(os.getpid())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made
    finally:
        take_down(names)
    assert not set(names) & set(namespaces())


def finish(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str]]:
    """Wait for the launchers of all machines; returns their exit codes and what they said."""
    try:
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    finally:
        for process in processes:
            end(process)
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_two_machines_under_torchrun_train_the_same(
    tmp_path: Path, untrained: Path, plain_losses: list[float], machines: list[Machine]
) -> None:
    bundle = shutil.copytree(untrained / "bundle", tmp_path / "bundle")
    command = transformer_command(untrained, bundle, 2)
    rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", ADDRESSES[0], "--master_port", "30210"]
    processes = [
        machine.start(["torchrun", *rendezvous, "--node_rank", str(rank), "--no-python", "dalle-train", *command])
        for rank, machine in enumerate(machines)
    ]
    for code, output in finish(processes):
        assert code == 0, output
    assert losses_of(bundle) == pytest.approx(plain_losses, abs=1e-5)


def test_two_machines_under_deepspeed_with_a_hostfile_train_the_same(
    tmp_path: Path, untrained: Path, plain_losses: list[float], machines: list[Machine]
) -> None:
    bundle = shutil.copytree(untrained / "bundle", tmp_path / "bundle")
    command = transformer_command(untrained, bundle, 2)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    options = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", ADDRESSES[0], "--master_port", "30211"]
    processes = [
        machine.start(
            ["deepspeed", *options, "--node_rank", str(rank), "--no_python", "--no_local_rank", "dalle-train", *command]
        )
        for rank, machine in enumerate(machines)
    ]
    for code, output in finish(processes):
        assert code == 0, output
    assert losses_of(bundle) == pytest.approx(plain_losses, abs=1e-5)


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_of_two_launchers_meet_again_after_one_was_killed(tmp_path: Path, shards: Path, killed: int) -> None:
    command = [sys.executable, str(TINY_CLI), "dvae", "tiny", "--data", str(shards), "--out", str(tmp_path / "out")]
    command += ["--steps", "120", "--checkpoint-every", "10", "--log-every", "10"]
    port = str(30212 + killed)
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    agents = [
        subprocess.Popen(
            ["torchrun", *options, "--max-restarts", "2", "--node_rank", str(rank), "--no-python", *command],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    saved = tmp_path / "out" / "training" / "dvae" / "checkpoints" / "latest"
    try:
        while not saved.exists() and all(agent.poll() is None for agent in agents):
            time.sleep(0.05)
        [rank, *_] = Path(f"/proc/{agents[killed].pid}/task/{agents[killed].pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
    except BaseException:
        for agent in agents:
            end(agent)
        raise
    said = finish(agents)
    assert [code for code, _ in said] == [0, 0], said
    assert "dvae: resuming from step" in said[0][1]
    lines = read_metrics(tmp_path / "out" / "training" / "dvae")
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(10, 121, 10))


# ---------------------------------------------------------------------------------------------------- examples


def test_the_examples_are_a_shell_script_and_a_hostfile() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)
    hosts = fetch_hostfile(str(EXAMPLES / "hostfile"))
    assert len(hosts) == 2
    assert len(set(hosts.values())) == 1, "every machine has the same number of GPUs"


def test_the_command_of_the_slurm_example_trains_where_srun_is_stood_in_for(tmp_path: Path, untrained: Path) -> None:
    """`srun` runs its command once per machine; here, on one machine, once."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": "echo localhost",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    bundle = shutil.copytree(untrained / "bundle", tmp_path / "bundle")
    variables = environment(
        SLURM_JOB_ID="30220", SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1", SLURM_NODEID="0", GPUS_PER_NODE="2"
    )
    variables["PATH"] = f"{programs}{os.pathsep}{variables['PATH']}"
    command = ["bash", str(EXAMPLES / "slurm.sh"), *transformer_command(untrained, bundle, 2)]
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    [(code, output)] = finish([process])
    assert code == 0, output
    assert "2 per process × 2 processes" in output
    assert len(losses_of(bundle)) == 3
