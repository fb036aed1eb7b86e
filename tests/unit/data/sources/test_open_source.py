"""Sources of pictures: layouts of folders and zips, digits, npz and tables, and everything ambiguous or hostile."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.sources.open_source import iter_images, open_source
from tests.support.pictures import encoded, noise, write, zipped

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
    for name, said in {
        "x": "9x9, others 8x8",
        "y": "8x5, not square",
    }.items():  # as `evaluate` reads, without --resolution
        with pytest.raises(ValueError, match=f"{said}; they are taken as they are: crop all to one square size$"):
            next(iter_images(tmp_path / name))
    assert [image.shape for image in iter_images(tmp_path / "x", resolution=4)] == [(2, 4, 4, 3)]


def test_native_resolution_passes_over_unreadable_pictures(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a.png": b"", "b.png": encoded(noise(8))})
    assert open_source(tmp_path / "x").resolution == 8
    write(tmp_path / "y", {"a.png": b"", "b.png": b"no"})
    with pytest.raises(ValueError, match=r"none of the 2 pictures .* the first: a.png"):
        open_source(tmp_path / "y")


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


def test_tables_that_are_links_out_of_the_folder(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x").mkdir()
    for name in ("private.parquet", "x/a.parquet"):
        parquet.write_table(arrow.table({"image": [encoded(noise(8))]}), tmp_path / name)
    (tmp_path / "x" / "again.parquet").symlink_to(tmp_path / "x" / "a.parquet")
    assert len(open_source(tmp_path / "x")) == 2
    (tmp_path / "x" / "b.parquet").symlink_to(tmp_path / "private.parquet")
    with pytest.raises(ValueError, match=r"^b.parquet in .* is a symbolic link out of the folder"):
        open_source(tmp_path / "x")


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
