"""Sources of pictures: layouts, decoding against PIL and pixels made by hand, everything broken or hostile."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selftrans.data import iter_images, open_source
from selftrans.data.decode import centre_square


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side: int = 8, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read_one(tmp_path: Path, data: bytes, name: str = "a.png", **options: int) -> np.ndarray:
    return open_source(write(tmp_path / "one", {name: data}), **options).read(0)  # type: ignore[arg-type]


TREE = {
    "dog/b.png": encoded(noise(seed=1)),
    "dog/a.PNG": encoded(noise(seed=2)),
    "cat/deep/er/c.png": encoded(noise(seed=3)),
    "Zebra finch/ü ñ 猫.png": encoded(noise(seed=4)),
}
ORDER = ["Zebra finch/ü ñ 猫.png", "cat/deep/er/c.png", "dog/a.PNG", "dog/b.png"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_in_code_point_order(tmp_path: Path, kind: str) -> None:
    source = open_source(write(tmp_path / "x", TREE) if kind == "folder" else zipped(tmp_path / "x.zip", TREE))
    assert source.classes == ("Zebra finch", "cat", "dog")
    assert [source.name(i) for i in range(len(source))] == ORDER
    assert [source.label(i) for i in range(4)] == [0, 1, 2, 2]
    assert (source.resolution, source.channels) == (8, 3)
    assert np.array_equal(source.read(3), noise(seed=1)) and source.read(3).dtype == np.uint8
    name, label, image = source.picture(0)
    assert (name, label) == (ORDER[0], 0) and np.array_equal(image, noise(seed=4))


def test_zip_below_one_top_folder(tmp_path: Path) -> None:
    source = open_source(zipped(tmp_path / "x.zip", {f"train/{name}": data for name, data in TREE.items()}))
    assert source.classes == ("Zebra finch", "cat", "dog") and source.name(0) == "train/" + ORDER[0]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_flat_is_unconditional(tmp_path: Path, kind: str) -> None:
    files = {"b.png": encoded(noise()), "a.png": encoded(noise())}
    source = open_source(write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files))
    assert source.classes == () and source.labels.tolist() == [0, 0] and source.name(0) == "a.png"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_one_class(tmp_path: Path, kind: str) -> None:
    files = {"only/b.png": encoded(noise()), "only/a.png": encoded(noise())}
    source = open_source(write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files))
    assert source.classes == ("only",) and source.labels.tolist() == [0, 0]


def test_files_that_are_no_pictures_are_counted(tmp_path: Path) -> None:
    junk = {
        "dog/.hidden.png": b"",
        "__MACOSX/dog/a.png": b"",
        "dog/Thumbs.db": b"",
        "dog/notes.txt": b"",
        ".git/x": b"",
    }
    for source in (
        open_source(write(tmp_path / "x", TREE | junk)),
        open_source(zipped(tmp_path / "x.zip", TREE | junk)),
    ):
        assert len(source) == 4 and source.classes == ("Zebra finch", "cat", "dog")
        assert source.ignored == {"hidden or system files": 4, "files that are no pictures": 1}


def test_digits_are_the_scans_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source, data = open_source("digits"), load_digits()
    assert (len(source), source.channels, source.resolution, len(source.classes)) == (1797, 1, 8, 10)
    assert source.labels.tolist() == data.target.tolist()
    # every possible value, 0 .. 16, by exact fractions
    table = np.array([round(v * 255 / 16) for v in range(17)])
    for i in (0, 5, 1796):
        assert np.array_equal(source.read(i)[..., 0], table[data.images[i].astype(int)])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_nothing_to_read(tmp_path: Path, kind: str) -> None:
    files = {"readme.txt": b"x"}
    empty = write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files)
    with pytest.raises(ValueError, match=r"no pictures in .*1 files that are no pictures"):
        open_source(empty)


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source"):
        open_source(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither an existing path nor a data set"):
        open_source("nobody/nothing")
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="not a folder, a parquet file or a readable zip"):
        open_source(tmp_path / "x.zip")
    with pytest.raises(ValueError, match="resolution 0"):
        open_source("digits", resolution=0)


def test_layouts_that_are_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class folders and 1 pictures beside them, such as loose.png"):
        open_source(write(tmp_path / "x", TREE | {"loose.png": encoded(noise())}))
    write(tmp_path / "y", TREE)
    (tmp_path / "y" / "aardvark").mkdir()
    with pytest.raises(ValueError, match=r"class folder 'aardvark' .* holds no picture"):
        open_source(tmp_path / "y")


def test_native_resolution_needs_squares_of_one_size(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a.png": encoded(noise(8)), "b.png": encoded(noise(9))})
    with pytest.raises(ValueError, match=r"b.png .* is 9x9, others 8x8; give --resolution"):
        open_source(tmp_path / "x")
    write(tmp_path / "y", {"a.png": encoded(noise(8)[:5])})
    with pytest.raises(ValueError, match=r"a.png .* is 8x5, not square; give --resolution"):
        open_source(tmp_path / "y")
    assert [image.shape for image in iter_images(tmp_path / "x", resolution=4)] == [(2, 4, 4, 3)]


# --- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["palette", "grey", "one bit", "cmyk", "rgba", "grey alpha", "palette alpha", "16 bit"]
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    rgb, grey, alpha = noise(seed=5), noise(seed=6, channels=1), noise(seed=7, channels=1)
    white = lambda x, a: x * (a / 255) + 255 * (1 - a / 255)  # noqa: E731 - over white, in exact arithmetic
    if mode == "palette":
        image = Image.fromarray(grey // 64)
        image.putpalette(list(range(12)))  # value v shows as 3v, 3v + 1, 3v + 2
        expected = (grey // 64)[..., None] * 3.0 + np.arange(3)
    elif mode == "grey":
        image, expected = Image.fromarray(grey), np.repeat(grey[..., None], 3, axis=2)
    elif mode == "one bit":
        image, expected = Image.fromarray(grey > 99), np.repeat((grey > 99)[..., None] * 255.0, 3, axis=2)
    elif mode == "cmyk":
        image = Image.fromarray(np.concatenate([255 - rgb, np.zeros((8, 8, 1), np.uint8)], axis=2), "CMYK")
        expected = rgb
    elif mode == "rgba":
        image = Image.fromarray(np.concatenate([rgb, alpha[..., None]], axis=2))
        expected = white(rgb, alpha[..., None])
    elif mode == "grey alpha":
        image = Image.fromarray(np.stack([grey, alpha], axis=2))
        expected = np.repeat(white(grey, alpha)[..., None], 3, axis=2)
    elif mode == "palette alpha":
        image = Image.fromarray(grey // 64)
        image.putpalette(list(range(12)))
        image.info["transparency"] = 2
        expected = np.where((grey // 64 == 2)[..., None], 255.0, (grey // 64)[..., None] * 3.0 + np.arange(3))
    else:
        deep = np.random.default_rng(8).integers(0, 65536, (8, 8), dtype=np.uint16)
        image, expected = Image.fromarray(deep), np.repeat(np.rint(deep / 257)[..., None], 3, axis=2)
    image = read_one(
        tmp_path, encoded(image, "TIFF" if mode == "cmyk" else "PNG"), "a.tif" if mode == "cmyk" else "a.png"
    )
    assert image.shape == (8, 8, 3)
    assert np.abs(image - expected.astype(float)).max() <= 1  # a rounding, no more


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: the viewer must turn it by 90 degrees clockwise
    stored = np.rot90(upright, k=1)
    image = read_one(tmp_path, encoded(np.ascontiguousarray(stored), "JPEG", exif=exif, quality=95), "a.jpg")
    assert image[:6].min() > 240 and image[10:].max() < 15


def adm(image: Image.Image, side: int) -> np.ndarray:
    """The field's recipe to the letter: halve, resize the whole picture, then crop."""
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return array[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (37, 100), (33, 33), (16, 16), (9, 13), (200, 65), (17, 16)])
def test_resize_is_that_of_the_field(size: tuple[int, int]) -> None:
    y, x = np.mgrid[: size[1], : size[0]]
    rings = (127.5 + 127.5 * np.sin((x**2 + y**2) / 40)).astype(np.uint8)
    image = Image.fromarray(np.stack([rings, 255 - rings, (3 * x + y).astype(np.uint8)], axis=2))
    difference = np.asarray(centre_square(image, 16)).astype(int) - adm(image, 16)
    assert np.abs(difference).max() <= 1


