"""Files of a folder that may be untrusted: links, paths, fifos, damaged json."""

import json
import math
import os

import pytest

from selftrans.ui.contained import Contained, JsonFiles, number, plain


@pytest.fixture
def root(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "given" / "run").mkdir(parents=True)
    (tmp_path / "given" / "run" / "file").write_text("content")
    return Contained((tmp_path / "given").resolve())


def test_files_are_read(root):
    assert (root / "run" / "file").read(7) == b"content"
    with pytest.raises(OSError, match="more than 6 bytes"):
        (root / "run" / "file").read(6)
    assert [each.name for each in root.entries()] == ["run"] and (root / "run").inside()


@pytest.mark.parametrize(
    "names", [("..", "outside", "secret"), ("run", "..", "..", "outside", "secret"), ("run/file",), ("", "run")]
)
def test_names_that_are_no_names_are_refused(root, names):
    place = Contained(root.root, names)
    assert place.stamp() is None
    with pytest.raises(OSError, match="is not a path"):
        place.read(100)


def test_links_are_not_followed(root):
    outside = root.root.parent / "outside"
    (root.root / "run" / "linked").symlink_to(outside / "secret")
    (root.root / "folder").symlink_to(outside)
    for place in (root / "run" / "linked", root / "folder" / "secret"):
        with pytest.raises(OSError, match=r"Too many levels|Not a directory|symbolic"):
            place.read(100)
        assert not place.inside()
    assert (root / "run" / "linked").stamp() is None
    assert [each.name for each in root.entries()] == ["run"] and not list((root / "folder").entries())


def test_a_fifo_is_refused_at_once(root):
    os.mkfifo(root.root / "run" / "fifo")
    with pytest.raises(OSError, match="is no regular file"):
        (root / "run" / "fifo").read(100)


def test_json_is_read_again_when_it_changes_and_damage_is_a_line(root):
    files, place = JsonFiles(), root / "run" / "a.json"
    assert files.read(place) == (None, None)
    place.path.write_text('{"a": 1}')
    assert files.read(place) == ({"a": 1}, None)
    place.path.write_text('{"a": 1')
    content, wrong = files.read(place)
    assert content is None and wrong.startswith("run/a.json cannot be read (")
    place.path.write_text("[1, 2]")
    assert files.read(place) == (None, "run/a.json does not hold what selftrans writes")
    place.path.write_text("[" * 100_000)
    assert "cannot be read" in files.read(place)[1]
    place.path.unlink()
    assert files.read(place) == (None, None)


def test_plain_values_are_strict_json():
    value = {"a": [math.nan, math.inf, 1.5, True, None, "x"], 3: {"deep": (1, 2)}}
    assert plain(value) == {"a": [None, None, 1.5, True, None, "x"], "3": {"deep": [1, 2]}}
    nested = []
    for _ in range(50):
        nested = [nested]
    assert len(json.dumps(plain(nested), allow_nan=False)) < 100


@pytest.mark.parametrize(
    ("value", "found"),
    [(1, 1.0), (2.5, 2.5), (True, None), ("1", None), (None, None), (math.nan, None), (10**400, None)],
)
def test_numbers(value, found):
    assert number(value) == found
