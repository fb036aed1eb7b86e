"""Shard files against safetensors itself: what is written is a valid file of it, and a file that lies is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from selftrans.data.shard_file import PAGE, Layout, is_valid, open_tensors, row_bytes, write_shard

LAYOUT: Layout = {"moments": ("float16", (2, 3, 5)), "labels": ("int64", ()), "wide": ("float32", (7,))}


def tensors(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {
        "moments": rng.standard_normal((count, 2, 3, 5)).astype(np.float16),
        "labels": rng.integers(0, 1 << 40, count),
        "wide": rng.standard_normal((count, 7)).astype(np.float32),
    }


def write(path: Path, rows: dict[str, np.ndarray], most: int, batch: int = 3) -> None:
    with write_shard(path, LAYOUT, most) as writer:
        for start in range(0, len(rows["labels"]), batch):
            writer.write({name: each[start : start + batch] for name, each in rows.items()})
    assert writer.count == len(rows["labels"])


@pytest.mark.parametrize("count", [0, 1, 7, 10])
@pytest.mark.parametrize("missing", [0, 1, 5])
def test_safetensors_reads_the_written_rows(tmp_path: Path, count: int, missing: int) -> None:
    """Also where fewer rows come than were announced, as when unreadable pictures are skipped."""
    rows, path = tensors(count), tmp_path / "x.safetensors"
    write(path, rows, count + missing)
    for found in (load_file(path), open_tensors(path, LAYOUT, count)):
        assert found.keys() == rows.keys()
        assert all(np.array_equal(found[name], rows[name]) for name in rows)
        assert all(found[name].dtype == rows[name].dtype for name in rows)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header % PAGE == 0 and path.stat().st_size == header + count * row_bytes(LAYOUT)
    assert row_bytes(LAYOUT) == 2 * 30 + 8 + 4 * 7 and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_compaction_of_more_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selftrans.data.shard_file.CHUNK", 64)
    rows, path = tensors(50), tmp_path / "x.safetensors"
    write(path, rows, 53)
    assert all(np.array_equal(load_file(path)[name], rows[name]) for name in rows)


def test_files_written_by_safetensors_are_read(tmp_path: Path) -> None:
    rows, path = tensors(4), tmp_path / "x.safetensors"
    save_file(rows, path, metadata={"any": "text"})
    assert all(np.array_equal(each, rows[name]) for name, each in open_tensors(path, LAYOUT, 4).items())


def test_mapped_tensors_are_read_only(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", tensors(4), 4)
    with pytest.raises(ValueError, match="read-only"):
        open_tensors(tmp_path / "x.safetensors", LAYOUT, 4)["labels"][0] = 1


def test_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, tensors(4), 4)
    before = path.read_bytes()
    with pytest.raises(AssertionError, match="dtype"):
        write(path, tensors(5) | {"wide": np.zeros((5, 7))}, 9)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_symlinks_are_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "mine")
    write(tmp_path / "x.safetensors", tensors(2), 2)
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "x.safetensors").is_symlink()


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A valid file with another header."""

    def changed(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        change(entries)
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return changed


INVALID: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "no header": lambda data: data[:7],
    "no safetensors": lambda data: b"PK\x03\x04" * 100,
    "header beyond the file": lambda data: (1 << 40).to_bytes(8, "little") + data[8:],
    "header of 2^64 bytes": lambda data: b"\xff" * 8 + data[8:],
    "header no json": lambda data: data[:8] + b"[" * (len(data) - 8),
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "huge header": lambda data: (100_000_001).to_bytes(8, "little") + bytes(100_000_001),
    "offsets beyond": header(lambda h: h["moments"].update(data_offsets=[0, 1 << 40])),
    "offsets backwards": header(lambda h: h["moments"].update(data_offsets=[300, 60])),
    "offsets negative": header(lambda h: h["moments"].update(data_offsets=[-8, 232])),
    "overlap": header(lambda h: h["wide"].update(data_offsets=h["labels"]["data_offsets"])),
    "a gap": header(lambda h: h.pop("wide")),
    "shape": header(lambda h: h["moments"].update(shape=[4, 3, 2, 5])),
    "shape overflows": header(lambda h: h["moments"].update(shape=[1 << 62, 1 << 62, 4])),
    "shape negative": header(lambda h: h["moments"].update(shape=[-4, -2, 3, 5])),
    "dtype": header(lambda h: h["moments"].update(dtype="BF16")),
    "dtype unknown": header(lambda h: h["moments"].update(dtype="object")),
    "dtype narrow": header(lambda h: h["moments"].update(dtype="U8", shape=[4, 2, 3, 10])),
    "other name": header(lambda h: h.update(latents=h.pop("moments"))),
    "name that writes to a terminal": header(lambda h: h.update({"\x1b]0;x\x07\n": h.pop("moments")})),
}


@pytest.mark.parametrize("fault", INVALID)
def test_invalid_shard_files_are_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(INVALID[fault](save(tensors(4))))
    with pytest.raises(ValueError, match=r"x.safetensors cannot be used \(.+\); repeat the `selftrans") as caught:
        open_tensors(path, LAYOUT, 4)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert not is_valid(path, LAYOUT, 4)


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    data = save(tensors(4))
    size = int.from_bytes(data[:8], "little")
    path = tmp_path / "x.safetensors"
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    assert all(np.array_equal(each, tensors(4)[name]) for name, each in open_tensors(path, LAYOUT, 4).items())


def test_additional_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(4) | {"\x1b[2J": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"it also holds '\\x1b\[2J'"):
        open_tensors(path, LAYOUT, 4)


def test_missing_files_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    for name in ("pipe", "absent", "."):
        with pytest.raises(ValueError, match="is missing; repeat the `selftrans prepare`"):
            open_tensors(tmp_path / name, LAYOUT, 4)
