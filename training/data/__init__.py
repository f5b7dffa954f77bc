"""Captioned pictures: from sources to shards, and from shards to batches."""
