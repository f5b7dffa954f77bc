"""Models as directories."""
