"""The transformers that a bundle may hold, and their tokenizers: the paper's, and those of others that are imported."""
