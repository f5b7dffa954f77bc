"""DeepSpeed, its configuration and its checkpoints."""
