"""Captioned pictures in shards and folders."""
