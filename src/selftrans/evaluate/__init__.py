"""Evaluation of images: feature extractors, statistics and metrics."""
