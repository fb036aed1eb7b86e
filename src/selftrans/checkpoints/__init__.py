"""Checkpoints on disk: their format, and loading a model from one."""
