"""Measuring a bundle."""
