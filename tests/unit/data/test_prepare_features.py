"""`prepare --features`: stored features are those of the encoder, also after interruption, in parts, and after damage."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import selftrans.data.prepare_features as features_module
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare
from selftrans.data.prepare_features import prepare_features
from selftrans.data.shard_file import row_bytes
from selftrans.data.sources.open_source import open_source
from selftrans.encoders.vision import load_encoder
from tests.support.pictures import class_folders, contents, encoded, noise, save_vae, stopped_after, write
from tests.support.shards import edit
from tests.support.vision import patches_of, save_encoder

OPTIONS: dict[str, Any] = {"shard_size": 4, "batch_size": 2, "progress": False}
MORE: dict[str, Any] = {"batch_size": 2, "progress": False}
NAMES = [f"features-{k:05d}.safetensors" for k in range(6)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "my pictures")  # 23 pictures of 8x8: six shards


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"), "registers")


@pytest.fixture
def out(pictures: Path, tmp_path: Path) -> Path:
    prepare(pictures, tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


@pytest.fixture
def complete(pictures: Path, out: Path, encoder: str) -> Path:
    prepare_features(pictures, out, encoder, **MORE)
    return out


def rows(path: Path) -> torch.Tensor:
    dataset = Dataset.open(path, verify=True)
    dataset.open_features()
    return dataset.read(np.arange(len(dataset)))["features"]


@pytest.mark.parametrize("flip", [False, True])
def test_stored_features_are_those_of_transformers(pictures: Path, tmp_path: Path, flip: bool) -> None:
    """With pictures of the encoder's own size, without resizing; the second copy belongs to the mirrored picture."""
    folder = save_encoder(tmp_path / "encoder", "registers")
    manifest = prepare(pictures, tmp_path / "out", resolution=28, flip=flip, **OPTIONS)
    found = prepare_features(pictures, tmp_path / "out", folder, grid=4, **MORE)
    assert (found.grid, found.width, found.encoder) == (4, 16, folder) and found.sha256 == load_encoder(
        folder, 4
    ).sha256
    source = open_source(pictures, resolution=28)
    shown = np.stack([source.read(i) for i in range(23)])
    views = [shown, shown[:, :, ::-1].copy()][: manifest.copies]
    expected = torch.stack([patches_of(folder, view, prefix=5) for view in views], dim=1)
    stored = rows(tmp_path / "out")
    assert stored.shape == (23, manifest.copies, 16, 16) and stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=2e-3)
    if flip:
        assert (stored[:, 0] - stored[:, 1]).abs().max() > 0.1
        mirrored = stored[:, 1].unflatten(1, (4, 4)).flip(dims=(2,)).flatten(1, 2)
        assert not torch.allclose(mirrored, stored[:, 0], atol=0.1), "of the mirrored picture, not mirrored features"


@pytest.mark.parametrize("on_device", [False, True])
def test_rows_in_any_order_are_copies(complete: Path, on_device: bool) -> None:
    dataset = OnDevice(Dataset.open(complete), "cpu") if on_device else Dataset.open(complete)
    assert "features" not in dataset.read(np.arange(2))
    dataset.open_features()
    every = rows(complete)
    assert torch.equal(dataset.read(np.array([22, 0, 7, 7]))["features"], every[[22, 0, 7, 7]])
    dataset.read(np.arange(23), ["features"])["features"].zero_()
    assert torch.equal(dataset.read(np.arange(23))["features"], every)
    with pytest.raises(ValueError, match="are outside the 23 pictures"):
        dataset.read(np.array([23]), ["features"])


def test_adding_features_changes_only_the_features_field(pictures: Path, out: Path, encoder: str) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    manifest, moments = Manifest.load(out), Dataset.open(out).read(np.arange(23))["moments"]
    found = prepare_features(pictures, out, encoder, **MORE)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert set(after) - set(before) == set(NAMES) and set(before) <= set(after)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert Manifest.load(out) == replace(manifest, features=found)
    assert torch.equal(Dataset.open(out, verify=True).read(np.arange(23))["moments"], moments)
    prepare_features(pictures, out, encoder, **MORE)  # does nothing
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == after


def test_folder_without_features_opens_and_names_the_remedy(out: Path) -> None:
    dataset = Dataset.open(out, verify=True)
    assert not list(out.glob("features*")) and dataset.manifest.features is None
    with pytest.raises(ValueError, match=r"holds no features; repeat its `selftrans prepare`, with --features MODEL"):
        dataset.open_features()


