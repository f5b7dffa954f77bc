"""Tokenizers of pictures side by side: what they lose, and what their tokens cost."""
