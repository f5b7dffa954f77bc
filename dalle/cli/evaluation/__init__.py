"""The verb that evaluates."""
