"""The small classifier: accuracy, its file, global state; and the extractors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selftrans.evaluate import extractors as features
from selftrans.evaluate.classifier import (
    SmallClassifier,
    digits,
    digits_classifier,
    to_input,
    train_classifier,
    weights_sha256,
)
from selftrans.evaluate.extractors import load_extractor


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The file of the digit classifier, trained once for all tests."""
    path = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    digits_classifier(path)
    return path


def tiny(path: Path) -> Path:
    """An untrained classifier of 5x5x3 images, saved."""
    SmallClassifier(5, 3, 2, width=4, dim=6).save(path)
    return path


def rewrite(path: Path, change) -> Path:
    """The same file with header and tensors passed through `change(header, tensors)`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata=header)
    return path


def blobs(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the brighter half: left or right."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 60, (n, 6, 6, 3), dtype=np.uint8), np.arange(n) % 2
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 3] += 150
    return images, labels


def test_digits_are_the_real_scans() -> None:
    images, labels = digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    assert images.min() == 0 and images.max() == 255  # 16 grey levels over the range of a byte
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}
    assert labels[:10].tolist() == list(range(10))


def test_digit_classifier_is_accurate_on_held_out_digits(trained: Path) -> None:
    record = SmallClassifier.load(trained).training_record
    assert record is not None and record.accuracy > 0.97 and record.held_out == 359


def test_digit_classifier_is_cached_and_the_same(trained: Path) -> None:
    before = trained.stat().st_mtime_ns
    again = digits_classifier(trained)
    assert trained.stat().st_mtime_ns == before, "the file was read, not written again"
    assert [file.name for file in trained.parent.iterdir()] == [trained.name], "nothing half-written stays"
    x = to_input(digits()[0][:20])
    torch.testing.assert_close(again(x), SmallClassifier.load(trained)(x), rtol=0, atol=0)


def test_cache_of_another_seed_is_refused(trained: Path, tmp_path: Path) -> None:
    model = SmallClassifier.load(trained)
    model.training_record = dataclasses.replace(model.training_record, seed=3)
    model.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other data or another seed"):
        digits_classifier(tmp_path / "other.safetensors")


def test_training_is_repeatable_and_keeps_global_state() -> None:
    images, labels = blobs()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    state, threads = np.random.get_state()[1].copy(), torch.get_num_threads()  # noqa: NPY002 - the test is about that state
    runs = [train_classifier(images, labels, 2, epochs=2, width=4, dim=5, seed=1, threads=1) for _ in "ab"]
    assert torch.equal(torch.rand(3), expected)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.get_num_threads() == threads
    assert weights_sha256(runs[0]) == weights_sha256(runs[1])
    other = train_classifier(images, labels, 2, epochs=2, width=4, dim=5, seed=2, threads=1)
    assert weights_sha256(other) != weights_sha256(runs[0])


def test_separable_images_are_learnt_under_no_grad() -> None:
    images, labels = blobs(200)
    with torch.no_grad():
        model = train_classifier(images, labels, 2, epochs=6, batch_size=8, width=8, dim=16, threads=1)
    assert model.training_record is not None and model.training_record.accuracy == 1.0
    assert not model.training


@pytest.mark.parametrize("side", [1, 4, 5, 8, 13, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_is_built_and_run(side: int, channels: int) -> None:
    model = SmallClassifier(side, channels, 7, width=4, dim=9).eval()
    x = torch.randn(2, channels, side, side)
    assert model(x).shape == (2, 7) and model.features(x).shape == (2, 9)
    torch.testing.assert_close(model.head(model.features(x)), model(x))


@pytest.mark.parametrize("shape", [(2, 50), (1, 9, 14), (3, 2, 8, 5)])
def test_arrays_of_any_dimensions_are_learnt_stored_and_measured(tmp_path: Path, shape: tuple[int, ...]) -> None:
    generator, labels = np.random.default_rng(0), np.arange(80) % 2
    arrays = generator.normal(size=(80, *shape)).astype(np.float32) * 40 - 900  # far from unit variance
    arrays[labels == 1, 0] += 60
    model = train_classifier(arrays, labels, 2, epochs=8, batch_size=16, width=4, dim=6, threads=1)
    assert model.training_record is not None and model.training_record.accuracy == 1.0
    model.save(tmp_path / "c.safetensors")
    extractor = load_extractor(tmp_path / "c.safetensors")
    assert not extractor.pictures and extractor.head and extractor.sha256 == weights_sha256(model)
    assert extractor.name == "c classifier"
    model.save(tmp_path / "my-classifier.safetensors")
    assert load_extractor(tmp_path / "my-classifier.safetensors").name == "my-classifier", "not named twice"
    out = extractor(arrays)
    assert out["features"].shape == (80, 6) and (out["logits"].argmax(axis=-1) == labels).mean() > 0.95
    with pytest.raises(ValueError, match=r"^the c classifier takes .* arrays, these are"):
        extractor(arrays[..., :-1])


def test_pictures_that_are_not_square_are_learnt_and_stored(tmp_path: Path) -> None:
    labels = np.arange(60) % 2
    images = np.random.default_rng(0).integers(0, 99, (60, 6, 13, 1)).astype(np.uint8)
    images[labels == 1, :, 9:] += 150
    model = train_classifier(images, labels, 2, epochs=6, batch_size=8, width=4, dim=6, threads=1)
    assert model.training_record is not None and model.training_record.accuracy == 1.0
    model.save(tmp_path / "c.safetensors")
    assert SmallClassifier.load(tmp_path / "c.safetensors").resolution == (6, 13)
    assert (load_extractor(tmp_path / "c.safetensors")(images)["logits"].argmax(axis=-1) == labels).all()


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    images, labels = blobs()
    model = train_classifier(images, labels, 2, epochs=1, width=4, dim=5, threads=1)
    model.save(tmp_path / "new folder" / "ü.safetensors")
    loaded = SmallClassifier.load(tmp_path / "new folder" / "ü.safetensors")
    assert loaded.training_record == model.training_record
    assert weights_sha256(loaded) == weights_sha256(model)
    x = to_input(images)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.clear(), "not a classifier of this package"),
        (lambda h, t: h.update(format="selftrans.classifier/99"), "selftrans.classifier/99"),
        (lambda h, t: h.update(architecture="{"), "header .* damaged"),
        (lambda h, t: h.pop("training"), "header .* damaged"),
        (lambda h, t: h.update(training=json.dumps({"accuracy": 1})), "header .* damaged"),
        (lambda h, t: h.update(architecture=json.dumps({"resolution": 5})), "must name"),
        (lambda h, t: h.update(architecture=h["architecture"].replace("6", "-6")), "positive integers"),
        (lambda h, t: h.update(architecture=h["architecture"].replace("6", "[6]")), "positive integers"),
        (lambda h, t: h.update(architecture=h["architecture"].replace(" 5", " [5, 0]")), "positive integers"),
        (lambda h, t: h.update(architecture=h["architecture"].replace(" 5", " [5, 5, 5, 5]")), "4 sides"),
        (lambda h, t: h.update(architecture=h["architecture"].replace("}", ', "arrays": 1}')), "must name"),
        (lambda h, t: h.update(architecture=h["architecture"].replace("6", "1000000000")), "head.weight"),
        (lambda h, t: t.pop("head.bias"), "head.bias"),
        (lambda h, t: t.update(unexpected=torch.zeros(1)), "unexpected"),
        (lambda h, t: t.update({"head.bias": t["head.bias"].double()}), "head.bias"),
        (lambda h, t: t["head.bias"].fill_(float("nan")), "not finite in head.bias"),
    ],
)
def test_damaged_or_other_file_is_refused(tmp_path: Path, change, message: str) -> None:
    path = rewrite(tiny(tmp_path / "c.safetensors"), change)
    with pytest.raises(ValueError, match=message) as caught:
        SmallClassifier.load(path)
    assert "\n" not in str(caught.value)


def test_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SmallClassifier.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SmallClassifier.load(path)
    with pytest.raises(ValueError, match=r"no classifier file at .* `selftrans classifier` wrote"):
        SmallClassifier.load(tmp_path / "absent.safetensors")


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tiny(tmp_path / "c.safetensors")
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        SmallClassifier(5, 3, 2, width=8, dim=6).save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_one_image_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least two of each"):
        train_classifier(np.zeros((1, 6, 6, 3), np.uint8), np.array([0]), 2)


def test_digits_extractor_by_name_and_by_file(trained: Path) -> None:
    named, filed = load_extractor("digits", weights=trained), load_extractor(trained)
    assert named.name == filed.name == "digits classifier" and named.sha256 == filed.sha256 and named.dim == 64
    images, labels = digits()
    out = named(images[:200])
    assert out["features"].shape == (200, 64) and out["logits"].shape == (200, 10)
    assert (out["logits"].argmax(axis=-1) == labels[:200]).mean() > 0.97


def test_images_of_another_size_are_refused(trained: Path) -> None:
    extractor = load_extractor(trained)
    with pytest.raises(ValueError, match="takes 8x8x1 images, these are 8x8x3"):
        extractor(np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="these are 32x32x1"):
        extractor(np.zeros((2, 32, 32, 1), np.uint8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("incepton", "did you mean inception"),
        ("digit", "did you mean digits"),
        ("clip", "choose from digits, inception, values"),
        ("absent.safetensors", "no classifier file"),
    ],
)
def test_unknown_features_suggest_a_remedy(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_extractor(name)


class FakeInception(torch.nn.Module):
    """The interface of torch-fidelity, with mean colours as features."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"] and feature_extractor_weights_path is not None
        self.path = feature_extractor_weights_path
        self.Mixed_6d = torch.nn.Module()
        self.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 192, kernel_size=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        colours = x.float().mean(dim=(2, 3))
        self.Mixed_6d.branch1x1(x.float()[:, :, :2, :3])
        return torch.nn.functional.pad(colours, (0, 2045)), torch.nn.functional.pad(colours, (0, 1005))


