"""Streamed mean and covariance compared with numpy, and their file format."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from selftrans.evaluate import extractors
from selftrans.evaluate.extractors import rebatch
from selftrans.evaluate.statistics import MAX_UNPACKED, Moments, RunningMoments, Statistics
from tests.support.memory import traced_peak


class Pixels:
    """Features are the pixels, or `change` of them."""

    name, sha256, dim, pictures = "pixels", "0" * 64, 12, True

    def __init__(self, change=lambda x: x, spatial: bool = False) -> None:
        self.change, self.spatial, self.sizes = change, spatial, []

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.sizes.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float32)
        return {"features": self.change(flat)} | ({"spatial": flat[:, :3] * 2} if self.spatial else {})


def pictures(n: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 2, 2, 3), dtype=np.uint8)


def batches_of(images: np.ndarray, size: int) -> list[np.ndarray]:
    return [images[i : i + size] for i in range(0, len(images), size)]


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_mean_and_covariance_equal_numpy(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "CHUNK", size)
    images = pictures()
    flat = images.reshape(100, -1).astype(np.float64)
    found = Statistics.of(iter(batches_of(images, size)), Pixels())
    np.testing.assert_allclose(found.mean, flat.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.cov, np.cov(flat, rowvar=False), rtol=1e-10, atol=1e-10)
    assert found.count == 100 and found.extractor == "pixels" and found.dim == 12
    np.testing.assert_array_equal(found.features, flat)


def test_statistics_are_bit_identical_for_every_batch_size() -> None:
    images = pictures()
    runs = [Statistics.of(batches_of(images, size), Pixels()) for size in (1, 3, 64, 99)] + [
        Statistics.of(images, Pixels())
    ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.cov, runs[0].cov)
        np.testing.assert_array_equal(run.mean, runs[0].mean)


def test_large_means_do_not_cause_cancellation() -> None:
    rows = np.random.default_rng(1).normal(size=(1000, 3)) + 1e8
    running = RunningMoments()
    for i in range(0, 1000, 13):
        running.update(rows[i : i + 13])
    np.testing.assert_allclose(running.moments().cov, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-8)


def test_chunks_are_full_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "CHUNK", 5)
    images, extractor = pictures(23), Pixels()
    Statistics.of([images[:1], images[1:1], images[1:15], images[15:]], extractor)
    assert extractor.sizes == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.concatenate(list(rebatch(batches_of(images, 4), 6))), images)


def test_gpu_takes_larger_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu, sizes in ((False, [64, 64, 64, 64, 44]), (True, [300])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        extractor = Pixels()
        Statistics.of(pictures(300), extractor)
        assert extractor.sizes == sizes


def test_observe_receives_features_in_order() -> None:
    seen: list[np.ndarray] = []
    found = Statistics.of(pictures(), Pixels(), keep=False, observe=lambda out: seen.append(out["features"]))
    assert found.features is None
    np.testing.assert_array_equal(np.concatenate(seen), pictures().reshape(100, -1))


def test_statistics_are_read_back_from_their_file(tmp_path: Path) -> None:
    written = Statistics.of(pictures(), Pixels(spatial=True), source="hundred pictures")
    written.save(tmp_path / "deep" / "stats.npz")
    read = Statistics.load(tmp_path / "deep" / "stats.npz")
    for name in ("mean", "cov", "features"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert (read.count, read.extractor, read.sha256, read.source) == (100, "pixels", "0" * 64, "hundred pictures")
    assert read.features is not None and read.features.dtype == np.float32
    assert read.spatial is not None and written.spatial is not None
    np.testing.assert_allclose(read.spatial.cov, np.cov(written.features[:, :3] * 2.0, rowvar=False), rtol=1e-10)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["stats.npz"]
    with np.load(tmp_path / "deep" / "stats.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)


def test_adms_files_are_read(tmp_path: Path) -> None:
    cov = np.eye(4) + 0.5
    np.savez(
        tmp_path / "VIRTUAL.npz", arr_0=pictures(), mu=np.arange(4.0), sigma=cov, mu_s=np.zeros(2), sigma_s=np.eye(2)
    )
    read = Statistics.load(tmp_path / "VIRTUAL.npz")
    np.testing.assert_array_equal(read.cov, cov)
    assert read.count is None and read.features is None and read.sha256 == "" and read.source == "VIRTUAL.npz"
    assert isinstance(read.spatial, Moments)


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **arrays: object) -> None:
        np.savez(tmp_path / "s.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message) as caught:
            Statistics.load(tmp_path / "s.npz")
        assert "\n" not in str(caught.value)

    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    refused("holds arr_0, not mu and sigma", arr_0=pictures())
    refused("do not match", mu=np.zeros(3), sigma=np.eye(4))
    refused("not finite", mu=np.zeros(3), sigma=np.eye(3) * np.nan)
    refused("not symmetric", mu=np.zeros(3), sigma=np.triu(np.ones((3, 3))))
    refused("negative eigenvalues, which is impossible", mu=np.zeros(3), sigma=-np.eye(3))
    refused("negative eigenvalues", mu=np.zeros(3), sigma=np.diag([1.0, 1.0, -0.01]))
    refused("negative eigenvalues", **good, mu_s=np.zeros(2), sigma_s=np.array([[1.0, 2.0], [2.0, 1.0]]))
    refused("holds features", **good, count=np.int64(5), features=np.zeros((4, 3), np.float32))
    refused("not a readable npz", mu=np.array([{"a": "pickle"}], dtype=object), sigma=np.eye(1))
    truncated = tmp_path / "truncated.npz"
    np.savez(truncated, **good)
    truncated.write_bytes(truncated.read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a readable npz"):
        Statistics.load(truncated)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not a readable npz"):
        Statistics.load(tmp_path / "one.npy")
    with pytest.raises(ValueError, match="no statistics at"):
        Statistics.load(tmp_path / "absent.npz")


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e70])
def test_singular_covariances_with_rounding_are_read(tmp_path: Path, scale: float) -> None:
    rows = np.random.default_rng(2).normal(size=(20, 300)) * np.linspace(30, 0, 300)
    cov = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(cov.astype(np.float64))[0] < 0
    np.savez(tmp_path / "s.npz", mu=np.zeros(300), sigma=cov.astype(np.float64) * scale)
    np.testing.assert_array_equal(Statistics.load(tmp_path / "s.npz").cov, cov.astype(np.float64) * scale)


def test_strongly_compressed_statistics_are_refused_unread(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("mu.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f8", "fortran_order": False, "shape": (MAX_UNPACKED // 8,)}
            )
            for _ in range(MAX_UNPACKED >> 20):
                file.write(bytes(1 << 20))
        archive.writestr("sigma.npy", b"")

    def load(_: int) -> None:
        with pytest.raises(ValueError, match=r"not a readable npz of plain arrays \('mu.npy' expands to \d+ bytes\)"):
            Statistics.load(tmp_path / "bomb.npz")

    assert traced_peak(load) < 1 << 24


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "0 images have no covariance"),
        ([pictures(1)], "1 image has no covariance"),
        ([pictures().astype(np.float32)], "pixels takes pictures, uint8 .*use --features values"),
        ([pictures(2), np.zeros((1, 2, 2, 1), np.uint8)], "two sizes, 2x2x3 and 2x2x1"),
    ],
)
def test_invalid_images_are_refused(batches: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statistics.of(batches, Pixels())


def test_reference_of_one_image_is_named() -> None:
    with pytest.raises(ValueError, match=r"^scans/test: 1 image has no covariance; give at least two$"):
        Statistics.of(pictures(1), Pixels(), source="scans/test")


def test_pictures_of_several_sizes_are_taken_in_chunks_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "CHUNK", 8)
    other = np.random.default_rng(1).integers(0, 256, (5, 1, 4, 3), dtype=np.uint8)  # 12 values, too
    measuring = Pixels()
    found = Statistics.of([pictures(10), other, other], measuring)
    flat = np.concatenate([pictures(10).reshape(10, 12), *[other.reshape(5, 12)] * 2]).astype(np.float64)
    np.testing.assert_allclose(found.mean, flat.mean(axis=0))
    np.testing.assert_allclose(found.cov, np.cov(flat, rowvar=False))
    assert measuring.sizes == [8, 2, 8, 2] and found.count == 20


def test_invalid_features_name_the_image() -> None:
    def poison(x: np.ndarray) -> np.ndarray:
        return np.where((x == pictures()[70].reshape(-1)).all(axis=-1, keepdims=True), np.nan, x)

    with pytest.raises(ValueError, match="not finite for image 70"):
        Statistics.of(pictures(), Pixels(poison))
