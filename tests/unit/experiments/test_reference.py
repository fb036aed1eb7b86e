"""Statistics of references: computed once, kept in a file, and used only for what they were computed of."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.data import decoded
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.prepare import prepare
from selftrans.encoders.autoencoder import load_autoencoder, to_uint8
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.evaluate.extractors import ClassifierExtractor, Extractor, ValuesExtractor
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments import evaluate_samples as scores
from selftrans.experiments import reference
from selftrans.experiments.comparison.measurement import Measurement, measure_checkpoint
from tests.support import toy
from tests.support.pictures import class_folders, save_vae
from tests.support.toy import quick  # noqa: F401 - a fixture

VALUES = ValuesExtractor((8, 8, 3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def scorer() -> ClassifierExtractor:
    return ClassifierExtractor(SmallClassifier(8, 1, 10), "scorer classifier")


def grey(path: Path, count: int = 24) -> Path:
    path.mkdir()
    for k in range(count):
        array = np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(array).save(path / f"{k}.png")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 23 pictures, a VAE, and the latents of the pictures in `data`."""
    root = tmp_path_factory.mktemp("latents")
    vae = save_vae(root / "vae")
    prepare(class_folders(root / "pictures"), root / "data", autoencoder=vae, dtype="float32", progress=False)
    return root


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures, prepared as they are."""
    return toy.prepared(tmp_path_factory.mktemp("pixels"))


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Dataset]:
    """The data sets that were decoded, one entry each time."""
    found: list[Dataset] = []

    def counting(dataset: Dataset, *args: object, **options: object) -> object:
        found.append(dataset)
        return decoded_images(dataset, *args, **options)

    monkeypatch.setattr(reference, "decoded_images", counting)
    return found


def training(data: Path, folder: Path | None, extractor: Extractor = VALUES, dtype: torch.dtype = torch.float32):
    return reference.training_statistics(Dataset.open(data), extractor, dtype=dtype, folder=folder)


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert np.array_equal(a.mean, b.mean) and np.array_equal(a.cov, b.cov)
    assert (a.count, a.sha256, a.source, a.extractor) == (b.count, b.sha256, b.source, b.extractor)


# ---- of a comparison


def test_distance_to_kept_statistics_is_the_same_to_the_last_bit(tmp_path: Path, decodings: list[Dataset]) -> None:
    def point(kept: Path | None) -> dict:
        measurement = Measurement.of(toy.toy(), "values", weights=None, images=20, block=2, kept=kept)
        return measure_checkpoint(toy.checkpoint(toy.finished()), measurement)

    anew, first, again = point(None), point(tmp_path), point(tmp_path)
    assert anew == first == again and len(decodings) == 2 and len(list(tmp_path.glob("reference-*.npz"))) == 1


def test_kept_statistics_are_of_the_decoded_means(made: Path, tmp_path: Path) -> None:
    pictures = np.concatenate(list(decoded_images(Dataset.open(made / "data")))).reshape(23, -1).astype(np.float64)
    first, again = training(made / "data", tmp_path), training(made / "data", tmp_path)
    assert_equal(first, again)
    np.testing.assert_allclose(again.mean, pictures.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(again.cov, np.cov(pictures, rowvar=False), rtol=1e-9, atol=1e-9)


def changed(**fields: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        dataclasses.replace(Statistics.load(file), **fields).save(file)

    return change


def one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


#: what a file may be that is not the one that was kept
SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "one bit": one_bit,
    "other arrays": lambda file: np.savez(file, arr_0=np.zeros(3)),
    "pickled": lambda file: np.savez(file, mu=np.array([{}]), sigma=np.eye(1)),
    "of other data": changed(source="training data [" + 40 * "0" + "]"),
    "of another extractor": changed(sha256="0" * 64),
    "of fewer images": changed(count=9),
    "of other features": changed(mean=np.zeros(3), cov=np.eye(3)),
    "a folder": a_folder,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_damaged_and_foreign_files_are_not_used(
    pixels: Path, tmp_path: Path, decodings: list[Dataset], spoil: Callable[[Path], object]
) -> None:
    first = training(pixels, tmp_path)
    (file,) = tmp_path.glob("reference-*.npz")
    sound = Statistics.load(file)
    spoil(file)
    assert_equal(training(pixels, tmp_path), first)
    assert len(decodings) == 2 and not list(tmp_path.glob(".reference-*"))
    if file.is_file():
        assert_equal(Statistics.load(file), sound)


def other_data(made: Path) -> Statistics:
    folders, other = class_folders(made / "other-pictures", 22), made / "other"
    prepare(folders, other, autoencoder=str(made / "vae"), dtype="float32", progress=False)
    return training(other, made)


def other_weights(made: Path) -> Statistics:
    save_vae(made / "vae", seed=1)
    return training(made / "data", made)


OTHER: dict[str, Callable[[Path], Statistics]] = {
    "data": other_data,
    "extractor": lambda made: training(made / "data", made, ClassifierExtractor(SmallClassifier(8, 3, 2), "other")),
    "precision": lambda made: training(made / "data", made, dtype=torch.bfloat16),
    "weights of the decoder": other_weights,
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER.keys())
def test_other_measurements_have_other_statistics(
    tmp_path: Path, made: Path, decodings: list[Dataset], other: Callable[[Path], Statistics]
) -> None:
    vae = save_vae(tmp_path / "vae")
    prepare(made / "pictures", tmp_path / "data", autoencoder=vae, dtype="float32", progress=False)
    first, second = training(tmp_path / "data", tmp_path), other(tmp_path)
    assert not np.array_equal(first.mean, second.mean), "and so has the file"
    assert len(decodings) == 2 and len(list(tmp_path.glob("reference-*.npz"))) == (1 if other is other_weights else 2)
    if other is not other_weights:
        assert_equal(training(tmp_path / "data", tmp_path), first)
        assert len(decodings) == 2, "the first ones are still there"


def test_statistics_are_found_where_data_and_folder_were_moved(
    made: Path, tmp_path: Path, decodings: list[Dataset]
) -> None:
    first = training(made / "data", tmp_path / "one")
    shutil.copytree(made / "data", tmp_path / "data")
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert_equal(training(tmp_path / "data", tmp_path / "two"), first)
    assert len(decodings) == 1


def test_kept_statistics_need_no_autoencoder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = save_vae(tmp_path / "vae")
    prepare(made / "pictures", tmp_path / "data", autoencoder=vae, dtype="float32", progress=False)
    first, kept = training(tmp_path / "data", tmp_path), reference.reference_of(tmp_path / "data", VALUES)
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "load_autoencoder", lambda *_, **__: pytest.fail("the autoencoder was loaded"))
        for moved in (False, True):
            if moved:
                shutil.move(vae, tmp_path / "elsewhere")
            assert_equal(training(tmp_path / "data", tmp_path), first)
            assert_equal(reference.reference_of(tmp_path / "data", VALUES), kept)
    with pytest.raises(ValueError, match=r"^no autoencoder '[^\n]*vae'[^\n]*$"):
        training(tmp_path / "data", None)


def test_autoencoder_of_the_hub_is_compared_by_its_files_in_the_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "commit"
    shutil.copytree(made / "vae", snapshot / "vae")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("commit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert reference.decoder_sha256("owner/name/vae") == reference.decoder_sha256(str(made / "vae")) != ""
    assert {
        reference.decoder_sha256(name) for name in ("owner/other", "owner/name", "/no/folder", "a/b..", "pixel")
    } == {""}


def test_folder_that_cannot_be_written_keeps_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    assert training(made / "data", tmp_path / "file").count == 23


# ---- of `selftrans evaluate`


def test_reference_at_a_url_is_that_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    extractor, url = ValuesExtractor((8, 8, 1)), toy.digits().as_uri()
    local = reference.reference_of(toy.digits(), extractor)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    found = reference.reference_of(url, extractor)
    assert np.array_equal(found.mean, local.mean) and np.array_equal(found.cov, local.cov) and found.source == url
    monkeypatch.setattr(reference, "decoded_images", None)
    assert np.array_equal(reference.reference_of(url, extractor).cov, local.cov)  # from the cache


def test_reference_is_computed_once(tmp_path: Path, monkeypatch) -> None:
    real, one = grey(tmp_path / "real"), scorer()
    first = reference.reference_of(real, one)
    (kept,) = reference.cache().iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(reference, "iter_images", lambda path: pytest.fail("computed again"))
        again = reference.reference_of(real, one)
    assert np.array_equal(first.cov, again.cov) and np.array_equal(first.features, again.features)
    kept.write_bytes(b"damaged")
    assert np.array_equal(reference.reference_of(real, one).cov, first.cov)
    other = ClassifierExtractor(SmallClassifier(8, 1, 10), "other")
    assert not np.array_equal(reference.reference_of(real, other).mean, first.mean), (
        "another extractor, other statistics"
    )
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(real / "0.png")
    assert not np.array_equal(reference.reference_of(real, one).mean, first.mean), "a picture has changed"
    assert len(list(reference.cache().iterdir())) == 3


def test_reference_of_latents_is_decoded_deterministically_and_reported(made: Path, tmp_path: Path) -> None:
    data, vae = tmp_path / "data", str(made / "vae")
    shutil.copytree(made / "data", data)
    shards = Dataset.open(data)
    first, again = (np.concatenate(list(decoded_images(shards))) for _ in range(2))
    assert np.array_equal(first, again), "whatever was drawn in between"
    mean = shards.read(np.arange(23))["moments"][:, 0, :2]
    expected = to_uint8(load_autoencoder(vae).decode(mean * 0.5)).numpy()
    assert np.array_equal(first, expected)
    SmallClassifier(8, 3, 2).save(tmp_path / "rgb.safetensors")
    report = scores.evaluate_samples(
        made / "pictures", data, str(tmp_path / "rgb.safetensors"), out=tmp_path / "r.json"
    )
    assert report["reference"] == f"{data}, decoded by {vae}"
    assert f"against {data}, decoded by {vae} (23" in scores.text(report)
    pixels = toy.prepared(tmp_path / "toy", classes=())
    assert reference.described(pixels) == str(pixels), "pixels are as they were"


def test_reference_of_latents_is_that_of_the_decoder_at_hand(tmp_path: Path, made: Path) -> None:
    vae = save_vae(tmp_path / "vae")
    prepare(made / "pictures", tmp_path / "data", autoencoder=vae, dtype="float32", progress=False)
    first = reference.reference_of(tmp_path / "data", VALUES)
    save_vae(tmp_path / "vae", seed=1)  # the data keep its name
    assert not np.array_equal(reference.reference_of(tmp_path / "data", VALUES).mean, first.mean)


def test_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert reference.reference_of(grey(tmp_path / "real"), scorer()).count == 24
