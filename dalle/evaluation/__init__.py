"""What models are worth, measured."""
