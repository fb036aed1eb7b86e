"""Experiments on top of training: comparison, quickstart, benchmark, evaluation, analysis."""
