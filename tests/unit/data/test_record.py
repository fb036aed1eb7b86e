"""Small JSON files are read with or without a mark of UTF-8; anything but an object is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from selftrans.data.record import read_object


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_object_with_or_without_a_mark_of_utf_8(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + b'{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
    assert read_object(tmp_path / "missing.json") is None


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"[1]", "a.json holds no object"), (b"{", "a.json is not valid JSON"), (b"\xff\xfe{", "a.json cannot be read")],
)
def test_what_is_no_object_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_object(tmp_path / "a.json")
