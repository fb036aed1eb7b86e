"""Import of published checkpoints, and export to their layouts."""
