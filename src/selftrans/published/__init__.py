"""Checkpoints as others publish them: `read` opens a file, `names` knows its names and its time, `run` makes a run of it."""
