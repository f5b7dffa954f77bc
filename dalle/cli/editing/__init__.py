"""Verbs that start from a picture: editing it."""
