"""`dataset.json` of StyleGAN's and EDM's tools: labels in place of folders, which only number the pictures there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.sources.clips import MediaOptions, open_clips
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Source
from tests.support.clips import sounds
from tests.support.pictures import encoded, noise, write, zipped

FILES = {f"0000{k // 3}/img{k:08d}.png": encoded(noise(8, k)) for k in range(5)}
LABELS = [[name, label] for name, label in zip(FILES, (1, 9, 5, 1, 9), strict=True)]


def made(tmp_path: Path, kind: str, content: object, files: dict[str, bytes] | None = None) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    every = (FILES if files is None else files) | {"dataset.json": data}
    if kind == "folder":
        return write(tmp_path / "x", every)
    top = "" if kind == "zip" else "pictures/"
    tmp_path.mkdir(exist_ok=True)
    return zipped(tmp_path / "x.zip", {top + name: data for name, data in every.items()})


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of one folder"])
def test_labels_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    source = open_source(made(tmp_path, kind, {"labels": LABELS[::-1]}))
    assert source.labels.tolist() == [1, 9, 5, 1, 9] and source.classes == tuple(map(str, range(10)))
    assert source.ignored == {} and np.array_equal(source.read(3), noise(8, 3))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_file_without_labels(tmp_path: Path, kind: str) -> None:
    assert open_source(made(tmp_path / "a", kind, {"labels": None})).classes == ()
    other = open_source(made(tmp_path / "b", kind, {"images": []}))  # of another tool
    assert other.classes == ("00000", "00001") and other.ignored == {"*.json": 1}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_at_the_top_may_have_labels(tmp_path: Path, kind: str) -> None:
    files = {"a.png": encoded(noise(8)), "deep/b.png": encoded(noise(8))}
    source = open_source(made(tmp_path, kind, {"labels": [["deep\\b.png", 1], ["a.png", 0]]}, files))
    assert source.labels.tolist() == [0, 1] and source.classes == ("0", "1")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [["a", 1]]}, "labels none of the 5 files: its first name is a, theirs 00000/img00000000.png"),
        ({"labels": [["a", 1.5]]}, r"a name and a word or an integer from 0 to 999999 each, not \['a', 1.5\]"),
        ({"labels": [["a", -1]]}, r"not \['a', -1\]"),
        ({"labels": [["a", [0, 1]]]}, "a name and a word or an integer"),
        ({"labels": {"a": 1}}, "a name and a word or an integer"),
        ({"labels": [["a", 1], ["a", 2]]}, "gives a the labels 1 and 2"),
        (b'{"labels": [{"file": "a", "label": 1, "label": 2}]}', "has label twice, as 1 and 2"),
        (b"{", "is not valid json"),
        (b"[" * 100_000, "is not valid json"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, kind: str, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset.json.*{message}") as error:
        open_source(made(tmp_path, kind, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_words_in_dataset_json_and_pictures_without_a_label(tmp_path: Path, kind: str) -> None:
    words = [[name, {1: "cat", 5: None}.get(label, "dog")] for name, label in LABELS]
    source = open_source(made(tmp_path, kind, {"labels": words[:-1]}))
    assert source.classes == ("cat", "dog") and source.labels[[0, 1, 3]].tolist() == [0, 1, 0]
    assert list(source.faults) == [2, 4] and source.faults[2].startswith("no label in ")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_truth_values_are_words_and_whole_floats_numbers(tmp_path: Path, kind: str) -> None:
    truths = [[name, label > 4] for name, label in LABELS]
    assert open_source(made(tmp_path / "a", kind, {"labels": truths})).classes == ("False", "True")
    floats = [[name, float(label)] for name, label in LABELS]
    assert open_source(made(tmp_path / "b", kind, {"labels": floats})).labels.tolist() == [1, 9, 5, 1, 9]


# ---- a file that is given

PICTURES = {name: encoded(noise(8, k)) for k, name in enumerate(("a.png", "sub/b.png", "sub/ü c.png", "d.png"))}


def given(tmp_path: Path, name: str, content: str | bytes, kind: str = "folder") -> Source:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    where = write(tmp_path / "x", PICTURES) if kind == "folder" else zipped(tmp_path / "x.zip", PICTURES)
    return open_source(where, reading=Reading(labels=tmp_path / name))


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", "path,label\na.png,cat\nsub/b.png,dog\n\nsub/ü c.png,cat\nd.png,eel\n"),
        ("l.csv", "a.png,cat\n./sub/b.png,dog\nsub\\ü c.png,cat\n d.png , eel \n"),
        ("l.csv", '\ufeffimg;breed\r\n"a.png";"cat"\r\nb.png;dog\r\nx/ü c.png;cat\r\nd;eel\r\n'),
        ("l.csv", "split,Label,File_Name\n0,cat,a.png\n0,dog,sub/b.png\n1,cat,sub/ü c.png\n1,eel,d.png\n"),
        ("l.csv", "path,label\ra.png,cat\rsub/b.png,dog\rsub/ü c.png,cat\rd.png,eel\r"),  # lines of old Macs
        ("l.csv", "path,label\na.png,cat\nsub/b.png,dog\nsub/u\u0308 c.png,cat\nd.png,eel\n"),  # ü as two characters
        ("l.tsv", "\ufeffa.png\tcat\nb.png\tdog\nü c.png\tcat\nd.png\teel".encode("utf-16-le")),  # text of Excel
        ("l.TSV", "a.png\tcat\nsub/b.png\tdog\nsub/ü c.png\tcat\nd.png\teel"),
        ("l.json", '{"a.png": "cat", "sub/b.png": "dog", "sub/ü c.png": "cat", "d.png": "eel"}'),
        ("l.json", '{"labels": [["a.png", "cat"], ["sub/b.png", "dog"], ["sub/ü c.png", "cat"], ["d.png", "eel"]]}'),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": "cat"}\n{"file_name": "sub/b.png", "label": "dog", "x": 1}\n\n'
            '{"file_name": "sub/ü c.png", "label": "cat", "text": "\u2028"}\n{"file_name": "d.png", "label": "eel"}\n',
        ),
        ("l.jsonl", '["a.png", "cat"]\r["b.png", "dog"]\r["sub/ü c.png", "cat"]\r["d.png", "eel"]\r'),
    ],
)
def test_labels_are_those_of_a_given_file(tmp_path: Path, name: str, content: str | bytes, kind: str) -> None:
    source = given(tmp_path, name, content, kind)
    assert source.classes == ("cat", "dog", "eel") and not source.faults
    assert [source.classes[label] for label in source.labels] == ["cat", "eel", "dog", "cat"]  # of the sorted names
    assert np.array_equal(source.read(2), noise(8, 1))


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        (
            "l.csv",
            "patient;Image File;Diagnosis (final)\n1;a.png;cat\n1;b.png;dog\n2;x/ü c.png;cat\n2;d;eel\n",
            "diagnosis (final)",
        ),
        (
            "l.csv",
            "Scan,label,target\nmissing.png,cat,1\na.png,cat,1\nb.png,dog,2\nü c.png,cat,1\nd.png,eel,3\n",
            "Label",
        ),
        ("l.csv", "Scan,name\na.png,cat\nb.png,dog\nü c.png,cat\nd.png,eel\n", "name"),
        ("l.csv", "Scan,grade,label\na.png,1,cat\nb.png,2,dog\nü c.png,1,cat\nd.png,3,eel\n", None),
        (
            "l.json",
            '[{"Path": "a.png", "Kind": "cat", "label": 1}, {"Path": "sub/b.png", "Kind": "dog", "label": 1}, '
            '{"Path": "sub/ü c.png", "Kind": "cat", "label": 1}, {"Path": "d.png", "Kind": "eel", "label": 1}]',
            "kind",
        ),
    ],
)
def test_columns_of_other_names(tmp_path: Path, name: str, content: str, column: str | None) -> None:
    (tmp_path / name).write_text(content)
    reading = Reading(labels=tmp_path / name, label_column=column)
    where = write(tmp_path / "x", PICTURES)
    if "missing" in content:
        with pytest.warns(UserWarning, match="1 name in .* is not in the source, such as missing.png"):
            source = open_source(where, reading=reading)
    else:
        source = open_source(where, reading=reading, label_column=column)
    assert [source.classes[label] for label in source.labels] == ["cat", "eel", "dog", "cat"] and not source.faults


def test_two_columns_of_which_one_has_the_labels_need_no_known_names(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("breed,scan\ncat,other.png\n")
    reading = Reading(labels=tmp_path / "l.csv", label_column="breed")
    with pytest.raises(ValueError, match=r"its first name is other.png"):
        open_source(write(tmp_path / "x", PICTURES), reading=reading)


def test_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,label\na.png,cat\n")
    with pytest.raises(
        ValueError, match=r"it has no column grade, but 2 columns, path, label.*; give a csv of path,label"
    ):
        open_source(write(tmp_path / "x", PICTURES), reading=Reading(labels=tmp_path / "l.csv", label_column="Grade"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "l.csv",
            "a.png\nb.png\n",
            r"l.csv .* \(it has 1 column, a.png, and none are named path and label\); give a csv",
        ),
        ("l.csv", "x,y,z\n1,2,3\n", r"it has 3 columns, x, y, z, and none are named"),
        ("l.csv", "path,label,class\na.png,1,2\n", "has the labels label and class: keep one"),
        ("l.csv", "path,label\na.png\n", "l.csv .*line 2 has 1 of the columns"),
        ("l.csv", "a.png,cat\na.png,dog\n", "gives a.png the labels cat and dog"),
        ("l.csv", "", "l.csv holds no names; give the path and the label of each picture"),
        ("l.csv", "path,label,Label\na.png,1,2\n", "line 2 has two values in the columns label, 1 and 2: keep one"),
        ("l.json", '{"a.png": 1, "a.png": 2}', "has a.png twice, as 1 and 2"),
        ("l.csv", "image,image\na.png,a.png\n", r"2 columns, image, image, and none are named"),
        ("l.json", '{"labels": [["a.png", 1]], "labels": [["a.png", 2]]}', r"it has labels twice, as \[\['a.png"),
        ("l.json", '[{"path": "a.png", "path": "d.png", "label": 1}]', "it has path twice, as 'a.png' and 'd.png'"),
        ("l.jsonl", '{"path": "a.png", "label": "x", "label": "y"}', "it has label twice, as 'x' and 'y'"),
        ("l.csv", b"\xff\xfea.png,1", "is not text in UTF-8, so store it as UTF-8"),
        ("l.csv", "a.png,\nd.png,-1\n", "has neither a label from 0 on nor a word"),
        ("l.json", "[1]", "a name and a word or an integer"),
        ("l.json", "3", "holds no list of labels"),
        ("l.jsonl", "{}\n", "a name and a word or an integer"),
        ("l.jsonl", '{"path": "a.png", "label": 1}\n{', r"line 2 is not valid json: Expecting .* at character 2\)"),
        ("l.txt", "a.png,1", "does not end in .csv, .tsv, .json, .jsonl"),
    ],
)
def test_given_file_that_does_not_fit_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        given(tmp_path, name, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.json", '[{"path": "a.png", "label": "c", "n": 1, "n": 2}, {"path": "d.png", "label": "d"}]'),
        ("l.json", '{"n": 1, "n": 2, "labels": {"a.png": "c", "d.png": "d", "d.png": "d"}}'),
        ("l.csv", "id,image,label,label\n7,a.png,c,c\n8,d.png,d, d\n"),
        ("l.csv", "image,n,n,label,image\na.png,1,2,c,a.png\nd.png,3,4,d,d.png\n"),
    ],
)
def test_repeated_keys_and_columns_that_do_not_matter(tmp_path: Path, name: str, content: str) -> None:
    source = given(tmp_path, name, content)
    assert source.classes == ("c", "d") and source.labels.tolist()[:2] == [0, 1]


def test_first_line_with_a_title_of_labels_is_no_picture(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a name that no picture has
        source = given(tmp_path, "l.csv", "img.file,label\na.png,c\nd.png,d\n")
        assert source.classes == ("c", "d")
        assert given(tmp_path, "m.csv", "a.png,label\nd.png,d\n").classes == ("d", "label")


def test_given_labels_belong_to_folders_and_zips(tmp_path: Path) -> None:
    reading = Reading(labels=tmp_path / "missing.csv")
    with pytest.raises(ValueError, match=r"^digits is not a folder or a zip of pictures, which --labels .* needs$"):
        open_source("digits", reading=reading)
    with pytest.raises(ValueError, match=r"missing.csv cannot be read as labels \(No such file"):
        open_source(write(tmp_path / "x", PICTURES), reading=reading)


def test_prepare_with_a_file_of_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, labels, out = write(tmp_path / "x", PICTURES), tmp_path / "l.csv", tmp_path / "out"
    labels.write_text("a.png,cat\nb.png,dog\nd.png,\n")
    argv = ["prepare", str(where), f"--out={out}", f"--labels={labels}"]
    assert main(argv) == 1
    assert (
        "2 samples of" in (said := capsys.readouterr().err)
        and "d.png (no label in l.csv); repair them, or leave" in said
    )
    assert main([*argv, "--skip-bad"]) == 0
    data = Dataset.open(out)
    assert data.manifest.classes == ("cat", "dog") and data.labels.tolist() == [0, 1]
    assert [reason for _, reason in data.manifest.skipped] == ["no label in l.csv"] * 2
    assert "2 unusable pictures left out" in capsys.readouterr().out
    assert main([*argv, "--skip-bad"]) == 0  # repeated: complete already
    capsys.readouterr()
    assert main([*argv[:-1], "--skip-bad"]) == 1
    assert "holds class folders and 2 pictures outside them" in capsys.readouterr().err


def test_sounds_with_a_file_of_labels(tmp_path: Path) -> None:
    sounds(tmp_path / "x")
    names = sorted(path.name for path in (tmp_path / "x").rglob("*.wav"))
    (tmp_path / "l.csv").write_text("".join(f"{name},{'odd' if k % 2 else 'even'}\n" for k, name in enumerate(names)))
    reading = Reading(labels=tmp_path / "l.csv")
    clips = open_clips(tmp_path / "x", MediaOptions(length=0.1, rate=4000), reading=reading)
    assert clips is not None and clips.classes == ("even", "odd") and clips.labels.sum() == len(clips) // 2


def test_damaged_entry_of_labels_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, "zip", {"labels": LABELS})
    path.write_bytes(path.read_bytes().replace(b'"labels"', b'"lebels"'))  # its checksum is wrong
    with pytest.raises(
        ValueError, match=r"dataset.json in .*x.zip cannot be read as labels \(.*; repair it, or remove it$"
    ):
        open_source(path)
