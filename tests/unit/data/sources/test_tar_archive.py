"""Webdataset tars: captions and classes by key, read in place; unsafe, damaged and truncated files are refused in one line."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.sources import tar_archive
from selftrans.data.sources.captions import MAX_FILE_BYTES, CaptionSource
from selftrans.data.sources.clips import kind_of
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source
from selftrans.data.sources.tar_archive import only_tars
from tests.support.pictures import encoded, noise, write

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


# ---- classes

PNG = {k: encoded(noise(8, k)) for k in range(4)}


def labelled(path: Path, **options) -> Source:
    return open_source(path, resolution=8, **options)


def test_numbers_in_cls_are_the_labels(tmp_path):
    tarred(tmp_path / "x" / "b.tar", {"3.png": PNG[3], "3.cls": b"0"})
    tarred(
        tmp_path / "x" / "a.tar",
        {"1.png": PNG[1], "1.cls": b"5\n", "n/2.png": PNG[2], "n/2.cls": b" 1 ", "1.txt": b"x"},
    )
    source = labelled(tmp_path / "x")
    assert list(source.names) == ["a.tar/1.png", "a.tar/n/2.png", "b.tar/3.png"]
    assert source.labels.tolist() == [5, 1, 0] and source.classes == tuple("012345")
    assert source.ignored == {"*.txt": 1} and np.array_equal(source.read(2), noise(8, 3))
    assert labelled(tmp_path / "x" / "b.tar").labels.tolist() == [0]


def test_names_become_sorted_classes(tmp_path):
    source = labelled(
        tarred(tmp_path / "x.tar", {"1.png": PNG[1], "1.cls": b"dog", "2.png": PNG[2], "2.cls": b"a cat"})
    )
    assert source.labels.tolist() == [1, 0] and source.classes == ("a cat", "dog")


def test_classes_follow_the_rule_of_all_labels(tmp_path):
    source = labelled(tarred(tmp_path / "x.tar", {"1.png": PNG[1], "1.cls": b"7", "2.png": PNG[2], "2.cls": b"cat"}))
    assert source.labels.tolist() == [0, 1] and source.classes == ("7", "cat")
    source = labelled(tarred(tmp_path / "y.tar", {"1.png": PNG[1], "1.cls": b"1", "2.png": PNG[2], "2.cls": b"-1"}))
    assert source.labels.tolist() == [1, 0] and source.faults == {1: "no label in the .cls or .json of its key"}


def test_a_tar_of_class_files_alone_holds_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="no pictures in"):
        labelled(tarred(tmp_path / "x.tar", {"1.cls": b"7"}))


def test_json_holds_the_class_under_a_usual_or_the_given_name(tmp_path):
    files = {
        "1.png": PNG[1], "1.json": b'{"label": 2, "kind": "b", "text": "x"}',
        "2.png": PNG[2], "2.json": b'{"label": 0, "kind": "a"}',
    }  # fmt: skip
    path = tarred(tmp_path / "x.tar", files)
    assert labelled(path).labels.tolist() == [2, 0]
    found = labelled(path, label_column="kind")
    assert found.labels.tolist() == [1, 0] and found.classes == ("a", "b")


def test_key_ends_at_the_first_dot(tmp_path):
    path = tarred(tmp_path / "x.tar", {"d.1/k.left.png": PNG[1], "d.1/k.right.png": PNG[2], "d.1/k.cls": b"1"})
    assert labelled(path).labels.tolist() == [1, 1]


def test_two_files_of_one_key_are_refused_with_the_tar_that_holds_them(tmp_path):
    tarred(tmp_path / "x" / "a.tar", {"1.png": PNG[1], "1.cls": b"1"})
    tarred(tmp_path / "x" / "b.tar", {"1.png": PNG[2], "1.cls": b"1", "1.left.cls": b"2"})
    with pytest.raises(ValueError, match=r"x/b.tar/1.cls: two files have this key and extension; make the tar again"):
        labelled(tmp_path / "x")


def test_folders_are_the_classes_of_tars_without_class_files(tmp_path):
    for k, name in enumerate(("dog", "cat")):
        tarred(tmp_path / "x" / f"{k}.tar", {f"{name}/1.png": PNG[k], f"{name}/1.txt": b"x"})
    source = labelled(tmp_path / "x")
    assert source.labels.tolist() == [1, 0] and source.classes == ("cat", "dog")
    assert labelled(tarred(tmp_path / "y.tar", {"1.png": PNG[1]})).classes == ()


def test_hidden_files_next_to_tars_are_ignored(tmp_path):
    """macOS stores `._NAME` next to each file on disks of other systems."""
    tarred(tmp_path / "x" / "a.tar", {"1.png": PNG[1], "1.cls": b"0"})
    (tmp_path / "x" / "._a.tar").write_bytes(b"\0\5\x16\7Mac OS X")
    assert list(labelled(tmp_path / "x").names) == ["a.tar/1.png"]
    tarred(tmp_path / "y" / "a.tar", {"1.wav": b"RIFF"})
    (tmp_path / "y" / "._a.tar").write_bytes(b"\0\5\x16\7Mac OS X")
    assert kind_of(tmp_path / "y", None) == "sounds"


def test_splits_are_chosen_by_the_names_of_the_files(tmp_path):
    for k, name in enumerate(("train-0", "train-1", "val-0")):
        tarred(tmp_path / "x" / f"{name}.tar", {"1.png": PNG[k], "1.cls": b"0"})
    assert list(labelled(tmp_path / "x", split="train").names) == ["train-0.tar/1.png", "train-1.tar/1.png"]
    with pytest.warns(UserWarning, match="holds files of the splits train, val"):
        assert len(labelled(tmp_path / "x")) == 3


def test_folder_of_pictures_with_a_tar_next_to_them_is_read_as_before(tmp_path):
    write(tmp_path / "x", {"cat/1.png": PNG[1], "dog/2.png": PNG[2]})
    tarred(tmp_path / "x" / "backup.tar", {"1.png": PNG[1]})
    assert not only_tars(tmp_path / "x") and labelled(tmp_path / "x").classes == ("cat", "dog")
    assert not only_tars(tmp_path / "absent")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"2.cls": b"1"}, r"x.tar/1.png has no class in .cls or .json of its key; add its class"),
        ({"cat/2.png": PNG[2]}, "holds class folders and 1 picture outside them"),
        ({"1.cls": b""}, r"x.tar/1.cls holds no class: ''"),
        ({"1.cls": b"a\x1b[2J"}, r"x.tar/1.cls holds no class"),
        ({"1.cls": b"x" * 5000}, "of 5000 bytes, above the limit"),
        ({"1.cls": b"3000000"}, "has more than 1,000,000 classes"),
        ({"1.json": b"{"}, r"x.tar/1.json is not valid json"),
        ({"1.json": b"[" * 5000}, r"x.tar/1.json is not valid json"),
        ({"1.json": b'{"label": true}'}, "has no class, an integer or a name, in label, labels, cls, class"),
        ({"1.json": b'{"label": -1}'}, "the .cls or .json of its key has neither a label from 0 on nor a word"),
        ({"1.json": b"[1]"}, "has no class, an integer or a name"),
    ],
)
def test_missing_and_wrong_classes_are_one_line(tmp_path, files, message):
    path = tarred(tmp_path / "x.tar", {"1.png": PNG[1]} | files)
    with pytest.raises(ValueError, match=message) as error:
        labelled(path)
    assert str(error.value).isprintable()


def test_pictures_without_a_class_are_left_out_on_request(tmp_path, capsys):
    files = {f"{k}.png": PNG[k] for k in range(4)} | {"0.cls": b"cat", "1.cls": b"", "3.cls": b"dog"}
    path = tarred(tmp_path / "x.tar", files)
    source = labelled(path)
    assert (
        source.classes == ("cat", "dog") and source.labels[[0, 3]].tolist() == [0, 1] and list(source.faults) == [1, 2]
    )
    assert main(["prepare", str(path), "--out", str(tmp_path / "a")]) == 1
    assert (
        "2 samples of" in (said := capsys.readouterr().err)
        and "x.tar/1.png (no label: x.tar/1.cls holds no class: ''); repair" in said
    )
    assert main(["prepare", str(path), "--out", str(tmp_path / "b"), "--skip-bad"]) == 0
    assert "2 unusable pictures left out" in capsys.readouterr().out


def test_compressed_tar_says_what_to_do(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a compressed tar; decompress it"):
        labelled(tmp_path / "x.tar.gz")


def test_prepare_takes_a_folder_of_tars(tmp_path, capsys):
    files = {name: data for k in range(4) for name, data in ((f"{k}.png", PNG[k]), (f"{k}.cls", b"%d" % (k % 2)))}
    tarred(tmp_path / "x" / "0.tar", files)
    assert main(["prepare", str(tmp_path / "x"), "--out", str(tmp_path / "data")]) == 0
    assert "2 classes" in capsys.readouterr().out


def test_one_folder_may_enclose_the_class_folders(tmp_path):
    source = labelled(tarred(tmp_path / "x.tar", {"all/cat/1.png": PNG[1], "all/dog/2.png": PNG[2]}))
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1]