def test_box_halving_is_a_mean_of_four(tmp_path: Path) -> None:
    array = noise(16, seed=9)
    mean = array.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(read_one(tmp_path, encoded(array), resolution=8) - mean).max() <= 1  # PIL rounds after each direction


def test_crop_is_central(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = noise(8, seed=10)
    assert np.array_equal(read_one(tmp_path, encoded(wide), resolution=8), noise(8, seed=10))


def test_a_very_long_picture_costs_no_memory(tmp_path: Path) -> None:
    # resized whole, it would be 256 x 5,120,000
    image = read_one(tmp_path, encoded(np.full((1, 20_000), 77, np.uint8)), resolution=256)
    assert image.shape == (256, 256, 3) and (image == 77).all()


def test_grey_on_request(tmp_path: Path) -> None:
    array = noise(8, seed=11, channels=1)
    assert np.array_equal(read_one(tmp_path, encoded(array), channels=1)[..., 0], array)


# --- broken and hostile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("fault", ["truncated", "zero bytes", "text", "float", "svg"])
def test_unreadable_pictures_are_named(tmp_path: Path, kind: str, fault: str) -> None:
    whole = encoded(noise(64), "JPEG")
    data = {
        "truncated": whole[: len(whole) // 2],
        "zero bytes": b"",
        "text": b"hello",
        "float": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
        "svg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",  # would start an outside program
    }[fault]
    files = {"cat/ok.png": encoded(noise(8)), "dog/bad one.jpg": data}
    source = open_source(
        write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files), resolution=8
    )
    assert source.read(0).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"^dog/bad one.jpg: cannot be read as a picture \(.+\)$"):
        source.read(1)


