"""Verbs of DALL·E 2 alone, which start from pictures, and its options of the others."""
