"""Evaluation of images: feature extractors, statistics and metrics."""

from selftrans.evaluate.classifier import SmallClassifier, digits_classifier, train_classifier
from selftrans.evaluate.extractors import EXTRACTORS, Extractor, load_extractor
from selftrans.evaluate.metrics import (
    METRICS,
    accuracy,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from selftrans.evaluate.statistics import Moments, Statistics

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Extractor",
    "Moments",
    "SmallClassifier",
    "Statistics",
    "accuracy",
    "digits_classifier",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_extractor",
    "precision_recall",
    "train_classifier",
]
