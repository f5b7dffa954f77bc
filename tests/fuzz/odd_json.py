"""Inputs for the doors: odd json."""

EXCLUDED = {"shard": "shards/tiny-000000.tar", "key": "00000001", "reason": "a copy"}


RESULT = {
    "caption": "a red cube",
    "file": "a-red-cube/01.png",
    "rank": 1,
    "ranked_by": "clip",
    "score": 0.3,
    "candidate": 4,
}


METRICS = {
    "step": 10,
    "split": "train",
    "time": 1.7e9,
    "loss": 2.5,
    "tokens_per_s": 100.0,
    "samples": 4,
    "usage": [0.5, 1.5],
}


RUN_CONFIG = {
    "run": {"stage": "dvae", "recipe": "tiny", "model": {"n_hid": 8}},
    "training": {"steps": 100, "log_every": 10},
}
