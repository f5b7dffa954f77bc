"""Karlo, the published unCLIP, as diffusers has it."""
