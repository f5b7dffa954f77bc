"""A run's directory without a run."""

import json
import os
from pathlib import Path
from typing import Any

from training.report.runs import read_run
from training.report.status import summary

NOW = 1_800_000_000.0


class RunFolder:
    """A run's directory, written by hand: a line every ten steps, which take a second each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def config(self, steps: int = 100, log_every: int = 10, recipe: str = "demo") -> "RunFolder":
        run = {"stage": "transformer", "recipe": recipe, "model": {"n_layers": 2}}
        record = {"run": run, "training": {"steps": steps, "log_every": log_every}, "torch": "2.13.0", "git": "abc"}
        (self.path / "config.json").write_text(json.dumps(record))
        return self

    def lines(self, last: int, *, until: float = NOW, **values: Any) -> "RunFolder":
        with (self.path / "metrics.jsonl").open("a") as file:
            for step in range(10, last + 1, 10):
                line = {"step": step, "split": "train", "time": until - (last - step), "loss": 5.0 - step / 50}
                file.write(json.dumps(line | values) + "\n")
        return self

    def validation(self, step: int, loss: float) -> "RunFolder":
        with (self.path / "metrics.jsonl").open("a") as file:
            line = {"step": step, "split": "validation", "time": NOW, "loss": loss, "samples": 1500}
            file.write(json.dumps(line) + "\n")
        return self

    def checkpoint(self, step: int, *, saved_at: float = NOW - 300, is_latest: bool = True) -> "RunFolder":
        folder = self.path / "checkpoints" / f"step{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(3 * 1024))
        os.utime(folder / "weights", (saved_at, saved_at))
        if is_latest:
            (self.path / "checkpoints" / "latest").write_text(folder.name)
        return self

    def said(self, state: str, reason: str = "", at: float = NOW) -> "RunFolder":
        (self.path / "state.json").write_text(json.dumps({"state": state, "reason": reason, "time": at}))
        return self

    def summary(self, now: float = NOW) -> str:
        return summary(read_run(self.path), now)