def test_native_resolution_passes_over_unreadable_pictures(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a.png": b"", "b.png": encoded(noise(8))})
    assert open_source(tmp_path / "x").resolution == 8
    write(tmp_path / "y", {"a.png": b"", "b.png": b"no"})
    with pytest.raises(ValueError, match=r"none of the 2 pictures .* the first: a.png"):
        open_source(tmp_path / "y")


def test_decompression_bomb(tmp_path: Path) -> None:
    # a header that promises 60000 x 60000 pixels, in a hundred bytes
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    import zlib

    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match=r"a.png: cannot be read .*pixels"):
        read_one(tmp_path, data + b"\0\0\0\0IDAT", resolution=8)


def test_picture_above_the_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="more than the limit of 40"):
        read_one(tmp_path, encoded(noise(8)), resolution=8)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"])
def test_zip_names_that_climb_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "x.zip", {"a/ok.png": encoded(noise()), name: encoded(noise())})
    with pytest.raises(ValueError, match="which leads out of it"):
        open_source(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip"]


def test_zip_entries_that_are_links_doubled_or_encrypted(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match=r"symbolic link 'a/link.png'"):
        open_source(tmp_path / "link.zip")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.png", encoded(noise()))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", encoded(noise()))
    with pytest.raises(ValueError, match=r"a.png twice"):
        open_source(tmp_path / "two.zip")
    data = bytearray(zipped(tmp_path / "x.zip", {"a.png": encoded(noise())}).read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 8] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ValueError, match="encrypted"):
        open_source(tmp_path / "x.zip")


def test_zip_sizes_are_not_believed(tmp_path: Path) -> None:
    def with_size(size: int) -> Path:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", bytes(1 << 20))
        data = bytearray(path.read_bytes())
        directory = data.rindex(b"PK\x01\x02")
        data[directory + 24 : directory + 28] = struct.pack("<I", size)
        path.write_bytes(data)
        return path

    with pytest.raises(ValueError, match="expands to 4000000000 bytes"):
        open_source(with_size(4_000_000_000), resolution=8)
    with pytest.raises(ValueError, match=r"^a.png: cannot be read"):  # it says 10 bytes and expands to a million
        open_source(with_size(10), resolution=8).read(0)


def test_zip_damage_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.ppm": b"P6 8 8 255 " + noise().tobytes()})
    data = bytearray(path.read_bytes())
    data[80] ^= 1  # a pixel: the picture would still decode
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.ppm: .*CRC"):
        open_source(path, resolution=8).read(0)


