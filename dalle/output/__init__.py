"""Sheets of pictures and result files."""
