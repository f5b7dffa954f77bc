"""What the models share: how files are written and read, and how text is spelled."""
