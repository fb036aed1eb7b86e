"""`prepare --autoencoder values`: arrays of one to three spatial dimensions, stored exactly, resumable like pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.encoders.latent_space import UNSCALED
from selftrans.train.batches import Stream, to_batch
from selftrans.types import Conditions
from tests.support.pictures import contents, stopped_after

OPTIONS: dict[str, Any] = {
    "autoencoder": "values",
    "shard_size": 5,
    "batch_size": 2,
    "standardise": False,
    "progress": False,
}


def save(path: Path, *shape: int, count: int = 13, **arrays: np.ndarray) -> np.ndarray:
    data = (100 * np.random.default_rng(0).standard_normal((count, *shape))).astype(np.float32)
    np.savez_compressed(path, data=data, **arrays)
    return data


@pytest.mark.parametrize("shape", [(2, 40), (1, 6, 7), (3, 2, 4, 5)])
def test_values_are_stored_exactly(tmp_path: Path, shape: tuple[int, ...]) -> None:
    labels = np.arange(13) % 3
    data = save(tmp_path / "x.npz", *shape, labels=labels, classes=np.array(["a", "b", "c"]))
    manifest = prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)
    assert (manifest.shape, manifest.dtype, manifest.copies) == (shape, "float32", 1)
    assert manifest.resolution is None and manifest.image_channels is None and manifest.latent_space == UNSCALED
    assert manifest.conditions == Conditions("labels", 3) and manifest.classes == ("a", "b", "c")
    assert [shard.count for shard in manifest.shards] == [5, 5, 3]
    assert manifest.summary().startswith("13 samples, 3 classes: a, b, c")
    dataset = Dataset.open(tmp_path / "out", verify=True)
    assert np.array_equal(dataset.read(np.arange(13))["moments"][:, 0].numpy(), data)
    assert np.array_equal(dataset.labels, labels)
    loaded = next(Stream(dataset, batch_size=4, accumulate=1, seed=0).from_step(0))
    batch = to_batch(loaded, dataset, torch.device("cpu"))
    assert np.array_equal(batch.z0.numpy(), data[loaded.rows]), "latents are the values"
    assert torch.equal(batch.cond, torch.from_numpy(labels[loaded.rows]))  # type: ignore[arg-type]


def test_without_labels_there_is_no_condition(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", 1, 40)
    manifest = prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)
    assert manifest.conditions == Conditions("none") and not Dataset.open(tmp_path / "out").labels.any()


def test_interrupted_in_parts_and_continued_equals_uninterrupted(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", 2, 40, labels=np.arange(13) % 2)
    prepare(tmp_path / "x.npz", tmp_path / "complete", **OPTIONS)
    out = tmp_path / "out"
    for count in (3, 7):
        with stopped_after(count):
            prepare(tmp_path / "x.npz", out, **OPTIONS)
    assert len(list(out.glob("shard-*.json"))) == 1  # 3 stops inside the first shard, 7 inside the second
    for part in ("2/2", "1/2"):
        prepare(tmp_path / "x.npz", out, part=part, **OPTIONS)
    assert contents(out) == contents(tmp_path / "complete")
    (out / "shard-00001.safetensors").unlink()
    prepare(tmp_path / "x.npz", out, **OPTIONS)
    assert contents(out) == contents(tmp_path / "complete")


def test_other_values_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", 2, 40)
    prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)
    np.savez(tmp_path / "x.npz", data=np.zeros((13, 2, 40)))
    with pytest.raises(ValueError, match="was prepared from other samples; repeat the command as it was"):
        prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)


def test_samples_that_are_not_finite_stop_or_are_skipped(tmp_path: Path) -> None:
    data = save(tmp_path / "x.npz", 2, 40)
    data[6, 1, 3] = np.nan
    np.savez(tmp_path / "x.npz", data=data)
    with pytest.raises(ValueError, match=r"^sample 6 of x.npz: cannot be used \(NaN.*--skip-bad$"):
        prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)
    manifest = prepare(tmp_path / "x.npz", tmp_path / "out", skip_bad=True, **OPTIONS)
    assert manifest.count == 12 and [name for name, _ in manifest.skipped] == ["sample 6 of x.npz"]
    assert "1 unreadable sample left out" in manifest.summary()
    read = Dataset.open(tmp_path / "out", verify=True).read(np.arange(12))["moments"]
    assert np.array_equal(read[:, 0].numpy(), np.delete(data, 6, axis=0))


def test_half_precision_is_optional_and_checks_its_range(tmp_path: Path) -> None:
    data = save(tmp_path / "x.npz", 2, 40)
    prepare(tmp_path / "x.npz", tmp_path / "half", dtype="float16", **OPTIONS)
    read = Dataset.open(tmp_path / "half").read(np.arange(13))["moments"]
    assert np.array_equal(read[:, 0].numpy(), data.astype(np.float16))
    np.savez(tmp_path / "x.npz", data=data * 1e6)
    with pytest.raises(
        ValueError, match=r"sample 0 of x.npz: its moments are too large for float16; try --dtype float32"
    ):
        prepare(tmp_path / "x.npz", tmp_path / "out", dtype="float16", **OPTIONS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "8"], "--resolution is for pictures; leave it out"),
        (["--flip"], "--flip is for pictures; leave it out"),
        (["--features", "owner/vit"], "--features is for pictures; leave it out"),
    ],
)
def test_options_for_pictures_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    save(tmp_path / "x.npz", 2, 40)
    common = ["prepare", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), "--autoencoder", "values"]
    assert main([*common, *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main(common) == 0
    captured = capsys.readouterr()
    assert "13 samples, unconditional" in captured.out
    assert "2x40 latents: values, scaled to zero mean and unit variance (shift=" in captured.out
    assert "13/13" in captured.err and "samples/s" in captured.err


def test_features_of_values_are_refused(tmp_path: Path) -> None:
    from selftrans.data.prepare_features import prepare_features

    save(tmp_path / "x.npz", 2, 40)
    prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match="not pictures; a vision encoder cannot read them: omit --features"):
        prepare_features(tmp_path / "x.npz", tmp_path / "out", "owner/vit", progress=False)


def test_ignored_options_warn(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", 2, 40)
    with pytest.warns(UserWarning, match="precision bfloat16 is ignored: values needs no network"):
        prepare(tmp_path / "x.npz", tmp_path / "a", precision="bfloat16", **OPTIONS)
    with pytest.warns(UserWarning, match="label_column is ignored"):
        prepare(tmp_path / "x.npz", tmp_path / "b", label_column="x", **OPTIONS)


def test_values_refuse_pictures_and_other_sources(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="holds no array `data`"):
        prepare(tmp_path / "x.npz", tmp_path / "out", **OPTIONS)
    with pytest.raises(
        ValueError, match=r"x.npz is a file of arrays; pictures are read from their files"
    ):  # npz pictures are for evaluate only
        prepare(tmp_path / "x.npz", tmp_path / "out", progress=False)
    with pytest.raises(
        ValueError, match="autoencoder values reads an npz with an array `data`, or a folder of npy files"
    ):
        prepare("digits", tmp_path.with_name("out"), **OPTIONS)
    with pytest.raises(
        ValueError, match=r"no npy files in .*: --autoencoder values reads arrays, from npy files or one npz"
    ):
        prepare(tmp_path, tmp_path.with_name("out"), **OPTIONS)
