"""Verbs that end in captions: ranking them for a picture, completing them."""
