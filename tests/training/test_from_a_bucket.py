"""The steps of docs/cluster.md, from shards in a bucket to a bundle: an S3 server, and two ranks of a launcher."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import s3

from training.run_files import read_metrics

pytestmark = pytest.mark.slow

TINY_CLI = str(Path(__file__).parent / "support" / "tiny_cli.py")
PATIENCE_S = 400


def run(*command: str, cwd: Path) -> str:
    """Run a command; returns what it said."""
    environment = {name: os.environ[name] for name in os.environ if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


def test_the_steps_of_the_page_lead_from_a_bucket_to_a_bundle(s3_bucket: str, shards: Path, tmp_path: Path) -> None:
    s3.put_folder(shards, "train")
    hostfile, out = tmp_path / "hostfile", tmp_path / "runs" / "mine"
    hostfile.write_text("localhost slots=2\n")
    train, manifest, tokens, of_tokens = (
        f"{s3_bucket}/{name}" for name in ("train/", "train-manifest", "tokens/", "tokens-manifest")
    )
    cache = ["--cache", str(tmp_path / "cache"), "--cache-gb", "1"]
    data = ["--data", train, "--manifest", manifest, *cache]

    def alone(*arguments: str) -> str:
        return run(sys.executable, TINY_CLI, *arguments, cwd=tmp_path)

    def on_two_ranks(port: int, *arguments: str) -> str:
        hosts = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
        launcher = ["deepspeed", *hosts, "--master_port", str(port), "--no_python", "--no_local_rank"]
        return run(*launcher, sys.executable, TINY_CLI, *arguments, "--global-batch", "4", cwd=tmp_path)

    alone("check-data", "--data", train, "--out", manifest, *cache)
    alone("tokenizer", "tiny", "--data", train, *cache, "--out", str(out))
    assert "2 per process × 2 processes" in on_two_ranks(30231, "dvae", "tiny", *data, "--out", str(out))
    alone("encode", *data, "--dvae", str(out / "dvae"), "--out", tokens, "--crops", "2")
    assert s3.keys("tokens/") == [f"tokens/world-00000{n}.tar" for n in range(3)]
    alone("check-data", "--data", tokens, "--out", of_tokens, *cache)
    alone("clip", "tiny", *data, "--out", str(out))
    transformer = ["transformer", "tiny", "--data", tokens, "--manifest", of_tokens, *cache, "--out", str(out)]
    transformer += ["--zero-stage", "2"]
    windows = ["--shuffle-window", "1", "--shuffle-streams", "2"]
    on_two_ranks(30232, *transformer, *windows, "--steps", "2")
    said = alone(*transformer, "--steps", "4")
    assert "saved by 2 ranks: converting it for 1" in said
    lines = read_metrics(out / "training" / "transformer")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "dvae", "clip", "dalle"}
