"""Every precision, ZeRO stage and offloading."""

import training.loop.fit
import training.recipes

MODES = [
    ("fp32", 0, "none"),
    ("fp32", 1, "none"),
    ("fp32", 2, "none"),
    ("fp32", 3, "none"),
    ("fp32", 1, "optimizer"),
    ("fp32", 2, "optimizer"),
    ("fp32", 3, "optimizer"),
    ("fp32", 3, "parameters"),
    ("autocast", 0, "none"),
    ("autocast", 1, "none"),
    ("autocast", 2, "none"),
    ("autocast", 3, "none"),
    ("bf16", 1, "none"),
    ("bf16", 2, "none"),
    ("bf16", 3, "none"),
    ("bf16", 1, "optimizer"),
    ("bf16", 2, "optimizer"),
    ("bf16", 3, "parameters"),
]


def allow_every_precision() -> None:
    """Compute in fp16 and bf16 on any CPU, also one that only emulates them."""
    from deepspeed import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    training.loop.fit.has_bfloat16_arithmetic = lambda device: True
