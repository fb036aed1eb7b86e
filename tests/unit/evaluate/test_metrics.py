"""Distances compared with scipy, closed forms, direct sums and torch-fidelity; the contents of the report."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import scipy.linalg

from selftrans.evaluate import metrics
from selftrans.evaluate.extractors import INCEPTION_SHA256
from selftrans.evaluate.metrics import (
    accuracy,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifolds,
)
from selftrans.evaluate.statistics import Moments, Statistics


def described(x: np.ndarray) -> Statistics:
    return Statistics(x.mean(axis=0), np.cov(x, rowvar=False), count=len(x), features=x)


def golden() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of two sets, and logits, for which the results of torch-fidelity 0.4.0 are given below."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(12, 12))
    a = (rng.normal(size=(300, 12)) @ mix).astype(np.float32)
    b = (rng.normal(size=(260, 12)) @ mix * 1.1 + 0.3).astype(np.float32)
    return a, b, rng.normal(size=(300, 7)).astype(np.float32) * 2


def test_metrics_equal_torch_fidelity() -> None:
    a, b, logits = golden()
    assert frechet_distance(described(a.astype(float)), described(b.astype(float))) == pytest.approx(
        5.429343613138542, rel=1e-6
    )
    assert kernel_distance(a, b, subsets=10, subset_size=100) == pytest.approx(
        (9.117525433678644, 33.15315173618173), rel=1e-6
    )
    assert manifolds(a, b)[:2] == pytest.approx((0.9333333373069763, 0.8307692408561707), rel=1e-6)
    assert inception_score(logits) == pytest.approx((2.2106400353723172, 0.14727577118242124), rel=1e-6)


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_frechet_distance_equals_scipy(dim: int) -> None:
    rng = np.random.default_rng(dim)
    a, b = rng.normal(size=(500, dim)), rng.normal(size=(400, dim)) @ rng.normal(size=(dim, dim)) + 1
    one, two = described(a), described(b)
    root = scipy.linalg.sqrtm(one.cov @ two.cov).real
    expected = ((one.mean - two.mean) ** 2).sum() + np.trace(one.cov + two.cov - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    one = Moments(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 0.0]))
    two = Moments(np.array([3.0, 1.0, 0.0]), np.diag([9.0, 4.0, 25.0]))
    # (3² + 0 + 2²) + (3 - 1)² + 0 + (5 - 0)²
    assert frechet_distance(one, two) == pytest.approx(13 + 4 + 25, rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_with_fewer_images_than_dimensions() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(20, 100)), rng.normal(size=(30, 100)) * 2 + 0.1
    one, two = described(a), described(b)
    with (
        pytest.warns(UserWarning, match="20 images for 100 dimensions"),
        pytest.warns(UserWarning, match="30 images for 100 dimensions"),
    ):
        found = frechet_distance(one, two)
    # tr (A B)^½ is the nuclear norm of the centred data's product, where nothing is singular
    x, y = (a - one.mean) / np.sqrt(19), (b - two.mean) / np.sqrt(29)
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = ((one.mean - two.mean) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap
    assert found == pytest.approx(expected, rel=1e-9)
    with pytest.warns(UserWarning, match="singular"):
        assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_enough_images_and_constant_features_do_not_warn() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)) * [1, 1, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(described(x), described(x + np.array([0, 0, 2, 0]))) == pytest.approx(4, rel=1e-9)


def test_different_feature_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths 3 and 4"):
        frechet_distance(Moments(np.zeros(3), np.eye(3)), Moments(np.zeros(4), np.eye(4)))
    for metric in (kernel_distance, manifolds):
        with pytest.raises(ValueError, match="cannot be compared"):
            metric(np.zeros((5, 3)), np.zeros((5, 4)))


def test_kernel_distance_equals_the_direct_double_sum() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(6) for j in range(6) if i != j) / 30
    expected = within - 2 * sum(k(a, b) for a in x for b in y) / 36
    mean, deviation = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(expected, rel=1e-12) and deviation == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_and_repeatable() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2000, 4)), rng.normal(size=(2000, 4))
    mean, deviation = kernel_distance(x, y, subsets=200, subset_size=100)
    assert abs(mean) < 3 * deviation / np.sqrt(200) + 0.02
    assert kernel_distance(x, y, subsets=5, subset_size=50) == kernel_distance(x, y, subsets=5, subset_size=50)
    assert kernel_distance(x, y, subsets=5, subset_size=50) != kernel_distance(x, y, subsets=5, subset_size=50, seed=1)
    with pytest.raises(ValueError, match="too few"):
        kernel_distance(x[:1], y)


def test_accuracy_by_hand() -> None:
    logits = np.array([[1.0, 2.0, 0.0], [5.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    assert accuracy(logits, np.array([1, 0, 2, 0])) == 0.75
    assert accuracy(logits, [0, 1, 0, 0]) == 0.0
    with pytest.raises(ValueError, match="4 images but labels"):
        accuracy(logits, [1, 2])


def test_inception_score_by_hand() -> None:
    certain = np.eye(4).repeat(5, axis=0) * 1000  # certain predictions, four equally frequent classes: score 4
    assert inception_score(certain, splits=1)[0] == pytest.approx(4, rel=1e-12)
    assert inception_score(np.zeros((20, 4)))[0] == pytest.approx(1, rel=1e-12)  # uniform predictions
    assert inception_score(np.tile([9.0, 0.0], (20, 1)))[0] == pytest.approx(1, rel=1e-12)  # one class only


def test_score_of_few_images_per_split_warns() -> None:
    sure = np.eye(10) * 100
    with pytest.warns(UserWarning, match="over 10 splits of 1 image for 10 classes: it is biased downwards") as caught:
        assert inception_score(sure) == pytest.approx((1, 0))  # for ten perfect classes
    assert "\n" not in str(caught[0].message) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inception_score(np.tile(sure, (10, 1)))[0] > 5
    with pytest.warns(UserWarning, match="over 10 splits of 9 images"):
        inception_score(np.tile(sure, (10, 1))[:99])


class Colours:
    """Six random projections of the first pixels, two of which serve as logits."""

    pictures = True

    def __init__(self, name: str = "colours", sha256: str = "c" * 64, head: bool = True, spatial: bool = False) -> None:
        self.name, self.sha256, self.dim, self.head, self.spatial = name, sha256, 6, head, spatial
        self.weights = np.random.default_rng(0).normal(size=(12, 6)) / 255

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        features = images.reshape(len(images), -1)[:, :12] @ self.weights
        out = {"features": features}
        return (
            out
            | ({"logits": features[:, :2]} if self.head else {})
            | ({"spatial": features[:, :3]} if self.spatial else {})
        )


def pictures(seed: int, n: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200 + 20 * seed, (n, 2, 2, 3), dtype=np.uint8)


def test_report_is_flat_json_with_exact_names() -> None:
    samples, reference = pictures(0), pictures(1, 80)
    labels = (np.arange(90) % 2).tolist()
    report = evaluate(iter([samples[:50], samples[50:]]), reference, Colours(), labels=labels, reference_name="real")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert all(isinstance(value, str | int | float) for value in report.values())
    assert report["metric"] == "frechet_distance" and report["label"] == "Fréchet distance (colours features)"
    assert (report["num_images"], report["reference_images"], report["reference"]) == (90, 80, "real")
    assert (report["extractor"], report["extractor_sha256"]) == ("colours", "c" * 64)
    assert not [name for name in report if "fid" in name.lower() or "kid" in name or "inception" in name]
    features = Colours()(samples)["features"]
    assert report["frechet_distance"] == pytest.approx(
        frechet_distance(described(features), described(Colours()(reference)["features"])), rel=1e-9
    )
    assert report["accuracy"] == accuracy(features[:, :2], labels)
    assert {"kernel_distance", "kernel_distance_std", "precision", "recall", "classifier_score"} < report.keys()
    assert (report["is_splits"], report["neighbours"]) == (10, 3)
    assert (report["kernel_subsets"], report["kernel_subset_size"]) == (100, 80), "as computed: the smaller set's"
    assert evaluate(samples[:7], reference, Colours(), metrics=["score"])["is_splits"] == 7


def test_fid_requires_the_published_inception() -> None:
    assert "fid" not in evaluate(pictures(0), pictures(1), Colours(name="inception"))
    inception = Colours(name="inception", sha256=INCEPTION_SHA256, spatial=True)
    report = evaluate(pictures(0), pictures(1), inception, labels=[0] * 90)
    whole = Statistics.of(pictures(1), inception)
    bare = evaluate(pictures(0), dataclasses.replace(whole, spatial=None), inception, metrics=["frechet"])
    assert "sfid" not in bare and "no spatial distance: the reference holds no spatial statistics" in bare["note"]
    assert report["metric"] == "fid" and report["label"] == "FID"
    assert {"fid", "sfid", "kid", "kid_std", "inception_score", "precision", "recall"} < report.keys()
    assert not {"accuracy", "frechet_distance", "classifier_score"} & report.keys()
    assert "no accuracy: inception has other classes than the samples" in report["note"]


def test_labels_without_a_classification_head_cost_a_note_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate(pictures(0), pictures(1), Colours(head=False), labels=[0] * 90, metrics=["accuracy"])
    assert report["note"] == "no accuracy: the extractor has no classification head"


def test_unavailable_metrics_are_absent_and_explained() -> None:
    complete = Statistics.of(pictures(1), Colours())
    bare = Statistics(complete.mean, complete.cov, source="adm.npz")
    report = evaluate(pictures(0), bare, Colours(head=False))
    assert "frechet_distance" in report and report["reference"] == "adm.npz" and report["reference_images"] is None
    assert not {"kernel_distance", "precision", "classifier_score", "accuracy"} & report.keys()
    for reason in ("does not name its extractor", "no kernel distance", "no precision and recall", "no score"):
        assert reason in report["note"]
    few = evaluate(pictures(0, 3), complete, Colours(), metrics=["precision_recall"])
    assert "too few images for 3 neighbours" in few["note"] and "precision" not in few


def test_only_requested_metrics_are_computed(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "kernel_distance", None)
    monkeypatch.setattr(metrics, "manifolds", None)
    report = evaluate(pictures(0), pictures(1), Colours(), labels=[0] * 90, metrics=("frechet", "accuracy"))
    assert {"frechet_distance", "accuracy"} < report.keys() and "classifier_score" not in report


def test_reference_of_another_extractor_is_refused_before_sampling() -> None:
    reference = Statistics.of(pictures(1), Colours(name="other", sha256="d" * 64), source="ref")

    def sampler():
        raise AssertionError("an image was asked for")
        yield

    with pytest.raises(ValueError, match=r"reference ref was made by other dddddddd .* not by colours cccccccc"):
        evaluate(sampler(), reference, Colours())
    unnamed = Statistics(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match=r"an unnamed extractor \(3 features\)"):
        evaluate(sampler(), unnamed, Colours())


def test_labels_may_be_appended_while_samples_stream() -> None:
    labels: list[int] = []

    def sampler():
        for start in range(0, 90, 30):
            labels.extend([1] * 30)
            yield pictures(0)[start : start + 30]

    report = evaluate(sampler(), pictures(1), Colours(), labels=labels, metrics=["accuracy"])
    assert report["accuracy"] == accuracy(Colours()(pictures(0))["logits"], [1] * 90)
    with pytest.raises(ValueError, match="90 images but labels"):
        evaluate(pictures(0), pictures(1), Colours(), labels=[0, 1])


@pytest.mark.parametrize("label", [2, -1])
def test_labels_that_the_classifier_lacks_cost_the_accuracy_alone(label: int) -> None:
    """The null label, or a classifier of fewer classes: known only when all samples have been made."""
    labels = np.array([0] * 89 + [label])
    with pytest.warns(UserWarning, match="the labels are not used: labels range from"):
        report = evaluate(pictures(0), pictures(1), Colours(), labels=labels, metrics=("frechet", "accuracy"))
    assert "accuracy" not in report and "but the classifier has 2 classes" in report["note"]
    plain = evaluate(pictures(0), pictures(1), Colours(), metrics=("frechet",))
    assert report["frechet_distance"] == plain["frechet_distance"]


def test_precision_and_recall_of_many_images_are_those_of_some(monkeypatch) -> None:
    """Their cost is the square of the number: of all of ImageNet they would take hours, and more memory than there is."""
    samples, reference, colours = pictures(0), pictures(1, 80), Colours()
    whole = evaluate(samples, reference, colours, metrics=["precision_recall"])
    monkeypatch.setattr(metrics, "MANIFOLD", 60)
    report = evaluate(samples, reference, colours, metrics=["precision_recall"])
    x, y = (colours(images)["features"].astype(np.float32) for images in (samples, reference))
    rows = [np.sort(np.random.RandomState(2020).permutation(len(each))[:60]) for each in (x, y)]
    assert (report["precision"], report["recall"]) == manifolds(x[rows[0]], y[rows[1]])[:2]
    assert report["manifold_images"] == 60 and "manifold_images" not in whole
    assert evaluate(samples, reference, colours, metrics=["authenticity"])["manifold_images"] == 60
    monkeypatch.setattr(metrics, "MANIFOLD", 90)
    assert evaluate(samples, reference, colours, metrics=["precision_recall"]) == whole


def test_samples_of_another_size_than_the_reference_are_noted(tmp_path) -> None:
    """Inception scales every picture to one size, so nothing else shows it."""
    large = np.random.default_rng(1).integers(0, 200, (60, 4, 3, 3), dtype=np.uint8)
    Statistics.of(large, Colours()).save(tmp_path / "large.npz")
    stored = Statistics.load(tmp_path / "large.npz")
    assert stored.size == "4x3x3"
    for reference in (large, stored):
        with pytest.warns(UserWarning, match=r"the samples are 2x2x3, the reference 4x3x3; colours scales both"):
            report = evaluate(pictures(0), reference, Colours(), metrics=("frechet",))
        assert "the samples are 2x2x3, the reference 4x3x3" in report["note"]
    both = [large, pictures(1)]  # as prepared data of several sizes are
    assert Statistics.of(iter(both), Colours()).size == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reference in (pictures(1), iter(both), dataclasses.replace(stored, size="")):
            assert evaluate(pictures(0), reference, Colours(), metrics=("frechet",))["note"] == ""


def test_class_without_probability_gives_no_nan():
    logits = np.zeros((40, 3))
    logits[:20, 0] = logits[20:, 1] = 2000.0  # the third class, exp(-2000), underflows everywhere
    assert inception_score(logits, splits=1)[0] == pytest.approx(2.0)
