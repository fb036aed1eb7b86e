"""Zips: where the class folders may lie, and hostile entries."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from selftrans.data.sources.open_source import open_source
from tests.support.pictures import encoded, noise, zipped

TREE = {
    "dog/b.png": encoded(noise(seed=1)),
    "dog/a.PNG": encoded(noise(seed=2)),
    "cat/deep/er/c.png": encoded(noise(seed=3)),
    "Zebra finch/ü ñ 猫.png": encoded(noise(seed=4)),
}
ORDER = ["Zebra finch/ü ñ 猫.png", "cat/deep/er/c.png", "dog/a.PNG", "dog/b.png"]


def test_zip_with_one_top_folder(tmp_path: Path) -> None:
    source = open_source(zipped(tmp_path / "x.zip", {f"train/{name}": data for name, data in TREE.items()}))
    assert source.classes == ("Zebra finch", "cat", "dog") and source.name(0) == "train/" + ORDER[0]


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"])
def test_zip_names_outside_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "x.zip", {"a/ok.png": encoded(noise()), name: encoded(noise())})
    with pytest.raises(ValueError, match="which leads out of it"):
        open_source(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip"]


def test_zip_links_duplicates_and_encrypted_entries_are_refused(tmp_path: Path) -> None:
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


def test_zip_entries_with_wrong_sizes_are_refused(tmp_path: Path) -> None:
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


def test_zip_damage_is_detected_by_checksum(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.ppm": b"P6 8 8 255 " + noise().tobytes()})
    data = bytearray(path.read_bytes())
    data[80] ^= 1  # a pixel: the picture would still decode
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.ppm: .*CRC"):
        open_source(path, resolution=8).read(0)