@pytest.fixture
def inception(monkeypatch, tmp_path: Path) -> Path:
    """A fake torch-fidelity, and a file whose hash is patched in as the published one."""
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"published")
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"published").hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return weights


def test_inception_features_of_torch_fidelity(inception: Path) -> None:
    extractor = load_extractor("inception", weights=inception)
    assert (extractor.name, extractor.dim) == ("inception", 2048) and extractor.sha256 == features.INCEPTION_SHA256
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 2] = 7
    out = extractor(images)
    assert out["features"].shape == (2, 2048) and out["logits"].shape == (2, 1008)
    assert out["features"][1, :4].tolist() == [0, 0, 7, 0]  # channels stay channels
    assert load_extractor(inception).sha256 == extractor.sha256
    branch = extractor.module.Mixed_6d.branch1x1  # type: ignore[attr-defined]
    kept = branch(torch.from_numpy(images).float().permute(0, 3, 1, 2)[:, :, :2, :3])[1]  # (192, 2, 3)
    by_hand = [kept[c, i, j].item() for i in range(2) for j in range(3) for c in range(7)]
    assert out["spatial"].shape == (2, 42) and out["spatial"][1].tolist() == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="3 channels"):
        extractor(np.zeros((2, 4, 4, 1), np.uint8))


