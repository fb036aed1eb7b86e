"""`prepare`: stored moments are those of the autoencoder, also after interruption, repetition and damage."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import selftrans.data.prepare as prepare_module
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.encode_captions import TextOptions
from selftrans.data.manifest import Manifest
from selftrans.data.prepare import prepare, prepare_builtin
from selftrans.data.prepare_features import prepare_features
from selftrans.data.prepare_options import PrepareOptions
from selftrans.data.sources.open_source import open_source
from selftrans.encoders.autoencoder import from_uint8, to_uint8
from selftrans.encoders.latent_space import LatentSpace
from selftrans.types import Batch
from tests.support.pictures import class_folders, contents, save_vae, stopped_after


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "my pictures")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae"))


def test_missing_relative_data_name_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"no manifest.json in data/x (below {tmp_path}): not prepared")):
        Dataset.open("data/x")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pixels_are_stored_exactly(pictures: Path, tmp_path: Path, dtype: str) -> None:
    manifest = prepare(pictures, tmp_path / "out", shard_size=10, batch_size=4, dtype=dtype, flip=True, progress=False)
    assert (manifest.count, manifest.shape, manifest.copies, manifest.resolution) == (23, (3, 8, 8), 2, 8)
    assert [shard.count for shard in manifest.shards] == [10, 10, 3] and manifest.classes == ("cat", "wild dog")
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["manifest.json", *(f"shard-{k:05d}.safetensors" for k in range(3))]
    )
    tensors = Dataset.open(tmp_path / "out", verify=True).read(np.arange(23))
    moments, labels = tensors["moments"], tensors["labels"]
    source = open_source(pictures)
    expected = torch.from_numpy(np.stack([source.read(i) for i in range(23)]))
    assert torch.equal(to_uint8(moments[:, 0]), expected)
    assert torch.equal(to_uint8(moments[:, 1]), expected.flip(dims=(2,)))  # mirrored left to right
    assert torch.equal(moments[:, 0], from_uint8(expected).to(moments.dtype))  # as from the pixel autoencoder
    assert labels.tolist() == source.labels.tolist()


def test_options_by_keyword_replace_those_of_a_record(pictures: Path, tmp_path: Path) -> None:
    options = PrepareOptions(shard_size=10, flip=True, progress=False)
    record = prepare(pictures, tmp_path / "a", options, shard_size=9)
    assert record == prepare(pictures, tmp_path / "b", shard_size=9, flip=True, progress=False)
    assert record.copies == 2 and len(record.shards) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'mirror'"):
        prepare(pictures, tmp_path / "c", options, mirror=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"precision": "fp32"}, "precision 'fp32' is not one of float32"),
        ({"batch_size": 0}, "batch_size 0 and shard_size 8192 should be 1 or more"),
        ({"part": "3/2"}, "I/N with I from 1 to N"),
    ],
)
def test_option_out_of_range_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareOptions(**option)


def test_the_name_of_a_text_encoder_becomes_options() -> None:
    assert PrepareOptions(text="minilm").text == TextOptions("minilm")  # type: ignore[arg-type]


def test_pictures_that_are_not_square(pictures: Path, tmp_path: Path, vae: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "batch_size": 8, "flip": True, "progress": False}
    plain = prepare(pictures, tmp_path / "pixels", resolution=(4, 6), **options)
    assert (plain.shape, plain.resolution) == ((3, 4, 6), (4, 6)) and "pictures of 4x6" in plain.summary()
    assert prepare(pictures, tmp_path / "pixels", resolution=(4, 6), **options) == plain, "the manifest is read again"
    with pytest.raises(ValueError, match=r"was prepared with resolution 4x6, not 6; repeat the command as it was"):
        prepare(pictures, tmp_path / "pixels", resolution=6, **options)
    with pytest.raises(ValueError, match=r"holds pictures of 4x6, which are not square; .*: omit --features"):
        prepare_features(pictures, tmp_path / "pixels", "owner/vit", progress=False)
    moments = Dataset.open(tmp_path / "pixels").read(np.arange(23))["moments"]
    source = open_source(pictures, resolution=(4, 6))
    assert torch.equal(to_uint8(moments[5:6, 0])[0], torch.from_numpy(source.read(5)))
    manifest = prepare(pictures, tmp_path / "latents", resolution=(4, 6), autoencoder=vae, **options)
    assert manifest.shape == (2, 2, 3)
    images = next(decoded_images(Dataset.open(tmp_path / "latents"), device="cpu"))
    assert images.shape == (23, 4, 6, 3) and images.dtype == np.uint8
    with pytest.raises(
        ValueError, match=r"^resolution 4x7 is not a multiple of 2, as .* needs; give another --resolution$"
    ):
        prepare(pictures, tmp_path / "other", resolution=(4, 7), autoencoder=vae, **options)


def test_vae_moments_are_stored_and_sampled_at_each_read(pictures: Path, tmp_path: Path, vae: str) -> None:
    from diffusers import AutoencoderKL

    options = {"autoencoder": vae, "flip": True, "dtype": "float32", "batch_size": 8, "progress": False}
    manifest = prepare(pictures, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert (manifest.shape, manifest.latent_space) == ((2, 4, 4), LatentSpace(0.0, 0.5, stochastic=True))
    assert manifest.autoencoder == vae and manifest.moments_shape == (2, 4, 4, 4)
    moments = Dataset.open(tmp_path / "out").read(np.arange(23))["moments"]
    pixels = from_uint8(torch.from_numpy(open_source(pictures).read(5))[None])
    with torch.no_grad():
        posteriors = AutoencoderKL.from_pretrained(vae).encode(torch.cat([pixels, pixels.flip(dims=(3,))])).latent_dist
    torch.testing.assert_close(moments[5, :, :2], posteriors.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments[5, :, 2:], posteriors.std, atol=1e-5, rtol=1e-5)
    first, second = (manifest.latent_space.sample(moments[:, 0]) for _ in range(2))
    assert Batch(first, torch.zeros(23)).z0.shape == (23, 2, 4, 4) and not torch.equal(first, second)


@pytest.mark.parametrize("autoencoder", ["pixel", "vae"])
def test_interrupted_and_continued_equals_uninterrupted(
    pictures: Path, tmp_path: Path, vae: str, autoencoder: str
) -> None:
    options = {
        "autoencoder": vae if autoencoder == "vae" else "pixel",
        "shard_size": 5,
        "batch_size": 2,
        "progress": False,
    }
    prepare(pictures, tmp_path / "complete", **options)  # type: ignore[arg-type]
    out = tmp_path / "parts"
    for count in (3, 7, 1, 9):  # 3 and 1 stop inside a shard, which is discarded
        with stopped_after(count):
            prepare(pictures, out, **options)  # type: ignore[arg-type]
        assert not (out / "manifest.json").exists() and not list(out.glob(".*.tmp"))
        with pytest.raises(ValueError, match="not prepared or not finished"):
            Dataset.open(out)
    assert len(list(out.glob("shard-*.json"))) == 2  # from 7, then from 9: no shard is made twice
    prepare(pictures, out, **options)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "complete")


def test_prepare_killed_between_writes_continues(pictures: Path, tmp_path: Path) -> None:
    """After a process dies at a rename, the next call produces the same bytes."""
    prepare(pictures, tmp_path / "complete", shard_size=12, progress=False)
    script = (
        "import os, sys; replace, left = os.replace, [int(sys.argv[3])]\n"
        "def dying(a, b):\n"
        "    left[0] -= 1\n"
        "    os._exit(9) if left[0] < 0 else replace(a, b)\n"
        "os.replace = dying\n"
        "from selftrans.data.prepare import prepare\n"
        "prepare(sys.argv[1], sys.argv[2], shard_size=12, progress=False)"
    )
    out, codes = tmp_path / "out", []
    for renames in (2, 2):  # between the first shard and its record, then before the second shard
        codes.append(
            subprocess.run([sys.executable, "-c", script, pictures, out, str(renames)], check=False).returncode
        )
        assert list(out.glob(".*.tmp"))
    prepare(pictures, out, shard_size=12, progress=False)
    assert codes == [9, 9] and contents(out) == contents(tmp_path / "complete")


def test_repeating_a_complete_preparation_writes_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare(pictures, tmp_path / "out")
    shown = capsys.readouterr()
    assert shown.out == "" and "23/23" in shown.err and "pictures/s" in shown.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(prepare_module, "load_autoencoder", None)  # must not be called
    pictures.rename(tmp_path / "elsewhere")  # the same pictures at another path
    assert prepare(tmp_path / "elsewhere", tmp_path / "out") == manifest
    assert "is complete already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": True}, "with flip False, not True"),
        ({"dtype": "float32"}, "with dtype float16, not float32"),
        ({"shard_size": 6}, "with shard_size 5, not 6"),
        ({"resolution": 16}, "without resolution, not with 16"),
        ({"source": "digits"}, "from other pictures"),
    ],
)
def test_other_options_are_refused_by_name(
    pictures: Path, tmp_path: Path, finished: bool, change: dict, message: str
) -> None:
    options = {"source": pictures, "out": tmp_path / "out", "shard_size": 5, "batch_size": 5, "progress": False}
    if finished:
        prepare(**options)  # type: ignore[arg-type]
    else:
        with stopped_after(7):
            prepare(**options)  # type: ignore[arg-type]
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{message}; repeat the command as it was, or choose another --out"):
        prepare(**(options | change))
    assert contents(tmp_path / "out") == before


def test_folder_of_version_one_is_refused_with_the_remedy(pictures: Path, tmp_path: Path) -> None:
    """Version 1 stored raw .bin files."""
    out = tmp_path / "out"
    prepare(pictures, out, progress=False)
    found = json.loads((out / "manifest.json").read_text())
    old = {name: value for name, value in found.items() if name not in ("latent_space", "conditions", "features")}
    (out / "manifest.json").write_text(
        json.dumps(old | {"version": 1, "scale": 1.0, "shift": 0.0, "stochastic": False})
    )
    remedy = r"has version 1, whose .bin files .* no longer reads; repeat its `selftrans prepare` into a new folder"
    for attempt in (lambda: Dataset.open(out), lambda: prepare(pictures, out, progress=False)):
        with pytest.raises(ValueError, match=remedy) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_changed_picture_is_detected(pictures: Path, tmp_path: Path) -> None:
    prepare(pictures, tmp_path / "out", progress=False)
    (pictures / "cat" / "new.png").write_bytes((pictures / "cat" / "01.png").read_bytes())
    with pytest.raises(ValueError, match="from other pictures"):
        prepare(pictures, tmp_path / "out", progress=False)


def test_lost_or_damaged_shard_is_made_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(pictures, out, shard_size=5, progress=False)
    complete = contents(out)
    (out / "shard-00003.safetensors").unlink()
    (out / "shard-00001.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"shard-00001.safetensors cannot be used .* repeat the `selftrans prepare`"):
        Dataset.open(out)
    prepare(pictures, out, shard_size=5, progress=False)
    assert contents(out) == complete
    Dataset.open(out, verify=True)


def test_digits_are_made_once(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    dataset = prepare_builtin("digits", tmp_path / "digits")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()}
    again = prepare_builtin("digits", tmp_path / "digits")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").iterdir()} == written
    assert again.manifest == dataset.manifest and dataset.manifest.shape == (1, 8, 8)
    assert dataset.manifest.classes == tuple("0123456789") and len(dataset) == 1797
    tensors = dataset.read(np.arange(1797))
    moments, labels = tensors["moments"], tensors["labels"]
    data = load_digits()
    assert labels.tolist() == data.target.tolist()
    # 16 grey levels of the scan, recovered from the pixels
    assert np.array_equal(np.rint((moments[:, 0, 0].float().numpy() + 1) * 8), data.images)


def test_first_shard_of_cifar10_zip(cifar10_zip: Path, tmp_path: Path) -> None:
    """The first shard of CIFAR-10's zip: 8192 of 50,000 pictures, in order, then stopped."""
    with stopped_after(8192):
        prepare(cifar10_zip, tmp_path / "out", resolution=32, batch_size=512, progress=False)
    plan = Manifest.from_json((tmp_path / "out" / "plan.json").read_text())
    assert plan.shape == (3, 32, 32) and len(plan.classes) == 10 and plan.classes[0] == "airplane"
    tensors = load_file(tmp_path / "out" / "shard-00000.safetensors")
    moments, labels = tensors["moments"][:, 0], tensors["labels"]
    assert moments.shape == (8192, 3, 32, 32) and moments.dtype == np.float16
    assert np.bincount(labels).tolist() == [5000, 3192]
    with zipfile.ZipFile(cifar10_zip) as archive:
        for row, name in ((0, "airplane/0000.jpg"), (4999, "airplane/4999.jpg"), (8191, "automobile/3191.jpg")):
            pixels = np.asarray(Image.open(archive.open(name)), dtype=np.float64)  # (32, 32, 3)
            assert np.abs((moments[row].transpose(1, 2, 0).astype(np.float64) + 1) * 127.5 - pixels).max() < 0.1


def test_built_in_digits_take_precedence_over_a_folder_of_that_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare("digits", "digits/data", progress=False).count == 1797
