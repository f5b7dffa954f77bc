"""Text tokenizers of published models."""
