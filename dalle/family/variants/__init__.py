"""Transformers that others published, which are like the paper's: one stream, a decoder alone."""
