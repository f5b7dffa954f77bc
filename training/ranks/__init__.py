"""Processes: joining, agreeing, watching, restarting."""
