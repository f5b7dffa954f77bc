"""What a run costs beside memory: what its ranks send each other, and what its checkpoints take."""
