"""Features, probes and maps compared with scikit-learn and hand-made data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from selftrans.evaluate import plots, probes
from selftrans.evaluate.probes import pool
from selftrans.flow import COSINE
from selftrans.types import Output


class Stub(nn.Module):
    """Block k returns the tokens of x times k, plus the label."""

    depth, width, patch, shape = 3, 4, 1, (4, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[int, float, bool]] = []

    def forward(self, x: Tensor, t: Tensor, cond, *, taps: tuple[int, ...] = (), stop: bool = False) -> Output:
        self.calls.append((len(x), float(t[0]), stop))
        assert not torch.is_grad_enabled() and len(t) == len(x) == len(cond)
        tokens = self.dropout(x).flatten(start_dim=2).transpose(1, 2) * self.weight
        return Output(None, {k: tokens * k + cond[:, None, None] for k in taps})


def collected(**changes) -> dict[int, Tensor]:
    z0 = torch.randn(10, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    arguments = {"t": 0.3, "taps": (1, 3), "batch_size": 4} | changes
    return probes.collect(arguments.pop("backbone", Stub()), z0, torch.arange(10), **arguments)


def test_collect_runs_in_eval_mode_and_restores_the_mode() -> None:
    backbone = Stub().train()
    backbone.frozen.eval()
    feats = collected(backbone=backbone)
    assert list(feats) == [1, 3] and feats[1].shape == (10, 4, 4)
    labels = torch.arange(10)[:, None, None]
    torch.testing.assert_close((feats[1] - labels) * 3, feats[3] - labels)
    assert backbone.calls == [
        (4, pytest.approx(0.3), True),
        (4, pytest.approx(0.3), True),
        (2, pytest.approx(0.3), True),
    ]
    assert backbone.training and backbone.dropout.training and not backbone.frozen.training


def test_collect_adds_noise_along_the_path() -> None:
    z0 = torch.randn(10, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(10, 4, 2, 2, generator=torch.Generator().manual_seed(7))
    for path, expected in (
        (None, 0.7 * z0 + 0.3 * noise),
        (COSINE, np.cos(0.15 * np.pi) * z0 + np.sin(0.15 * np.pi) * noise),
    ):
        feats = collected(seed=7, **({"path": path} if path else {}))
        tokens = expected.flatten(start_dim=2).transpose(1, 2) + torch.arange(10)[:, None, None]
        torch.testing.assert_close(feats[1], tokens)


def test_collect_is_independent_of_batch_size_and_keeps_the_global_rng() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    runs = [collected(batch_size=size) for size in (1, 4, 256)]
    assert torch.equal(torch.rand(2), expected)
    for run in runs[1:]:
        torch.testing.assert_close(run[3], runs[0][3], rtol=0, atol=0)
    assert not torch.equal(collected(seed=1)[1], runs[0][1])


def test_pooled_features_are_the_means_over_tokens() -> None:
    whole, pooled = collected(), collected(pooled=True)
    for k in (1, 3):
        assert pooled[k].shape == (10, 4)
        torch.testing.assert_close(pooled[k], whole[k].mean(dim=1))


def test_collect_takes_named_conditions() -> None:
    class Named(Stub):
        def forward(self, x, t, cond, *, taps=(), stop=False):
            assert cond["mask"].shape == (len(x), 2)
            return super().forward(x, t, cond["label"], taps=taps, stop=stop)

    cond = {"label": torch.arange(10), "mask": torch.ones(10, 2)}
    z0 = torch.randn(10, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    feats = probes.collect(Named(), z0, cond, t=0.3, taps=(1, 3), batch_size=4)
    torch.testing.assert_close(feats[3], collected()[3])


def test_collect_refuses_times_out_of_range() -> None:
    with pytest.raises(ValueError, match="outside"):
        collected(t=1.5)


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_probe_accuracy_of_separable_and_random_labels(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    features = torch.randn(600, 5, 8, generator=generator)
    features[:, :, 7] = 4.0  # a constant feature

    def accuracy(x: Tensor) -> float:
        guesses = probes.class_guesses(x[:450], labels[:450], x[450:], kind=kind)
        return (guesses == labels[450:]).double().mean().item()

    assert 0.2 < accuracy(features) < 0.47  # chance is 1 / 3
    features[torch.arange(600), :, labels] += 100.0
    assert accuracy(features * 1e4 + 7) == 1.0


def test_rare_classes_may_leave_one_to_be_fitted_on() -> None:
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    answers = set()
    for rare in range(40):  # the row of the only picture of the second class
        labels = (torch.arange(40) == rare).long()
        can = probes.can_be_probed(labels)
        answers.add(can)
        if can:
            probes.linear_probe(features, labels)
        else:
            with pytest.raises(ValueError, match="at least two classes"):
                probes.linear_probe(features, labels)
    assert answers == {True, False}
    assert not probes.can_be_probed(torch.zeros(8)) and not probes.can_be_probed(torch.zeros(1))


def test_probe_is_tested_on_other_rows_than_it_is_fitted_on_and_is_repeatable() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    wide = torch.randn(
        200, 400, generator=torch.Generator().manual_seed(2)
    )  # it can fit any labels of the rows that it sees
    assert 0.25 < probes.linear_probe(wide, labels) < 0.75
    noisy = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.3, 1 - labels, labels)
    assert probes.linear_probe(x, noisy) == probes.linear_probe(x, noisy) != 1


def test_ridge_equals_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    from selftrans.evaluate.probes import ridge_guesses

    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0)).double()
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    y = (x[:, 0] + 0.3 * x[:, 1] > 0.2).long() + (x[:, 2] > 1).long()
    reference = Ridge(alpha=1e-2 * 80).fit(x.numpy(), torch.nn.functional.one_hot(y).double().numpy())
    np.testing.assert_array_equal(ridge_guesses(x, y, x).numpy(), reference.predict(x.numpy()).argmax(axis=-1))


def test_probe_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="two classes"):
        probes.linear_probe(torch.randn(20, 3), torch.zeros(20))


def spread(n: int = 6, seed: int = 0) -> Tensor:
    """Features (n, 9, 8) with the largest variance in the first three directions."""
    feats = torch.randn(n, 9, 8, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [9, 6, 4, 1, 1, 1, 1, 1.0]
    )
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]
    return feats @ rotation + 5


def test_components_span_the_subspace_of_scikit_learn() -> None:
    feats = spread(30)
    basis = probes.pca_basis(feats)
    reference = PCA(n_components=3).fit(feats.reshape(-1, 8).double().numpy())
    np.testing.assert_allclose(basis.mean.numpy(), reference.mean_, rtol=1e-9)
    np.testing.assert_allclose(np.abs(basis.components.numpy() @ reference.components_.T), np.eye(3), atol=1e-9)
    largest = basis.components.abs().argmax(dim=1)
    assert (basis.components[torch.arange(3), largest] > 0).all()


def test_maps_have_the_right_positions_and_scale() -> None:
    feats = spread()
    basis = probes.pca_basis(feats)
    maps = probes.pca_maps(feats, (3, 3))
    assert maps.shape == (6, 3, 3, 3) and maps.dtype == np.float32 and maps.min() == 0 and maps.max() == 1
    np.testing.assert_array_equal(maps, probes.pca_maps(feats, (3, 3), basis=basis))
    along = (feats[2, 5].double() - basis.mean) @ basis.components.T  # token 5 is row 1, column 2
    np.testing.assert_allclose(maps[2, 1, 2], ((along - basis.low) / (basis.high - basis.low)).clamp(0, 1), rtol=1e-5)
    assert not np.array_equal(
        probes.pca_maps(spread(seed=1), (3, 3), basis=basis), probes.pca_maps(spread(seed=1), (3, 3))
    )
    outlier = feats.clone()
    outlier[0, 0] += 1e5  # one outlier is clipped; the colours of the other tokens keep their range
    held = probes.pca_maps(outlier, (3, 3), basis=basis)
    np.testing.assert_array_equal(held[1:], maps[1:])


def test_maps_of_equal_tokens_are_grey() -> None:
    assert (probes.pca_maps(torch.full((2, 4, 5), 3.7), (2, 2)) == 0.5).all()


@pytest.mark.parametrize("grid", [(12,), (3, 4), (2, 3, 2)])
def test_maps_have_the_grid_of_the_tokens(grid: tuple[int, ...]) -> None:
    feats = torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(0))
    maps = probes.pca_maps(feats, grid)
    assert maps.shape == (5, *grid, 3)
    np.testing.assert_array_equal(maps.reshape(5, 12, 1, 3), probes.pca_maps(feats, (12, 1)))
    drawn = plots.pca_grid({"maps": maps}).axes[0].images[0].get_array()
    expected = {1: maps[0][None], 2: maps[0], 3: maps[0][len(maps[0]) // 2]}[len(grid)]  # a strip; the middle slice
    np.testing.assert_array_equal(drawn, expected)


def test_tsne_separates_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(40) % 2
    features = torch.randn(40, 3, 5, generator=generator) + 40.0 * torch.from_numpy(labels)[:, None, None]
    points = probes.tsne(features)
    assert points.shape == (40, 2)
    centres = np.stack([points[labels == k].mean(axis=0) for k in (0, 1)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(axis=-1)
    assert (nearest == labels).all()
    torch.testing.assert_close(pool(features), features.mean(dim=1))
    with pytest.raises(ValueError, match="too few for t-SNE"):
        probes.tsne(torch.randn(3, 5))
