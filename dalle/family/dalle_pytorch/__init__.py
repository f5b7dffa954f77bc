"""DALLE-pytorch's transformer, as its users trained it: one of the transformers that a bundle may hold."""
