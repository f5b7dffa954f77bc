"""The built-in world: what is drawn, what is said of it, and how pictures are read back."""