def test_symbolic_links(tmp_path: Path) -> None:
    write(tmp_path / "outside", {"secret.png": encoded(noise())})
    root = write(tmp_path / "x", TREE)
    (root / "dog" / "inside.png").symlink_to(root / "dog" / "b.png")
    (root / "dog" / "loop").symlink_to(root / "dog")
    source = open_source(root)
    assert "dog/inside.png" in source.names and len(source) == 5
    assert source.ignored == {"symbolic links to folders": 1}
    for target in ("outside", "outside/secret.png"):
        leak = root / "dog" / "leak.png"
        leak.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=r"dog/leak.png .* symbolic link out of the folder"):
            open_source(root)
        leak.unlink()
    os.mkfifo(root / "dog" / "pipe.png")  # opening it would wait for ever
    assert open_source(root).ignored["broken links, pipes and devices"] == 1


# --- npz and tables ---------------------------------------------------------------------------------------------------


def test_npz_is_streamed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", images)
        batches = list(iter_images(tmp_path / "x.npz", 3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert np.array_equal(np.concatenate(batches), images)
    with pytest.raises(ValueError, match="not of resolution 16"):
        next(iter_images(tmp_path / "x.npz", resolution=16))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.array([{"pickled": 1}], dtype=object),
    ],
    ids=["float", "channels first", "one image", "fortran", "none", "pickled"],
)
def test_npz_of_another_kind(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match="holds no uint8 array arr_0"):
        next(iter_images(tmp_path / "x.npz"))


def test_npz_whose_header_lies(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 8, 8, 3)})
    zipped(tmp_path / "x.npz", {"arr_0.npy": buffer.getvalue() + bytes(500)})
    with pytest.raises(ValueError, match="does not agree with its"):
        next(iter_images(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", other=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="arr_0"):
        next(iter_images(tmp_path / "y.npz"))


def test_iter_images_keeps_grey_only_if_all_are(tmp_path: Path) -> None:
    grey = {f"{i}.png": encoded(noise(8, i, channels=1)) for i in range(3)}
    assert [b.shape for b in iter_images(write(tmp_path / "x", grey), 2)] == [(2, 8, 8, 1), (1, 8, 8, 1)]
    write(tmp_path / "x", {"3.png": encoded(noise(8))})
    images = np.concatenate(list(iter_images(tmp_path / "x")))
    assert images.shape == (4, 8, 8, 3)
    assert np.array_equal(images[1, ..., 2], noise(8, 1, channels=1)) and np.array_equal(images[3], noise(8))


def test_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(noise(8, i)), "path": None} for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [1, 0, 1, 0]}, features=features)
    (tmp_path / "x").mkdir()
    rows.to_parquet(tmp_path / "x" / "train.parquet")
    for where in (tmp_path / "x", tmp_path / "x" / "train.parquet"):
        source = open_source(where)
        assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0, 1, 0]
        assert np.array_equal(source.read(2), noise(8, 2))


def test_plain_parquet_and_its_faults(tmp_path: Path) -> None:
    """Columns that other tools write: bytes and integers; labels that are none; a cell that names a file."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def table(name: str, image: list, **columns: list) -> Path:
        parquet.write_table(arrow.table({"image": image, **columns}), tmp_path / name)
        return tmp_path / name

    pictures = [encoded(noise(8, i)) for i in range(3)]
    source = open_source(table("a.parquet", pictures, label=[2, 0, 2]))
    assert source.classes == ("0", "1", "2") and np.array_equal(source.read(1), noise(8, 1))
    assert open_source(table("b.parquet", pictures)).classes == ()
    with pytest.raises(ValueError, match="has no class in row 1"):
        open_source(table("c.parquet", pictures, label=[2, -1, 2]))
    with pytest.raises(ValueError, match="has no class in row 1"):
        open_source(table("d.parquet", pictures, label=[2, None, 2]))
    with pytest.raises(ValueError, match="does not hold integers"):
        open_source(table("d.parquet", pictures, kind=["a", "b", "c"]), label_column="kind")
    with pytest.raises(ValueError, match=r"several label columns: label, class; choose"):
        open_source(table("e.parquet", pictures, label=[0, 1, 2], **{"class": [0, 0, 0]}))
    assert open_source(tmp_path / "e.parquet", label_column="class").classes == ("0",)
    secret = write(tmp_path / "s", {"secret.png": encoded(noise(8))}) / "secret.png"
    named = table("f.parquet", [{"bytes": None, "path": str(secret)}, {"bytes": pictures[0], "path": None}])
    source = open_source(named)
    assert np.array_equal(source.read(1), noise(8, 0))
    with pytest.raises(ValueError, match="names a file in place of holding the picture"):
        source.read(0)
