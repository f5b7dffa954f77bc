"""The command `dalle-train`."""
