"""How files are written and read."""
