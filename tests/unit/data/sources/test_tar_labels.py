"""Classes of pictures in webdataset tars: numbers or names, in .cls or .json."""

from pathlib import Path

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.sources.clip_files import kind_of
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.tar_labels import only_tars
from tests.support.pictures import encoded, noise, write
from tests.unit.data.sources.test_tar_archive import tarred

PNG = {k: encoded(noise(8, k)) for k in range(4)}


def opened(path: Path, **options):
    return open_source(path, resolution=8, **options)


def test_numbers_in_cls_are_the_labels(tmp_path):
    tarred(tmp_path / "x" / "b.tar", {"3.png": PNG[3], "3.cls": b"0"})
    tarred(
        tmp_path / "x" / "a.tar",
        {"1.png": PNG[1], "1.cls": b"5\n", "n/2.png": PNG[2], "n/2.cls": b" 1 ", "1.txt": b"x"},
    )
    source = opened(tmp_path / "x")
    assert list(source.names) == ["a.tar/1.png", "a.tar/n/2.png", "b.tar/3.png"]
    assert source.labels.tolist() == [5, 1, 0] and source.classes == tuple("012345")
    assert source.ignored == {"*.txt": 1} and np.array_equal(source.read(2), noise(8, 3))
    assert opened(tmp_path / "x" / "b.tar").labels.tolist() == [0]


def test_names_become_sorted_classes(tmp_path):
    source = opened(tarred(tmp_path / "x.tar", {"1.png": PNG[1], "1.cls": b"dog", "2.png": PNG[2], "2.cls": b"a cat"}))
    assert source.labels.tolist() == [1, 0] and source.classes == ("a cat", "dog")


def test_classes_follow_the_rule_of_all_labels(tmp_path):
    source = opened(tarred(tmp_path / "x.tar", {"1.png": PNG[1], "1.cls": b"7", "2.png": PNG[2], "2.cls": b"cat"}))
    assert source.labels.tolist() == [0, 1] and source.classes == ("7", "cat")
    source = opened(tarred(tmp_path / "y.tar", {"1.png": PNG[1], "1.cls": b"1", "2.png": PNG[2], "2.cls": b"-1"}))
    assert source.labels.tolist() == [1, 0] and source.faults == {1: "no label in the .cls or .json of its key"}


def test_a_tar_of_class_files_alone_holds_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="no pictures in"):
        opened(tarred(tmp_path / "x.tar", {"1.cls": b"7"}))


def test_json_holds_the_class_under_a_usual_or_the_given_name(tmp_path):
    files = {
        "1.png": PNG[1], "1.json": b'{"label": 2, "kind": "b", "text": "x"}',
        "2.png": PNG[2], "2.json": b'{"label": 0, "kind": "a"}',
    }  # fmt: skip
    path = tarred(tmp_path / "x.tar", files)
    assert opened(path).labels.tolist() == [2, 0]
    found = opened(path, label_column="kind")
    assert found.labels.tolist() == [1, 0] and found.classes == ("a", "b")


def test_key_ends_at_the_first_dot(tmp_path):
    path = tarred(tmp_path / "x.tar", {"d.1/k.left.png": PNG[1], "d.1/k.right.png": PNG[2], "d.1/k.cls": b"1"})
    assert opened(path).labels.tolist() == [1, 1]


def test_two_files_of_one_key_are_refused_with_the_tar_that_holds_them(tmp_path):
    tarred(tmp_path / "x" / "a.tar", {"1.png": PNG[1], "1.cls": b"1"})
    tarred(tmp_path / "x" / "b.tar", {"1.png": PNG[2], "1.cls": b"1", "1.left.cls": b"2"})
    with pytest.raises(ValueError, match=r"x/b.tar/1.cls: two files have this key and extension; make the tar again"):
        opened(tmp_path / "x")


def test_folders_are_the_classes_of_tars_without_class_files(tmp_path):
    for k, name in enumerate(("dog", "cat")):
        tarred(tmp_path / "x" / f"{k}.tar", {f"{name}/1.png": PNG[k], f"{name}/1.txt": b"x"})
    source = opened(tmp_path / "x")
    assert source.labels.tolist() == [1, 0] and source.classes == ("cat", "dog")
    assert opened(tarred(tmp_path / "y.tar", {"1.png": PNG[1]})).classes == ()


def test_hidden_files_next_to_tars_are_ignored(tmp_path):
    """macOS stores `._NAME` next to each file on disks of other systems."""
    tarred(tmp_path / "x" / "a.tar", {"1.png": PNG[1], "1.cls": b"0"})
    (tmp_path / "x" / "._a.tar").write_bytes(b"\0\5\x16\7Mac OS X")
    assert list(opened(tmp_path / "x").names) == ["a.tar/1.png"]
    tarred(tmp_path / "y" / "a.tar", {"1.wav": b"RIFF"})
    (tmp_path / "y" / "._a.tar").write_bytes(b"\0\5\x16\7Mac OS X")
    assert kind_of(tmp_path / "y", None) == "sounds"


def test_splits_are_chosen_by_the_names_of_the_files(tmp_path):
    for k, name in enumerate(("train-0", "train-1", "val-0")):
        tarred(tmp_path / "x" / f"{name}.tar", {"1.png": PNG[k], "1.cls": b"0"})
    assert list(opened(tmp_path / "x", split="train").names) == ["train-0.tar/1.png", "train-1.tar/1.png"]
    with pytest.warns(UserWarning, match="holds files of the splits train, val"):
        assert len(opened(tmp_path / "x")) == 3


def test_folder_of_pictures_with_a_tar_next_to_them_is_read_as_before(tmp_path):
    write(tmp_path / "x", {"cat/1.png": PNG[1], "dog/2.png": PNG[2]})
    tarred(tmp_path / "x" / "backup.tar", {"1.png": PNG[1]})
    assert not only_tars(tmp_path / "x") and opened(tmp_path / "x").classes == ("cat", "dog")
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
        opened(path)
    assert str(error.value).isprintable()


def test_pictures_without_a_class_are_left_out_on_request(tmp_path, capsys):
    files = {f"{k}.png": PNG[k] for k in range(4)} | {"0.cls": b"cat", "1.cls": b"", "3.cls": b"dog"}
    path = tarred(tmp_path / "x.tar", files)
    source = opened(path)
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
        opened(tmp_path / "x.tar.gz")


def test_prepare_takes_a_folder_of_tars(tmp_path, capsys):
    files = {name: data for k in range(4) for name, data in ((f"{k}.png", PNG[k]), (f"{k}.cls", b"%d" % (k % 2)))}
    tarred(tmp_path / "x" / "0.tar", files)
    assert main(["prepare", str(tmp_path / "x"), "--out", str(tmp_path / "data")]) == 0
    assert "2 classes" in capsys.readouterr().out


def test_one_folder_may_enclose_the_class_folders(tmp_path):
    source = opened(tarred(tmp_path / "x.tar", {"all/cat/1.png": PNG[1], "all/dog/2.png": PNG[2]}))
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1]
