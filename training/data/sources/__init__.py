"""Sources of captioned pictures."""
