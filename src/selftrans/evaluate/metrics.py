"""Distances between sets of images, and a report with everything that they depend on.

Shape legend: n, m images, F features, K classes. Everything is computed in float64.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.special import log_softmax, logsumexp

from selftrans.evaluate.extractors import INCEPTION_SHA256, Extractor
from selftrans.evaluate.manifold import NEIGHBOURS, Manifolds, manifolds, same_length
from selftrans.evaluate.statistics import Moments, Statistics
from selftrans.messages import plural

SEED = 2020  #: as in torch-fidelity, so that equal features give the same subsets and splits
SPLITS = 10  #: of the inception score, as in torch-fidelity
SUBSETS, SUBSET_SIZE = 100, 1000  #: of the kernel distance
#: most images of each set for precision, recall and authenticity, whose cost is the square of their number
MANIFOLD = 50_000


def frechet_distance(a: Statistics | Moments, b: Statistics | Moments) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½) of two Gaussians (Dowson & Landau 1982; for FID 1706.08500, eq. 6).

    tr (A B)^½ is computed as the sum of the singular values of A^½ B^½, which is always real and also works for singular
    covariances. Warns when a set has too few images for its dimensions; ValueError when the feature lengths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of lengths {len(a.mean)} and {len(b.mean)} cannot be compared; use one extractor for both"
        )
    for one in (a, b):
        if isinstance(one, Statistics) and one.count is not None and one.count <= one.dim:
            warnings.warn(
                f"{plural(one.count, 'image')} for {one.dim} dimensions: the covariance is singular and the Fréchet distance "
                "is biased upwards; use more images",
                stacklevel=2,
            )
    step = a.mean - b.mean
    overlap = np.linalg.svd(_square_root(a.cov) @ _square_root(b.cov), compute_uv=False).sum()
    return max(0.0, float(step @ step + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap))


def _square_root(cov: np.ndarray) -> np.ndarray:
    """Symmetric square root (F, F) of a covariance; eigenvalues below rounding error are taken as zero."""
    values, vectors = np.linalg.eigh(cov)
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return (vectors * np.sqrt(np.where(values > floor, values, 0.0))) @ vectors.T


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the squared MMD with the kernel (x·y / F + 1)³ (KID: 1801.01401, sec. 4).

    a (n, F) and b (m, F); the estimate is unbiased, so it may be negative. `subset_size` is limited by the smaller set.
    """
    same_length(a, b)
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(
            f"{len(a):,} and {plural(len(b), 'image')} are too few for a kernel distance; give at least two of each"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[rng.choice(len(b), size, replace=False)].astype(np.float64)
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inner = (x / x.shape[1]) @ y.T
    inner += 1
    cube = inner * inner  # in-place products are faster than ** and than allocating a new matrix
    cube *= inner
    return cube


def accuracy(logits: np.ndarray, labels: np.ndarray | Sequence[int]) -> float:
    """Fraction of logits (n, K) whose argmax is the label (n,); ValueError when counts differ."""
    labels = np.asarray(labels)
    if labels.shape != (len(logits),):
        raise ValueError(f"{plural(len(logits), 'image')} but labels of shape {labels.shape}; give one label per image")
    return float((logits.argmax(axis=-1) == labels).mean())


def _outside(logits: np.ndarray, labels: np.ndarray) -> str:
    """What is wrong where labels (n,) are none of the K classes of logits (n, K); empty if all are."""
    if not len(labels) or (labels.min() >= 0 and labels.max() < logits.shape[1]):
        return ""
    classes = plural(logits.shape[1], "class")
    return f"labels range from {labels.min()} to {labels.max()}, but the classifier has {classes}"


def inception_score(logits: np.ndarray, *, splits: int = SPLITS, seed: int = SEED) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp E KL(p(y | x) || p(y)), from logits (n, K) (1606.03498, sec. 4).

    The images are shuffled first. Warns when a split has fewer images than there are classes: its score cannot exceed
    the number of its images.
    """
    splits = min(splits, len(logits))
    if (least := len(logits) // splits) < logits.shape[1]:
        warnings.warn(
            f"the score is over {plural(splits, 'split')} of {plural(least, 'image')} for {plural(logits.shape[1], 'class')}: "
            "it is biased downwards and cannot exceed the number of images; use more images",
            stacklevel=2,
        )
    logits = logits[np.random.RandomState(seed).permutation(len(logits))].astype(np.float64)
    log_p = log_softmax(logits, axis=-1)  # (n, K)
    edges = [i * len(log_p) // splits for i in range(splits + 1)]
    scores = []
    for start, end in itertools.pairwise(edges):
        each = log_p[start:end]
        # mean of p in log space: no log(0) for a class that underflows in every image
        marginal = logsumexp(each, axis=0) - np.log(len(each))
        scores.append(np.exp((np.exp(each) * (each - marginal)).sum(axis=-1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True)
class MetricInput:
    """The input of a metric in `METRICS`."""

    samples: Statistics
    reference: Statistics
    logits: np.ndarray  #: (n, K) of the samples; (0, 0) without a head
    labels: np.ndarray | Sequence[int] | None
    inception: bool  #: whether the extractor is the published Inception, so that results have the published names

    @functools.cached_property
    def manifolds(self) -> Manifolds | None:
        """Of at most MANIFOLD images of each, for two metrics; None where the reference holds no features."""
        if self.samples.features is None or self.reference.features is None:
            return None
        return manifolds(_drawn(self.samples.features), _drawn(self.reference.features))


#: results and parameters by name, or the reason why there are none
Outcome: TypeAlias = dict[str, float | int] | str


def _frechet(m: MetricInput) -> Outcome:
    numbers: dict[str, float | int] = {
        "fid" if m.inception else "frechet_distance": frechet_distance(m.samples, m.reference)
    }
    if m.samples.spatial is not None and m.reference.spatial is not None:
        name = "sfid" if m.inception else "spatial_frechet_distance"
        numbers[name] = frechet_distance(m.samples.spatial, m.reference.spatial)
    return numbers


def _kernel(m: MetricInput) -> Outcome:
    if m.samples.features is None or m.reference.features is None:
        return "no kernel distance: the reference holds no features"
    name = "kid" if m.inception else "kernel_distance"
    both = m.samples.features, m.reference.features
    mean, deviation = kernel_distance(*both)
    size = min(SUBSET_SIZE, *map(len, both))
    return {name: mean, f"{name}_std": deviation, "kernel_subsets": SUBSETS, "kernel_subset_size": size}


def _precision_recall(m: MetricInput) -> Outcome:
    if m.manifolds is None:
        return "no precision and recall: the reference holds no features"
    precision, recall, _ = m.manifolds
    if precision is None or recall is None:
        return f"no precision and recall: too few images for {NEIGHBOURS} neighbours"
    return {"precision": precision, "recall": recall, "neighbours": NEIGHBOURS} | _most_drawn(m)


def _authenticity(m: MetricInput) -> Outcome:
    if m.manifolds is None:
        return "no authenticity: the reference holds no features"
    if m.manifolds.authenticity is None:
        return "no authenticity: too few images"
    return {"authenticity": m.manifolds.authenticity} | _most_drawn(m)


def _drawn(features: np.ndarray) -> np.ndarray:
    """At most MANIFOLD rows of (n, F), a random choice that SEED fixes."""
    if len(features) <= MANIFOLD:
        return features
    return features[np.sort(np.random.RandomState(SEED).permutation(len(features))[:MANIFOLD])]


def _most_drawn(m: MetricInput) -> dict[str, int]:
    """The entry of the report where `_drawn` leaves out some of the features."""
    several = [len(each.features) for each in (m.samples, m.reference) if each.features is not None]
    return {"manifold_images": MANIFOLD} if max(several) > MANIFOLD else {}


def _score(m: MetricInput) -> Outcome:
    if not len(m.logits):
        return "no score: the extractor has no classification head"
    name = "inception_score" if m.inception else "classifier_score"
    mean, deviation = inception_score(m.logits)
    return {name: mean, f"{name}_std": deviation, "is_splits": min(SPLITS, len(m.logits))}


def _accuracy(m: MetricInput) -> Outcome:
    if m.labels is None:
        return {}
    if m.inception:
        return "no accuracy: inception has other classes than the samples"
    if not len(m.logits):
        return "no accuracy: the extractor has no classification head"
    # the null label, or a classifier of other data: not known beforehand, and the distances still hold
    if reason := _outside(m.logits, np.asarray(m.labels)):
        warnings.warn(f"the labels are not used: {reason}", stacklevel=3)
        return f"no accuracy: {reason}"
    return {"accuracy": accuracy(m.logits, m.labels)}


_NONE = np.empty((0, 0))  # logits of an extractor without a head

#: the metrics of `evaluate`, by name
METRICS: dict[str, Callable[[MetricInput], Outcome]] = {
    "frechet": _frechet,
    "kernel": _kernel,
    "precision_recall": _precision_recall,
    "authenticity": _authenticity,
    "score": _score,
    "accuracy": _accuracy,
}


def evaluate(
    samples: np.ndarray | Iterable[np.ndarray],
    reference: Statistics | np.ndarray | Iterable[np.ndarray],
    extractor: Extractor,
    *,
    labels: np.ndarray | Sequence[int] | None = None,
    metrics: Iterable[str] = tuple(METRICS),
    reference_name: str = "",
) -> dict[str, Any]:
    """Compare samples (batches of pictures uint8 (n, H, W, C), or of arrays float32 (n, C, *S)) with a reference.

    The reference is images in the same form, or their statistics. Returns the report, a flat dictionary.

    `metric` is the name of the main distance: "fid" with the published Inception only, else "frechet_distance"; `label`
    is its full name. `labels` (n,) are the conditions of the samples in order, for the extractor's accuracy on them; they
    may be a list that fills while the samples stream. Metrics that could not be computed are absent, with the reason in
    `note`. Raises ValueError for statistics of another extractor and for invalid images or labels; warns about
    labels that the extractor's classes do not include.
    """
    if not isinstance(reference, Statistics):
        reference = Statistics.of(reference, extractor, source=reference_name or "images")
    _check_extractor(reference, extractor)
    logits: list[np.ndarray] = []
    measured = Statistics.of(samples, extractor, observe=lambda out: logits.append(out.get("logits", _NONE)))
    report = _header(measured, reference, extractor, reference_name)
    inputs = MetricInput(measured, reference, np.concatenate(logits), labels, report["metric"] == "fid")
    notes = _notes(measured, reference, extractor)
    for name in metrics:
        outcome = METRICS[name](inputs)
        if isinstance(outcome, str):
            notes.append(outcome)
        else:
            report |= outcome
    return report | {"note": "; ".join(notes)}


def _notes(samples: Statistics, reference: Statistics, extractor: Extractor) -> list[str]:
    """What a reader of the report should know about the reference. Warns where the samples have another size."""
    notes = [] if reference.sha256 else ["the reference does not name its extractor"]
    if samples.size and reference.size and samples.size != reference.size:
        sizes = f"the samples are {samples.size}, the reference {reference.size}"
        warnings.warn(
            f"{sizes}; {extractor.name} scales both, so a difference in sharpness counts as distance", stacklevel=3
        )
        notes.append(sizes)
    if reference.features is not None and len(reference.features) != reference.count:
        notes.append(
            f"precision, recall, authenticity and kernel distance use the {plural(len(reference.features), 'picture')} "
            "stored with its statistics"
        )
    if samples.spatial is not None and reference.spatial is None:
        notes.append("no spatial distance: the reference holds no spatial statistics (mu_s, sigma_s)")
    return notes


def _check_extractor(reference: Statistics, extractor: Extractor) -> None:
    """ValueError for statistics of another extractor; for a file that does not name one, only the length is checked."""
    if reference.dim != extractor.dim or reference.sha256 not in ("", extractor.sha256):
        other = f"{reference.extractor or 'an unnamed extractor'} {reference.sha256[:8]}".strip()
        raise ValueError(
            f"reference {reference.source or 'statistics'} was made by {other} ({reference.dim} features), not by "
            f"{extractor.name} {extractor.sha256[:8]} ({extractor.dim}); compute it again with this extractor"
        )


def _header(samples: Statistics, reference: Statistics, extractor: Extractor, name: str) -> dict[str, Any]:
    """The part of a report that says what was measured and how."""
    fid = extractor.sha256 == INCEPTION_SHA256
    features = "values" if extractor.name == "values" else f"{extractor.name} features"
    return {
        "metric": "fid" if fid else "frechet_distance",
        "label": "FID" if fid else f"Fréchet distance ({features})",
        "num_images": samples.count,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "reference": name or reference.source,
        "reference_images": reference.count,
    }
