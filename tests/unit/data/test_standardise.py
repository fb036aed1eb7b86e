"""Pixels of zero mean and unit variance: statistics against numpy on the pictures, exact decoding, old folders, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from selftrans.cli.main import main
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents, decode_images, decoded_images
from selftrans.data.manifest import Manifest
from selftrans.data.prepare import prepare
from selftrans.data.prepare_buckets import prepare_buckets
from selftrans.data.sources.decode import Reading
from selftrans.data.standardise import standardise_option
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.encoders.latent_space import UNSCALED, LatentSpace
from tests.support import ratios, toy
from tests.support.pictures import contents, encoded, write


def picture(i):
    """(8, 8, 3) uint8: channels of different mean and spread, the last one constant."""
    rng = np.random.default_rng(i)
    return np.stack([rng.integers(0, 80, (8, 8)), rng.integers(100, 256, (8, 8)), np.full((8, 8), 37)], axis=-1).astype(
        np.uint8
    )


COUNT = 11
PICTURES = np.stack([picture(i) for i in range(COUNT)])


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "pictures", {f"{'ab'[i % 2]}/{i:02d}.png": encoded(picture(i)) for i in range(COUNT)})


def expected(pictures):
    """Shift and scale by numpy, of pixels in [-1, 1]."""
    pixels = pictures.astype(np.float64).reshape(-1, pictures.shape[-1]) / 127.5 - 1
    deviation = pixels.std(axis=0)
    constant = deviation < 1e-9
    return pixels.mean(axis=0), np.where(constant, 1, 1 / np.where(constant, 1, deviation))


def check(space, pictures):
    shift, scale = expected(pictures)
    # moments are float16, whose rounding is 2e-4 of a pixel at most
    assert space.shift == pytest.approx(shift, abs=3e-4) and space.scale == pytest.approx(scale, rel=1e-3)


def test_statistics_are_those_of_all_pictures_and_a_constant_channel_is_shifted_only(source, tmp_path):
    manifest = prepare(source, tmp_path / "data", batch_size=2, shard_size=4, progress=False)
    check(manifest.latent_space, PICTURES)
    assert manifest.latent_space.scale[2] == 1 and manifest.options["standardise"] is True
    z0, _ = data_latents(Dataset.open(tmp_path / "data"), COUNT)
    assert z0.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert z0.double().var(dim=(0, 2, 3), correction=0)[:2].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert manifest == Manifest.load(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pictures_are_decoded_exactly(source, tmp_path, dtype):
    prepare(source, tmp_path / "data", dtype=dtype, flip=True, progress=False)
    found = np.concatenate(list(decoded_images(Dataset.open(tmp_path / "data"), batch_size=4)))
    order = [i for first in (0, 1) for i in range(first, COUNT, 2)]  # folder a, then b
    assert np.array_equal(found, PICTURES[order])


def test_statistics_do_not_depend_on_shards_parts_or_mirrored_copies(source, tmp_path):
    spaces = set()
    for name, options in {"one": {}, "small": {"shard_size": 2, "batch_size": 3}, "flip": {"flip": True}}.items():
        spaces.add(prepare(source, tmp_path / name, progress=False, **options).latent_space)
    for part in ("2/2", "1/2"):
        last = prepare(source, tmp_path / "parts", shard_size=3, part=part, progress=False)
    assert len(spaces | {last.latent_space}) == 1


def test_digits_are_standardised_as_scikit_learn_has_them():
    manifest = Dataset.open(toy.digits()).manifest
    pixels = np.rint(load_digits().images * 255 / 16) / 127.5 - 1
    assert manifest.autoencoder == toy.PIXELS
    assert manifest.latent_space.shift == pytest.approx([pixels.mean()], abs=1e-3)
    assert manifest.latent_space.scale == pytest.approx([1 / pixels.std()], rel=1e-3)


def test_damaged_shard_is_made_again_and_nothing_else_changes(source, tmp_path, capsys):
    once = prepare(source, tmp_path / "data", shard_size=4, progress=False)
    before = contents(tmp_path / "data")
    (tmp_path / "data" / "shard-00001.safetensors").write_bytes(b"damaged")
    assert prepare(source, tmp_path / "data", shard_size=4) == once and contents(tmp_path / "data") == before
    assert "mean and deviation" in capsys.readouterr().err, "the pass over the shards is shown"


def test_folder_keeps_the_scale_with_which_it_was_begun(source, tmp_path):
    options = {"shard_size": 4, "progress": False}
    plain = prepare(source, tmp_path / "data", standardise=False, **options)
    assert (plain.autoencoder, plain.latent_space) == ("pixel", UNSCALED) and "standardise" not in plain.options
    before = contents(tmp_path / "data")
    assert prepare(source, tmp_path / "data", **options) == plain and contents(tmp_path / "data") == before
    (tmp_path / "data" / "shard-00000.safetensors").unlink()
    assert prepare(source, tmp_path / "data", **options) == plain and contents(tmp_path / "data") == before
    with pytest.raises(ValueError, match="was prepared without standardise, not with True"):
        prepare(source, tmp_path / "data", standardise=True, **options)
    prepare(source, tmp_path / "new", **options)
    with pytest.raises(ValueError, match="was prepared with standardise True, not without"):
        prepare(source, tmp_path / "new", standardise=False, **options)


def test_scale_of_other_data_may_be_given(source, tmp_path):
    name = "pixel(shift=0.5:-0.25:0.0,scale=2.0:4.0:1.0)"
    manifest = prepare(source, tmp_path / "data", autoencoder=name, progress=False)
    assert (
        manifest.latent_space == LatentSpace((0.5, -0.25, 0.0), (2.0, 4.0, 1.0), stochastic=False)
        and manifest.autoencoder == name
    )
    found = np.concatenate(list(decoded_images(Dataset.open(tmp_path / "data"))))
    assert np.array_equal(np.sort(found, axis=0), np.sort(PICTURES, axis=0))
    with pytest.raises(ValueError, match="has a shift for 2 channels, but the data have 3"):
        prepare(source, tmp_path / "two", autoencoder="pixel(shift=0.0:0.0,scale=2.0:2.0)", progress=False)


def test_one_number_is_that_of_each_channel(source, tmp_path):
    options = {"autoencoder": "pixel(shift=0.5,scale=2.0)", "progress": False}
    manifest = prepare(source, tmp_path / "data", **options)
    assert manifest.latent_space == LatentSpace((0.5, 0.5, 0.5), (2.0, 2.0, 2.0), stochastic=False)
    assert manifest == Manifest.load(tmp_path / "data") == prepare(source, tmp_path / "data", **options)
    assert load_autoencoder(manifest.autoencoder).latent_space == manifest.latent_space


def test_manifest_whose_name_and_scale_disagree_is_refused(source, tmp_path):
    prepare(source, tmp_path / "data", progress=False)
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"autoencoder": "pixel(shift=0:0:0,scale=1:1:1)"}))
    with pytest.raises(ValueError, match="field 'latent_space' is not that of pixel"):
        Manifest.load(tmp_path / "data")


def test_data_with_a_scale_of_their_own_are_refused(source, tmp_path):
    with pytest.raises(
        ValueError, match="standardise is for pixels and values; autoencoder owner/vae has a known scale"
    ):
        prepare(source, tmp_path / "data", autoencoder="owner/vae", standardise=True, progress=False)
    with pytest.raises(ValueError, match="standardise is for pixels and values; sounds and videos have a known scale"):
        standardise_option(False, "pixel", None, media=True)
    assert (
        standardise_option(None, "owner/vae", None, media=False)
        == standardise_option(None, "pixel", None, media=True)
        == {}
    )
    assert not (tmp_path / "data").exists()


def test_values_are_standardised_unless_it_is_refused(tmp_path, capsys):
    data = np.random.default_rng(0).normal([[[1000.0], [-2.0]]], [[[0.5], [30.0]]], (40, 2, 6)).astype(np.float32)
    np.savez(tmp_path / "values.npz", data=data)
    command = ["prepare", str(tmp_path / "values.npz"), "--autoencoder=values"]
    assert main([*command, f"--out={tmp_path / 'plain'}", "--no-standardise"]) == 0
    assert Manifest.load(tmp_path / "plain").latent_space == UNSCALED
    assert main([*command, f"--out={tmp_path / 'plain'}"]) == 0, "a folder continues as it was begun"
    assert Manifest.load(tmp_path / "plain").latent_space == UNSCALED
    assert main([*command, f"--out={tmp_path / 'data'}"]) == 0
    assert "2x6 latents: values, scaled to zero mean and unit variance (shift=" in capsys.readouterr().out
    found, wide = Manifest.load(tmp_path / "data").latent_space, data.astype(np.float64)
    assert found.shift == pytest.approx(wide.mean(axis=(0, 2)), rel=1e-5)
    assert found.scale == pytest.approx(1 / wide.std(axis=(0, 2)), rel=1e-4)
    again = np.concatenate(list(decoded_images(Dataset.open(tmp_path / "data"))))
    np.testing.assert_allclose(again, data, rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_values_of_any_unit_have_unit_variance_and_a_constant_channel_is_shifted_only(tmp_path, unit):
    drawn = np.random.default_rng(0).normal(2.0, 1.0, (40, 1, 6))
    data = np.concatenate([drawn * unit, np.full_like(drawn, 3 * unit), np.zeros_like(drawn)], axis=1)
    np.savez(tmp_path / "x.npz", data=data.astype(np.float32))
    manifest = prepare(tmp_path / "x.npz", tmp_path / "data", autoencoder="values", progress=False)
    assert manifest.latent_space.scale == pytest.approx([1 / (drawn.std() * unit), 1, 1], rel=1e-4)
    assert manifest.latent_space.shift == pytest.approx([drawn.mean() * unit, 3 * unit, 0], rel=1e-5)
    z0, _ = data_latents(Dataset.open(tmp_path / "data"), 40)
    assert z0[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("mean", "deviation"), [(300.0, 1e-3), (123456.7, 0.5), (3e7, 40.0), (-2e5, 1.0)])
def test_a_mean_of_many_deviations_is_taken_off_completely(tmp_path, mean, deviation):
    data = np.random.default_rng(0).normal(mean, deviation, (40, 1, 50)).astype(np.float32)
    np.savez(tmp_path / "x.npz", data=data)
    manifest = prepare(tmp_path / "x.npz", tmp_path / "data", autoencoder="values", progress=False)
    ((shift,), (scale,)), wide = (manifest.latent_space.shift, manifest.latent_space.scale), data.astype(np.float64)
    assert abs(wide.mean() - shift) * scale < 1e-3 and scale == pytest.approx(1 / wide.std(), rel=1e-5)
    assert Manifest.load(tmp_path / "data") == manifest


def test_means_that_a_manifest_cannot_hold_are_refused_before_it_is_written(tmp_path):
    np.savez(tmp_path / "x.npz", data=np.full((2, 1, 4), 2e30))
    options = {"autoencoder": "values", "progress": False}
    with pytest.raises(ValueError, match=r"a channel has the mean 2e\+30; divide the values"):
        prepare(tmp_path / "x.npz", tmp_path / "data", **options)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_summary_of_many_channels_has_the_range_of_their_numbers(tmp_path):
    data = np.arange(13, dtype=np.float32)[None, :, None] + np.array([-1, 1], np.float32)[:, None, None]
    np.savez(tmp_path / "x.npz", data=np.repeat(data, 4, axis=2))
    manifest = prepare(tmp_path / "x.npz", tmp_path / "data", autoencoder="values", progress=False)
    assert (
        "values, scaled to zero mean and unit variance (13 channels: shift 0 to 12, scale 1 to 1), f"
        in manifest.summary()
    )


def test_buckets_share_the_statistics_of_all_pictures(tmp_path):
    data = open_data(ratios.prepared(tmp_path))
    pictures = [images.reshape(-1, 3) for bucket in data.buckets for images in decoded_images(bucket)]
    check(data.manifest.latent_space, np.concatenate(pictures))
    assert len({bucket.manifest.latent_space for bucket in data.buckets}) == 1
    before = toy.tree(tmp_path / "data")
    ratios.prepared(tmp_path)
    assert toy.tree(tmp_path / "data") == before


def test_command_standardises_unless_it_is_refused(source, tmp_path, capsys):
    assert main(["prepare", str(source), f"--out={tmp_path / 'data'}"]) == 0
    assert (
        "3x8x8 latents: pixels in [-1, 1], scaled to zero mean and unit variance (shift=-0.6" in capsys.readouterr().out
    )
    assert main(["prepare", str(source), f"--out={tmp_path / 'plain'}", "--no-standardise"]) == 0
    assert "3x8x8 latents: pixels in [-1, 1], as they are, float16" in capsys.readouterr().out


def test_latent_zero_is_the_mean_pixel():
    manifest = Dataset.open(toy.digits()).manifest
    grey = decode_images(load_autoencoder(manifest.autoencoder), torch.zeros(1, 1, 8, 8))
    assert set(grey.flatten()) == {round((manifest.latent_space.shift[0] + 1) * 127.5)}


def test_grey_stores_one_channel_and_is_named_where_all_pictures_are_grey(tmp_path, capsys):
    levels = np.random.default_rng(0).integers(0, 4096, (5, 8, 8)).astype(np.uint16)
    where = write(tmp_path / "scans", {f"{i}.png": encoded(Image.fromarray(each)) for i, each in enumerate(levels)})
    command, said = ["prepare", str(where), "--range", "0", "4095"], "the pictures are grey: --grey stores one channel"
    assert main([*command, f"--out={tmp_path / 'grey'}", "--grey"]) == 0 and said not in capsys.readouterr().err
    assert main([*command, f"--out={tmp_path / 'data'}"]) == 0 and said in capsys.readouterr().err
    grey, three = (Dataset.open(tmp_path / name) for name in ("grey", "data"))
    assert (grey.manifest.shape, grey.manifest.image_channels) == ((1, 8, 8), 1) and three.manifest.shape == (3, 8, 8)
    stored = [each.read(np.arange(5))["moments"][:, 0] for each in (grey, three)]
    assert torch.equal(stored[0].expand(-1, 3, -1, -1), stored[1])
    images = next(iter(decoded_images(grey, batch_size=5)))
    assert np.abs(images[..., 0] - levels / 4095 * 255).max() <= 0.5 + 1e-6
    assert main([*command, f"--out={tmp_path / 'data'}", "--grey"]) == 1
    assert "was prepared without grey, not with True" in capsys.readouterr().err


def test_grey_of_the_library_is_stored_and_recorded(source, tmp_path):
    options = {"reading": Reading(grey=True)}
    manifest = prepare(source, tmp_path / "data", progress=False, **options)
    assert manifest.image_channels == 1 and manifest.options["grey"] is True
    prepare_buckets(source, tmp_path / "buckets", resolution=8, buckets=1, progress=False, **options)
    assert open_data(tmp_path / "buckets").manifest.image_channels == 1
    with pytest.raises(ValueError, match="with grey True, not without"):
        prepare(source, tmp_path / "data", progress=False)
