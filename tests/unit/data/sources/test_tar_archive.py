"""Webdataset tars: samples by key, read in place; unsafe, damaged and truncated files are refused in one line."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selftrans.data.sources import tar_archive
from selftrans.data.sources.captions import MAX_FILE_BYTES, CaptionSource
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source
from tests.support.pictures import encoded, noise

PICTURE = encoded(noise(8, 1))


def opened(path: Path) -> Source:
    return open_source(path, resolution=8, captions=CaptionSource())


def tarred(
    path: Path, files: dict[str, bytes], change: Callable[[tarfile.TarInfo], object] = lambda info: None
) -> Path:
    """A tar of these files, each header changed before it is written."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def samples(start: int, count: int) -> dict[str, bytes]:
    files = {}
    for i in range(start, start + count):
        files |= {
            f"./{i:04d}.png": encoded(noise(8, i)),
            f"./{i:04d}.txt": f"picture {i}".encode(),
            f"./{i:04d}.cls": b"3",
        }
        files[f"./{i:04d}.json"] = b'{"key": "x", "status": "success"}'
    return files


def test_samples_of_several_tars(tmp_path: Path) -> None:
    tarred(tmp_path / "x" / "0.tar", samples(0, 3))
    extra = {
        "nested/k.jpg": encoded(noise(8, 9), "PNG"),
        "nested/k.json": b'{"captions": ["one", "two"]}',
        "n/k.cls": b"",
    }
    tarred(tmp_path / "x" / "1.tar", samples(3, 2) | extra)
    source = opened(tmp_path / "x")
    expected = [f"{i // 3}.tar/{i:04d}.png" for i in range(5)]
    assert list(source.names) == [*expected, "1.tar/nested/k.jpg"]
    assert source.captions == [*((f"picture {i}",) for i in range(5)), ("one", "two")] and not source.faults
    for i in (5, 0, 4):
        assert np.array_equal(source.read(i), noise(8, 9 if i == 5 else i))
    assert source.ignored == {"*.cls": 6} and source.classes == ()
    alone = opened(tmp_path / "x" / "0.tar")
    assert list(alone.names) == expected[:3] and alone.fingerprint != source.fingerprint


def test_long_names_are_read(tmp_path: Path) -> None:
    """Names beyond 100 bytes have headers of their own."""
    name = "é" * 90
    source = opened(tarred(tmp_path / "a.tar", {f"{name}.png": PICTURE, f"{name}.txt": b"long"}))
    assert list(source.names) == [f"a.tar/{name}.png"] and source.captions == [("long",)]


def test_missing_halves_are_named(tmp_path: Path) -> None:
    source = opened(
        tarred(
            tmp_path / "a.tar",
            {
                "a.png": PICTURE,
                "b.txt": b"no picture",
                "c.png": PICTURE,
                "c.txt": b" ",
                "d.png": PICTURE,
                "d.txt": b"x" * (MAX_FILE_BYTES + 1),
            },
        )
    )
    assert {source.names[i]: reason for i, reason in source.faults.items()} == {
        "a.tar/a.png": "a picture without a caption",
        "a.tar/b.txt": "a caption without its picture",
        "a.tar/c.png": "its captions are empty",
        "a.tar/d.png": f"its captions take more than {MAX_FILE_BYTES} bytes",
    }


def link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


UNSAFE: dict[str, tuple[str, Callable[[tarfile.TarInfo], object], str]] = {
    "up": ("../a.png", lambda info: None, "holds the name '../a.png', which leads out of it; do not trust this tar"),
    "root": ("/a.png", lambda info: None, "which leads out"),
    "drive": ("C:\\a.png", lambda info: None, "which leads out"),
    "link": ("a.png", link, "is a link, a device or sparse"),
    "hard link": ("a.png", lambda info: setattr(info, "type", tarfile.LNKTYPE), "is a link, a device or sparse"),
    "pipe": ("a.png", lambda info: setattr(info, "type", tarfile.FIFOTYPE), "is a link, a device or sparse"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_members_are_refused(tmp_path: Path, case: str) -> None:
    name, change, message = UNSAFE[case]
    path = tarred(tmp_path / "a.tar", {"ok.png": PICTURE})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        change(info)
        tar.addfile(info)
    with pytest.raises(ValueError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_archive, "MAX_PICTURE_BYTES", 3)
    with pytest.raises(ValueError, match=r"holds 'a.\w+' of \d+ bytes, above the limit of 3"):
        opened(tarred(tmp_path / "a.tar", {"a.png": PICTURE, "a.txt": b"four"}))


def test_double_names_are_refused(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", {"a.png": PICTURE, "./a.png": PICTURE, "a.txt": b"x"})
    with pytest.raises(ValueError, match=r"holds a.tar/a.png twice"):
        opened(path)


def test_compressed_truncated_and_damaged_files_are_refused(tmp_path: Path) -> None:
    """Also a file that was cut between two members: without its end, samples are missing."""
    path = tarred(tmp_path / "a.tar", samples(0, 3))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = [info.offset for info in tar]
    cuts = (1000, starts[4], starts[4] + 100, starts[-1], len(data) - 10240, 512)
    for wrong in (b"", b"x" * 2000, b"\x1f\x8b" + data, *(data[:cut] for cut in cuts)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"is not a complete tar file .* decompress or make it again") as caught:
            opened(path)
        assert "\n" not in str(caught.value)
    negative = bytearray(data)  # a size of -512 in base 256, which would lead back to the same header
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = f"{sum(negative[:512]):06o}\0 ".encode()
    path.write_bytes(negative)
    with pytest.raises(ValueError, match=r"a.tar"):
        opened(path)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    tarred(tmp_path / "secret.tar", samples(0, 1))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.tar").symlink_to(tmp_path / "secret.tar")
    with pytest.raises(ValueError, match="is a symbolic link out of the folder"):
        opened(tmp_path / "x")
