"""Shares of variance compared with closed forms, with means computed by numpy, and with scikit-learn's ridge regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from selftrans.evaluate.target_share import RIDGES, Design, Fits, share


def fitted(design: Design, features: Tensor, fit: Tensor) -> dict[str, Tensor]:
    """Errors of each predictor on the pictures outside `fit`, summed over times; features (times, 2, N, F)."""
    fits, rows = Fits(len(features), design, features.shape[-1]), torch.arange(len(fit))
    for time, each in enumerate(features):
        for part in rows[fit].split(37):
            fits.add(part, time, each[:, part])
    fits.solve()
    held = [fits.errors(rows[~fit], time, each[:, ~fit]) for time, each in enumerate(features)]
    return {name: sum(errors[name] for errors in held) for name in held[0]}


def synthetic(n: int = 4000, width: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of 5 classes, features (1, 2, n, width) of a code of the label plus noise, and which pictures are fitted."""
    make = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5
    code = torch.randn(2, 5, width, generator=make)
    noise = torch.randn(2, n, width, generator=make)
    noise[1] = 0.6 * noise[0] + 0.8 * noise[1]  # correlation 0.6 between the noise of f_u and that of f_c - f_u
    features = 3.0 + 0.5 * code[:, labels] + noise * torch.tensor([1.0, 0.25])[:, None, None]
    return labels, features[None], torch.arange(n) % 4 != 3


def test_share_of_a_label_code_in_noise_is_the_ratio_of_their_variances() -> None:
    labels, features, fit = synthetic()
    errors = fitted(Design.of_labels(labels), features, fit)
    code = torch.stack([features[0][:, labels == k].mean(dim=1) for k in range(5)], dim=1)  # (2, 5, F)
    for w in (0.0, 1.0, 5.0, 30.0):
        between = (code[0] + w * code[1]).var(dim=0, correction=0).sum()
        within = 24 * (1 + 2 * w * 0.6 * 0.25 + (0.25 * w) ** 2)  # variance of a + w b with correlation 0.6
        found, error = share(errors["condition"], errors["mean"], w)
        assert found == pytest.approx(float(between / (between + within)), abs=0.02)
        assert 0 < error < 0.02
    limit, _ = share(errors["condition"], errors["mean"], None)
    assert limit == pytest.approx(share(errors["condition"], errors["mean"], 1e6)[0], abs=1e-5)


def test_share_is_that_of_means_computed_from_the_guided_features_themselves() -> None:
    labels, features, fit = synthetic(200, 6)
    errors, labels, u, d = (
        fitted(Design.of_labels(labels), features, fit),
        labels.numpy(),
        *features[0].double().numpy(),
    )
    for w in (0.0, 2.0, -3.0):
        target, f = u + w * d, fit.numpy()
        means = np.stack([target[f & (labels == k)].mean(axis=0) for k in range(5)])
        residual = ((target - means[labels])[~f] ** 2).sum(axis=1)
        total = ((target - target[f].mean(axis=0))[~f] ** 2).sum(axis=1)
        found, error = share(errors["condition"], errors["mean"], w)
        assert found == pytest.approx(1 - residual.sum() / total.sum(), abs=1e-5)
        left_out = [1 - np.delete(residual, i).sum() / np.delete(total, i).sum() for i in range(len(total))]
        jackknife = np.sqrt((len(total) - 1) * np.var(left_out))
        assert error == pytest.approx(jackknife, rel=0.1)


def test_share_of_noise_is_below_zero_by_what_the_table_has_learnt_of_it() -> None:
    n, classes = 2000, 50
    features = torch.randn(1, 2, n, 40, generator=torch.Generator().manual_seed(3))
    fit = torch.arange(n) % 2 == 0
    labels = torch.arange(n) // 2 % classes
    errors = fitted(Design.of_labels(labels), features, fit)
    each = n / 2 / classes  # fitted pictures of a class: the error of a mean of k numbers is 1 / k of their variance
    assert share(errors["condition"], errors["mean"], 0.0)[0] == pytest.approx(-1 / each, abs=0.015)


def test_time_is_separated_from_the_label() -> None:
    make = torch.Generator().manual_seed(1)
    labels, noise = torch.arange(800) % 4, 0.1 * torch.randn(3, 2, 800, 8, generator=make)
    by_time, by_label = 2 * torch.randn(3, 1, 1, 8, generator=make), torch.randn(4, 8, generator=make)[labels]
    both = torch.randn(3, 4, 8, generator=make)[:, labels][:, None]  # a code of the label that changes with time
    fit = torch.arange(800) % 8 < 6
    shares = {}
    for name, features in {"sum": by_time + by_label + noise, "product": both + noise}.items():
        errors = fitted(Design.of_labels(labels), features.expand(3, 2, 800, 8), fit)
        shares[name] = {
            key: share(errors[key], errors["mean"], 1.0)[0] for key in ("time", "condition", "condition_time")
        }
    assert shares["sum"]["time"] + shares["sum"]["condition"] == pytest.approx(
        shares["sum"]["condition_time"], abs=0.01
    )
    assert shares["sum"]["condition_time"] > 0.98 and shares["product"]["condition_time"] > 0.98
    assert shares["product"]["time"] + shares["product"]["condition"] < 0.9


def test_target_that_does_not_vary_has_no_share() -> None:
    labels, features, fit = synthetic(80, 3)
    features[0, 1] = 0  # no difference between f_c and f_u
    errors = fitted(Design.of_labels(labels), features, fit)
    assert share(errors["condition"], errors["mean"], None) is None
    assert share(errors["condition"], errors["mean"], 7.0) == share(errors["condition"], errors["mean"], 0.0)


def test_text_is_regressed_as_by_scikit_learn() -> None:
    make = torch.Generator().manual_seed(2)
    vectors = torch.randn(300, 20, generator=make) * torch.linspace(0.1, 5, 20) + 2
    vectors[:, 3] = 1.5  # a channel that never varies
    fit = torch.arange(300) % 3 != 0
    readable = vectors @ torch.randn(20, 10, generator=make) + 0.5 * torch.randn(300, 10, generator=make)
    features = torch.stack([readable, torch.randn(300, 10, generator=make)])[None]
    errors = fitted(Design.of_vectors(vectors, fit), features, fit)
    x = np.delete(((vectors - vectors[fit].mean(dim=0)) / vectors[fit].std(dim=0, correction=0)).numpy(), 3, axis=1)
    possible = [
        Ridge(alpha=ridge * int(fit.sum())).fit(x[fit], readable[fit]).predict(x[~fit]) - readable[~fit].numpy()
        for ridge in RIDGES
    ]
    squares = [(residual**2).sum() for residual in possible]
    assert float(errors["condition"][:, 0].sum()) == pytest.approx(
        min(squares), rel=1e-3
    )  # nearly noiseless: least ridge
    assert share(errors["condition"], errors["mean"], 0.0)[0] > 0.99
    assert abs(share(errors["condition"], errors["mean"], None)[0]) < 0.03  # f_c - f_u is noise: shrunk to its mean
