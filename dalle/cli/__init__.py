"""The command `dalle`."""
