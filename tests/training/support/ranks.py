"""Functions on several ranks, and programs under every launcher."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.ranks.ranks import join
from training.run_files import read_metrics

N_RANKS = 2
PATIENCE_S = 300
PRELOADED = [
    "torch",
    "torch.utils.tensorboard",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "training.stages.all",
    "support.engines",
]


def _rank(
    function: Callable[..., object], rank: int, n_ranks: int, store: str, arguments: tuple[Any, ...], answers: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_SIZE=str(n_ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks)
    try:
        answers.put((rank, function(join(), *arguments)))
    except BaseException as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def on_ranks(folder: Path, function: Callable[..., object], *arguments: Any, n_ranks: int = N_RANKS) -> list[Any]:
    """Call `function(ranks, *arguments)` on some ranks; returns what each returns, or "NameOfError: message"."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    answers = context.Queue()
    folder.mkdir(exist_ok=True, parents=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    processes = [
        context.Process(target=_rank, args=(function, rank, n_ranks, str(store), arguments, answers))
        for rank in range(n_ranks)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=PATIENCE_S) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(n_ranks)]


def transformer_command(folder: Path, bundle: Path, stage: int) -> list[str]:
    command = ["transformer", "demo", "--data", str(folder / "world"), "--out", str(bundle), "--steps", "3"]
    # at a high rate, AdamW's first steps would turn rounding in a gradient near 0 into a visible difference
    command += ["--learning-rate", "1e-5", "--precision", "fp32"]
    return [*command, "--global-batch", "4", "--log-every", "1", "--zero-stage", str(stage), "--workers", "0"]


def losses_of(bundle: Path) -> list[float]:
    lines = read_metrics(bundle / "training" / "transformer")
    return [line["loss"] for line in lines if line["split"] == "train"]


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--no_python", "--no_local_rank", "--master_port"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--no-python", "--master_port"],
}


def launch(launcher: str, port: int, command: list[str]) -> tuple[int, str]:
    """Run `dalle-train` under a launcher, in a session of its own, of which nothing is left afterwards."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
    program, *options = LAUNCHERS[launcher]
    process = subprocess.Popen(
        [str(scripts / program), *options, str(port), str(scripts / "dalle-train"), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output