def test_features_survive_when_a_shard_of_moments_is_made_again(pictures: Path, complete: Path) -> None:
    before = contents(complete)
    (complete / "shard-00002.safetensors").unlink()
    with stopped_after(2):
        prepare(pictures, complete, **OPTIONS)
    assert not (complete / "manifest.json").exists()
    prepare(pictures, complete, **OPTIONS)
    assert contents(complete) == before and rows(complete).shape == (23, 1, 16, 16)


def stop_after(patch: pytest.MonkeyPatch, batches: int) -> None:
    encode, left = features_module._encode, [batches]

    def counting(*args: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(*args)

    patch.setattr(features_module, "_encode", counting)


def test_verifying_opens_no_features_and_names_a_lost_file(complete: Path) -> None:
    dataset = Dataset.open(complete, verify=True)
    assert dataset.names == ("moments", "labels"), "features are read only after open_features"
    (complete / NAMES[2]).unlink()
    with pytest.raises(ValueError, match=rf"{NAMES[2]} is missing; repeat the `selftrans prepare`"):
        dataset.verify()


def test_pickled_data_with_open_features_read_them(complete: Path) -> None:
    """Also data on a device, whose copy reads from disk."""
    dataset = Dataset.open(complete)
    dataset.open_features()
    at = np.array([5, 0])
    for data in (dataset, OnDevice(dataset, "cpu")):
        copied = pickle.loads(pickle.dumps(data))
        assert set(copied.names) == {"moments", "labels", "features"} and type(copied) is Dataset
        assert torch.equal(copied.read(at)["features"], dataset.read(at)["features"])


def test_interrupted_and_continued_equals_uninterrupted(
    pictures: Path, complete: Path, tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "parts"
    prepare(pictures, out, **OPTIONS)
    for batches, done in ((1, 0), (5, 2), (3, 3)):  # 1 stops inside the first shard; no shard is made twice
        with monkeypatch.context() as patch:
            stop_after(patch, batches)
            with pytest.raises(KeyboardInterrupt):
                prepare_features(pictures, out, encoder, **MORE)
        assert len(list(out.glob("features-*.json"))) == done and Manifest.load(out).features is None
        assert not list(out.glob(".*.tmp"))
        with pytest.raises(ValueError, match="holds no features"):
            Dataset.open(out, verify=True).open_features()
    prepare_features(pictures, out, encoder, **MORE)
    assert contents(out) == contents(complete)


def test_parts_share_the_work(pictures: Path, complete: Path, tmp_path: Path, encoder: str) -> None:
    """Each part makes its moments, then its features; the part that ends last lists them in the manifest."""
    out, made = tmp_path / "parts", []
    for part in ("2/3", "1/3", "3/3"):
        prepare(pictures, out, part=part, **OPTIONS)
        made.append([file.index for file in prepare_features(pictures, out, encoder, part=part, **MORE).files])
    assert made == [[1, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert contents(out) == contents(complete)


def test_features_of_unfinished_moments_are_refused(pictures: Path, tmp_path: Path, encoder: str) -> None:
    prepare(pictures, tmp_path / "out", part="1/2", **OPTIONS)
    with pytest.raises(ValueError, match=r"shard 1 of .* is not finished; repeat its `selftrans prepare`"):
        prepare_features(pictures, tmp_path / "out", encoder, part="2/2", **MORE)
    with pytest.raises(ValueError, match="holds no prepared pictures; run `selftrans prepare`"):
        prepare_features(pictures, tmp_path / "nowhere", encoder, **MORE)


def test_lost_or_truncated_file_is_made_again_alone(
    pictures: Path, complete: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(complete)
    (complete / NAMES[4]).unlink()
    (complete / NAMES[1]).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"features-00001.safetensors cannot be used"):
        Dataset.open(complete).open_features()
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # two shards of two batches, and no further batch
        prepare_features(pictures, complete, encoder, **MORE)
    assert contents(complete) == before


def test_damaged_features_are_named(complete: Path) -> None:
    path = complete / NAMES[3]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"features-00003.safetensors fails its sha256; delete the file"):
        Dataset.open(complete, verify=True)
    save_file({"features": np.full((4, 1, 16, 16), np.nan, np.float16)}, path)
    dataset = Dataset.open(complete)
    dataset.open_features()
    dataset.read(np.arange(12))
    message = r"features-00003.safetensors holds NaN or infinite features for picture 13 \(row 1"
    with pytest.raises(ValueError, match=message):
        dataset.read(np.array([3, 13]))
    dataset.read(np.arange(23), ["moments", "labels"])  # those are valid


INVALID: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda f: f.pop("grid"), r"manifest.json: features\.grid is missing; prepare the data again"),
    "unknown": (lambda f: f.update(extra=1), r"manifest.json: features\.extra is unknown"),
    "grid": (
        lambda f: f.update(grid=5),
        r"features-00000.safetensors cannot be used \(its features are F16 \(4, 1, 16, 16\), the manifest expects",
    ),
    "grid zero": (lambda f: f.update(grid=0), r"features\.grid should be an integer from 1 to 4096, not 0"),
    "width huge": (lambda f: f.update(width=1 << 40), r"features\.width should be an integer from 1"),
    "sha256": (lambda f: f.update(sha256="x"), r"features\.sha256 should be a sha256"),
    "fingerprint": (lambda f: f.update(fingerprint="0" * 64), "'features' belongs to other pictures than the shards"),
    "files": (lambda f: f["files"].pop(), "'files' does not agree with the shards"),
    "order": (lambda f: f["files"].reverse(), "'files' does not agree"),
    "index true": (lambda f: f["files"][2].update(index=True), r"features\.files\[2\]\.index should be an integer"),
    "file unknown": (lambda f: f["files"][0].update(path="../x"), r"features\.files\[0\]\.path is unknown"),
    "file no object": (lambda f: f.update(files=[1]), r"features\.files\[0\] should be an object"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_features_name_the_field(complete: Path, case: str) -> None:
    change, message = INVALID[case]
    edit(complete, lambda manifest: change(manifest["features"]))
    with pytest.raises(ValueError, match=message) as caught:
        Dataset.open(complete).open_features()
    assert "\n" not in str(caught.value)


def test_damaged_record_is_made_again(
    pictures: Path, complete: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "parts"
    prepare(pictures, out, **OPTIONS)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            prepare_features(pictures, out, encoder, **MORE)
    for text in ("{", json.dumps(json.loads((out / "features-00001.json").read_text()) | {"grid": -1})):
        (out / "features-00002.json").write_text(text)
    prepare_features(pictures, out, encoder, **MORE)
    assert contents(out) == contents(complete)


def test_other_features_after_deleting_the_old_ones(pictures: Path, complete: Path, tmp_path: Path) -> None:
    """As the error message of the test below recommends."""
    for path in complete.glob("features-*"):
        path.unlink()
    other = save_encoder(tmp_path / "other", "registers")
    assert prepare_features(pictures, complete, other, **MORE).encoder == other
    assert rows(complete).shape == (23, 1, 16, 16)


def test_other_features_are_refused_naming_the_difference(
    pictures: Path, complete: Path, encoder: str, tmp_path: Path
) -> None:
    before = contents(complete)
    other = save_encoder(tmp_path / "other", "registers")
    for arguments, message in (
        ((pictures, complete, other, {}), "features with encoder .*, not .*other; repeat the command as it was"),
        ((pictures, complete, encoder, {"grid": 2}), "features with grid 4, not 2"),
        ((pictures, complete, encoder, {"precision": "bfloat16"}), "features with precision float32, not bfloat16"),
        (("digits", complete, encoder, {}), "prepared from other pictures"),
        ((pictures, complete, encoder, {"grid": 0}), "grid 0 should be 1 or more"),
    ):
        *positional, options = arguments
        with pytest.raises(ValueError, match=message):
            prepare_features(*positional, **(MORE | options))  # type: ignore[misc]
    assert contents(complete) == before


def test_features_of_changed_weights_are_not_mixed(
    pictures: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_encoder(tmp_path / "encoder")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            prepare_features(pictures, out, folder, **MORE)
    save_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(ValueError, match=r"features with sha256 .*, not .*; repeat the command as it was"):
        prepare_features(pictures, out, folder, **MORE)


def test_skipped_pictures_have_no_features(pictures: Path, tmp_path: Path, encoder: str) -> None:
    write(pictures, {"cat/04 truncated.jpg": encoded(noise(64), "JPEG")[:500]})
    prepare(pictures, tmp_path / "out", skip_bad=True, resolution=8, **OPTIONS)
    prepare_features(pictures, tmp_path / "out", encoder, **MORE)
    readable, stored = (
        [i for i in range(24) if open_source(pictures, resolution=8).name(i) != "cat/04 truncated.jpg"],
        rows(tmp_path / "out"),
    )
    assert len(stored) == len(readable) == 23
    source, model = open_source(pictures, resolution=8), load_encoder(encoder, 4)
    shown = torch.from_numpy(np.stack([source.read(i) for i in readable])).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(stored[:, 0].float(), model.encode(shown), rtol=2e-3, atol=2e-3)


def test_picture_damaged_after_prepare_is_named(pictures: Path, out: Path, encoder: str) -> None:
    path = pictures / "cat" / "01.png"
    path.write_bytes(b"x" * path.stat().st_size)  # of the same size, so the fingerprint is the same
    with pytest.raises(ValueError, match=r"cat/01.png was readable when its moments were made: .*; restore it"):
        prepare_features(pictures, out, encoder, **MORE)


def test_features_too_large_for_half_precision_are_refused(pictures: Path, out: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_encoder(tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    weights["layernorm.weight"] *= 1e7
    save_file(weights, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cat/01.png: features of .* are too large for float16"):
        prepare_features(pictures, out, folder, **MORE)


def test_features_with_vae_latents(pictures: Path, tmp_path: Path, encoder: str) -> None:
    """The grid is that of a student with patch size 2: 4x4 latents, 2 x 2 tokens."""
    vae = save_vae(tmp_path / "vae")
    prepare(pictures, tmp_path / "out", autoencoder=vae, flip=True, **OPTIONS)
    found = prepare_features(pictures, tmp_path / "out", encoder, precision="bfloat16", **MORE)
    assert found.grid == 2 and row_bytes(found.layout(Manifest.load(tmp_path / "out"))) == 2 * 4 * 16 * 2
    model, source = load_encoder(encoder, 2, dtype=torch.bfloat16), open_source(pictures)
    shown = torch.from_numpy(np.stack([source.read(i) for i in range(23)])).permute(0, 3, 1, 2) / 127.5 - 1
    stored = rows(tmp_path / "out").float()
    for copy, view in enumerate((shown, shown.flip(dims=(3,)))):
        expected = model.encode(view)
        assert (stored[:, copy] - expected).norm() / expected.norm() < 0.02  # rounding depends on the batch size


def test_prepare_command_with_parts(
    pictures: Path, tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["prepare", str(pictures), "--out", str(tmp_path / "out"), "--shard-size", "4", "--flip"]
    assert main([*common, "--grid", "4"]) == 0
    assert "--grid is ignored without --features" in capsys.readouterr().err
    assert main([*common, "--features", encoder, "--precision", "bf16"]) == 0  # of the encoder; pixels need no network
    output = capsys.readouterr()
    assert "23 pictures" in output.out and f"features by {encoder}: 4x4 of 16, float16, 0.0 MB" in output.out
    assert "is complete already" in output.err and "23/23" in output.err and "ignored" not in output.err
    assert main([*common, "--features", encoder, "--precision", "bf16"]) == 0
    assert "the features in" in capsys.readouterr().err
    assert main([*common, "--features", "no/model", "--grid", "2"]) == 1
    assert "features with encoder" in capsys.readouterr().err
    assert rows(tmp_path / "out").shape == (23, 2, 16, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resolution=8x6"], "prepared at 8x6; give --resolution SIDE, or omit --features"),
        (["--grid=0"], "grid 0"),
        (["--buckets=3", "--resolution=8"], "leave it out with --buckets"),
        (["--autoencoder=values"], "for data of other kinds"),
        (["--features=no/model"], "encoder 'no/model' cannot be loaded"),
    ],
)
def test_what_features_cannot_be_made_of_is_refused_before_any_work(
    pictures: Path, tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "refused"
    assert main(["prepare", str(pictures), "--out", str(out), "--features", encoder, *words]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not out.exists()


def test_pictures_that_turn_out_not_to_be_square_are_refused_before_any_is_encoded(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "x", {f"{k}.png": encoded(noise(8, k)[:6]) for k in range(3)})
    command = ["prepare", str(tmp_path / "x"), "--out", str(tmp_path / "out")]
    assert main([*command, "--features", encoder]) == 1
    assert "prepared at 6x8; give --resolution SIDE" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(command) == 0 and main([*command, "--features", encoder]) == 1  # prepared without features before
    assert "6x8" in capsys.readouterr().err and Dataset.open(tmp_path / "out").manifest.features is None