def test_inception_uses_the_hub_cache(inception: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE
    cached.parent.mkdir(parents=True)
    inception.rename(cached)
    assert load_extractor("inception").module.path == str(cached)  # type: ignore[attr-defined]


def test_inception_without_weights_names_the_remedy(inception: Path, monkeypatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(no network\).*--features path/to/weights-") as caught:
        load_extractor("inception")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no inception weights at .*absent"):
        load_extractor("inception", weights="absent.pth")


def test_other_weights_than_inceptions_are_refused_unopened(inception: Path) -> None:
    inception.write_bytes(b"other weights, or a pickle that runs code")
    with pytest.raises(ValueError, match="is not the published inception"):
        load_extractor("inception", weights=inception)


@pytest.mark.parametrize("error", [ImportError("No module named 'torch_fidelity'"), RuntimeError("torchvision::nms")])
def test_inception_without_torch_fidelity_names_the_package(monkeypatch, error: Exception) -> None:
    class FailingImport:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[0] == "torch_fidelity":
                raise error

    monkeypatch.setattr(sys, "meta_path", [FailingImport(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"pip install 'selftrans\[eval\]'.*--features") as caught:
        load_extractor("inception")
    assert "\n" not in str(caught.value)
    assert ("with torchvision from the index that torch came from" in str(caught.value)) == isinstance(
        error, RuntimeError
    )


@pytest.mark.parametrize("shape", [(2, 5), (1, 3, 4), (2, 2, 2, 2)])
def test_values_extractor_returns_the_flattened_values(shape: tuple[int, ...]) -> None:
    extractor = load_extractor("values", shape=shape)
    arrays = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    features = extractor(arrays)["features"]
    assert features.dtype == np.float64 and features.shape == (4, extractor.dim) and "logits" not in extractor(arrays)
    np.testing.assert_array_equal(features, arrays.reshape(4, -1))
    text = "values " + "x".join(map(str, shape))
    assert extractor.name == "values" and extractor.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_values_extractor_refuses_unsupported_shapes() -> None:
    assert load_extractor("values", shape=(4, 1024)).dim == 4096
    with pytest.raises(ValueError, match=r"images of 1x4097 are 4,097 values.*at most 4,096"):
        load_extractor("values", shape=(1, 4097))
    with pytest.raises(ValueError, match="images of 2x3 cannot be compared with images of 3x2"):
        load_extractor("values", shape=(3, 2))(np.zeros((1, 2, 3), np.float32))
