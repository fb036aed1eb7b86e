"""Sizes of buckets, the bucket of each picture, and folders of buckets: begun, interrupted, continued, refused."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from selftrans.cli.main import main
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.prepare_buckets import assigned, bucket_sizes, prepare_buckets
from selftrans.data.sources.clips import MediaOptions
from selftrans.data.sources.open_source import open_source
from tests.support import captioned, ratios, toy
from tests.support.clips import moving, save_gif
from tests.support.pictures import encoded, save_vae, stopped_after, write


@pytest.mark.parametrize("resolution, buckets, cell", [(256, 5, 16), (256, 9, 16), (512, 7, 32), (32, 3, 2), (8, 1, 2)])
def test_sizes_are_symmetric_of_equal_area_and_spread_from_wide_to_tall(resolution, buckets, cell):
    sizes = bucket_sizes(resolution, buckets, cell)
    assert len(sizes) == buckets and sizes == tuple(sorted(sizes)) and (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for k, (height, width) in enumerate(sizes):
        short, long = sorted((height, width))
        assert height % cell == width % cell == 0
        assert abs(short * long - resolution**2) <= short * cell / 2, "no multiple of the cell is nearer"
        ratio = 2 ** (-1 + 2 * k / (buckets - 1)) if buckets > 1 else 1.0
        ideal = resolution * math.sqrt(min(ratio, 1 / ratio))
        assert abs(short - ideal) <= cell / 2
    assert bucket_sizes(256, 5, 16) == ((176, 368), (208, 320), (256, 256), (320, 208), (368, 176))


def test_sizes_that_are_equal_after_rounding_are_one():
    assert bucket_sizes(8, 9, 4) == ((4, 16), (8, 8), (16, 4))


@pytest.mark.parametrize(
    "resolution, buckets, cell, message",
    [
        (256, 4, 16, "odd number"),
        (256, -1, 16, "odd number"),
        (256, 101, 16, "odd number"),
        (250, 5, 16, "multiple of 16"),
        (0, 5, 16, "multiple of 16"),
        (1 << 20, 5, 16, "up to 16384"),
    ],
)
def test_sizes_that_cannot_be_are_refused(resolution, buckets, cell, message):
    with pytest.raises(ValueError, match=message):
        bucket_sizes(resolution, buckets, cell)


def test_each_picture_goes_to_the_nearest_ratio_and_a_broken_one_where_most_are(tmp_path):
    rng, sizes = np.random.default_rng(0), bucket_sizes(64, 5, 2)
    shapes = [(10, 10), (10, 40), *map(tuple, rng.integers(4, 40, (20, 2)).tolist())]
    files = {f"{i:02d}.png": encoded(np.zeros((*shape, 3), dtype=np.uint8)) for i, shape in enumerate(shapes)}
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: what is stored as 10x40 is seen as 40x10
    files["90.jpg"] = encoded(Image.new("RGB", (40, 10)), "JPEG", exif=turned)
    files["91.png"] = b"no picture"
    found = assigned(open_source(write(tmp_path, files), resolution=64), sizes)
    distances = [[abs(math.log(h / w) - math.log(a / b)) for a, b in sizes] for h, w in [*shapes, (40, 10)]]
    assert found[:-1].tolist() == [int(np.argmin(each)) for each in distances]
    assert found[0] == 2 and found[1] == 0 and found[-2] == 4
    assert found[-1] == np.bincount(found[:-1]).argmax()


def test_buckets_hold_the_cropped_pictures_of_their_shape_with_the_same_classes():
    data = open_data(ratios.shared(), verify=True)
    assert tuple(bucket.path.name for bucket in data.buckets) == ratios.NAMES
    assert data.shapes == ((3, 6, 10), (3, 8, 8), (3, 10, 6)) and data.parts == (8, 8, 8)
    assert data.manifest.classes == ("cat", "dog") and data.manifest.shape == (3, 8, 8)
    source = open_source(ratios.shared().parent / "pictures", resolution=(6, 10))
    wide = [i for i, name in enumerate(source.names) if int(name[-7:-4]) % 3 == 0]
    pixels = np.stack([source.read(i) for i in wide]).transpose(0, 3, 1, 2) / 127.5 - 1
    read = data.read(np.arange(8))
    assert np.allclose(read["moments"][:, 0].float(), pixels, atol=1e-3)
    assert read["labels"].tolist() == source.labels[wide].tolist()


def test_interrupted_preparation_continues_to_the_same_bytes(tmp_path):
    once = ratios.prepared(tmp_path / "once", batch_size=2, shard_size=4)
    ratios.pictures(tmp_path / "twice" / "pictures")
    with stopped_after(12):
        ratios.prepared(tmp_path / "twice", batch_size=2, shard_size=4)
    assert not (tmp_path / "twice" / "data" / "buckets.json").exists()
    with pytest.raises(ValueError, match="not finished"):
        Dataset.open(tmp_path / "twice" / "data")
    again = ratios.prepared(tmp_path / "twice", batch_size=2, shard_size=4)

    def shards(folder):
        return {
            name: content for name, content in toy.tree(folder).items() if name.endswith(("safetensors", "ts.json"))
        }

    assert shards(again) == shards(once) and len(shards(once)) == 7
    (again / "8x8" / "shard-00001.safetensors").write_bytes(b"damaged")
    assert shards(ratios.prepared(tmp_path / "twice", batch_size=2, shard_size=4)) == shards(once)


def test_complete_folder_stays_as_it_is_also_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    """As `prepare` of data of one shape: no lock is left behind, and none is needed."""
    data = ratios.prepared(tmp_path)
    before = toy.tree(data)
    assert not [name for name in before if ".lock" in name]

    def refused(*_, **__):
        raise PermissionError

    for name in ("data.prepare_buckets.lock_file", "data.resumable.lock_file", "storage.atomic_write"):
        monkeypatch.setattr(f"selftrans.{name}", refused)
    ratios.prepared(tmp_path, progress=True)
    assert toy.tree(data) == before and "8x8 is complete already" in capsys.readouterr().err


def test_parts_make_the_same_and_the_last_one_completes_it(tmp_path):
    ratios.pictures(tmp_path / "pictures")
    options = {"resolution": 8, "buckets": 3, "shard_size": 4, "progress": False}
    first = prepare_buckets(tmp_path / "pictures", tmp_path / "data", part="1/2", **options)
    assert "not finished" in first and not (tmp_path / "data" / "buckets.json").exists()
    second = prepare_buckets(tmp_path / "pictures", tmp_path / "data", part="2/2", **options)
    assert second == "24 pictures in 3 buckets: 6x10 (8), 8x8 (8), 10x6 (8)"
    assert open_data(tmp_path / "data", verify=True).parts == (8, 8, 8)


def test_latents_of_an_autoencoder_have_sides_that_patches_divide(tmp_path, capsys):
    data = open_data(
        ratios.prepared(tmp_path, autoencoder=save_vae(tmp_path / "vae"), resolution=16, progress=True, buckets=5)
    )
    assert [bucket.path.name for bucket in data.buckets] == ["12x20", "16x16", "20x12"]
    assert data.shapes == ((2, 6, 10), (2, 8, 8), (2, 10, 6)) and data.manifest.latent_space.stochastic
    assert "3 buckets: at 16 pixels, others would have the same size in multiples of 4" in capsys.readouterr().err


def test_captions_stay_with_their_pictures(tmp_path):
    data = open_data(ratios.with_captions(tmp_path))
    assert data.parts == (8, 8, 8)
    assert data.captions(range(24)) == [captioned.sentences(i) for start in (0, 2, 1) for i in range(start, 24, 3)]
    text = data.text([1, 9, 17], np.zeros(3, dtype=int))
    for k, bucket in enumerate(data.buckets):
        assert (text["text"][k] == bucket.text([1])["text"][0]).all()
    assert data.null()["text"].shape == (1, 12, 16)
    assert set(data.prompts) == {captioned.sentences(i)[0] for i in range(24)}


def test_unreadable_pictures_are_named_or_left_out_and_a_bucket_of_them_alone_is_too(tmp_path):
    files = {f"{i}.png": encoded(ratios.picture(3 * i + 2)) for i in range(4)}
    files["8.png"], files["9.jpg"] = b"no picture", encoded(ratios.picture(0), "JPEG")[:-40]  # its header is intact
    write(tmp_path / "pictures", files)
    with pytest.raises(ValueError, match=r"\d\.[jpng]+: cannot be read as a picture .*--skip-bad"):
        ratios.prepared(tmp_path)
    data = open_data(ratios.prepared(tmp_path, skip_bad=True))
    assert json.loads((data.path / "buckets.json").read_text()) == {"version": 1, "buckets": ["8x8"]}
    assert len(data) == 4 and [name for name, _ in data.manifest.skipped] == ["8.png"]
    ratios.prepared(tmp_path, skip_bad=True)
    assert len(open_data(data.path)) == 4


def test_gifs_with_a_number_of_frames_are_no_pictures(tmp_path):
    save_gif(tmp_path / "x" / "a.gif", moving(0))
    with pytest.raises(ValueError, match="--buckets is for pictures"):
        prepare_buckets(tmp_path / "x", tmp_path / "out", resolution=8, buckets=1, media=MediaOptions(frames=2))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolution=8x10"], "--buckets needs --resolution SIDE"),
        ([], "--buckets needs --resolution SIDE"),
        (["--resolution=9"], "resolution 9 is not a multiple of 2"),
        (["--resolution=8", "--bucket-multiple=0"], "--bucket-multiple 0 should be 1 or more"),
        (["--resolution=8", "--features=owner/vit"], "leave it out with --buckets"),
        (["--resolution=8", "--autoencoder=values"], "--buckets is for pictures"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, capsys):
    ratios.pictures(tmp_path / "pictures", 3)
    assert main(["prepare", str(tmp_path / "pictures"), "--out", str(tmp_path / "data"), "--buckets=3", *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_command_prints_the_buckets_and_other_folders_are_refused(tmp_path, capsys):
    ratios.pictures(tmp_path / "pictures")
    command = ["prepare", str(tmp_path / "pictures"), "--out", str(tmp_path / "data"), "--resolution=8"]
    assert main([*command, "--buckets=3"]) == 0
    assert "24 pictures in 3 buckets: 6x10 (8), 8x8 (8), 10x6 (8)" in capsys.readouterr().out
    assert main(command) == 1
    assert "is not empty and holds no earlier preparation" in capsys.readouterr().err
    assert main([*command, "--buckets=1"]) == 1
    assert "data holds 10x6, which is none of these buckets" in capsys.readouterr().err
    write(tmp_path / "pictures", {"cat/999.png": encoded(ratios.picture(0))})
    assert main([*command, "--buckets=3"]) == 1
    assert "6x10 was prepared from other pictures" in capsys.readouterr().err
