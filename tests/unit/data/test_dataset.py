"""Shards: what is read is what was written; a manifest or a file that lies is an error that names the lie."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrans.data.dataset import Shards
from selftrans.data.manifest import Manifest
from tests.support.shards import SHAPE, edit, make


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_read_gives_what_was_written(tmp_path: Path, dtype: str) -> None:
    moments, labels = make(tmp_path, dtype)
    shards = Shards.open(tmp_path, verify=True)
    assert len(shards) == 8 and np.array_equal(shards.labels, labels) and shards.labels.dtype == np.int64
    for indices in ([3], [7, 0, 5, 4, 0, 6], [], range(8)):
        read, label = shards.read(np.array(indices, dtype=np.int64))
        assert read.dtype == getattr(torch, dtype) and read.shape == (len(indices), *SHAPE)
        assert np.array_equal(read.numpy(), moments[list(indices)])
        assert label.dtype == torch.int64 and label.tolist() == labels[list(indices)].tolist()
    assert torch.equal(shards.read(torch.tensor([6, 1]))[0], torch.from_numpy(moments[[6, 1]]))


def test_what_is_read_is_the_readers_own(tmp_path: Path) -> None:
    moments, _ = make(tmp_path)
    shards = Shards.open(tmp_path)
    shards.read(np.arange(8))[0].zero_()
    assert np.array_equal(shards.read(np.arange(8))[0].numpy(), moments)
    shards.verify()


def test_a_worker_process_gets_the_path_and_not_the_numbers(tmp_path: Path) -> None:
    moments, _ = make(tmp_path)
    shards = Shards.open(tmp_path)
    rebuild, arguments = shards.__reduce__()
    assert arguments == (tmp_path,)
    assert np.array_equal(rebuild(*arguments).read(np.array([7]))[0].numpy(), moments[[7]])
    assert np.array_equal(copy.deepcopy(shards).labels, shards.labels)  # takes the same way


def test_manifest_properties_and_round_trip(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = Manifest.load(tmp_path)
    assert (manifest.num_classes, manifest.moments_shape, manifest.row_bytes) == (3, SHAPE, 2 * 8 * 16 * 2)
    assert manifest.skipped == (("x/y.jpg", "cut off"),)
    assert Manifest.from_json(manifest.to_json()) == manifest
    summary = manifest.summary()
    assert "8 pictures of 32x32, 3 classes" in summary and "4x4x4 latents by owner/name" in summary
    assert "1 unreadable" in summary and "x/y.jpg: cut off" in summary


def test_names_from_a_manifest_cannot_command_the_terminal(tmp_path: Path) -> None:
    make(tmp_path)
    names = ["\x1b]0;owned\x07", "two\nlines", "\ud800"]  # the last cannot be encoded at all
    edit(tmp_path, lambda m: m.update(classes=names, autoencoder="\x1b[2J"))
    edit(tmp_path, lambda m: m["shards"][0].update(skipped=[["\x1b[8m", "\x1b[8m"]]))
    summary = Manifest.load(tmp_path).summary()
    assert summary.replace("\n", "").isprintable() and summary.encode()
    assert r"\x1b]0;owned\x07, two\nlines, \ud800" in summary


@pytest.mark.parametrize("indices", [[8], [-1], [0, 1 << 40]])
def test_indices_out_of_range(tmp_path: Path, indices: list[int]) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match="8 pictures"):
        Shards.open(tmp_path).read(np.array(indices))


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest.json in .*run `selftrans prepare`"):
        Shards.open(tmp_path)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "count": (lambda m: m.update(count=9), "'count' is 9, its shards add up to 8"),
    "count negative": (lambda m: m.update(count=-1), "'count' should be an integer"),
    "count true": (lambda m: m.update(count=True), "'count' should be an integer"),
    "count float": (lambda m: m.update(count=8.0), "'count' should be an integer"),
    "nothing": (lambda m: m.update(count=0, shards=[]), "'count' is 0"),
    "version": (lambda m: m.update(version=2), "of version 2, this package reads 1"),
    "missing": (lambda m: m.pop("scale"), "'scale' is missing"),
    "unknown": (lambda m: m.update(extra=1), "'extra' is unknown"),
    "shape": (lambda m: m.update(shape=[4, 4, 8]), r"moments-00000.bin has 2560 bytes where its manifest says 5120"),
    "shape short": (lambda m: m.update(shape=[4, 4]), "'shape' should have 3 entries, not 2"),
    "shape zero": (lambda m: m.update(shape=[4, 0, 4]), r"'shape\[1\]' should be an integer from 1"),
    "shape huge": (lambda m: m.update(shape=[4, 1 << 60, 4]), r"'shape\[1\]' should be an integer"),
    "stochastic": (lambda m: m.update(stochastic="yes"), "'stochastic' should be true or false"),
    "deterministic": (lambda m: m.update(stochastic=False), "where its manifest says 1280"),
    "dtype": (lambda m: m.update(dtype="object"), "'dtype' should be one of float16, float32"),
    "wider dtype": (lambda m: m.update(dtype="float32"), "where its manifest says 5120"),
    "scale nan": (lambda m: m.update(scale=float("nan")), "'scale' should be a finite number"),
    "scale zero": (lambda m: m.update(scale=0), "'scale' is zero"),
    "shift huge": (lambda m: m.update(shift=10**400), "'shift' should be a finite number"),
    "copies": (lambda m: m.update(copies=3), "'copies' should be an integer from 1 to 2"),
    "classes": (lambda m: m.update(classes=["cat", "cat", "ü"]), "'classes' names a class twice"),
    "classes text": (lambda m: m.update(classes="cat"), "'classes' should be a list"),
    "classes number": (lambda m: m.update(classes=["cat", 3]), r"'classes\[1\]' should be text"),
    "options": (lambda m: m["options"].update(x=[1]), "options: field 'x' should be text"),
    "fewer classes": (lambda m: m.update(classes=["cat"]), r"labels-00000.bin has label \d at row \d, outside 0 .. 0"),
    "shard text": (lambda m: m.update(shards=["x"]), r"shards\[0\] should be a JSON object"),
    "shard climbs": (
        lambda m: m["shards"][0].update(file="../x"),
        r"shards\[0\]: field 'file' should be a plain file name",
    ),
    "shard absolute": (lambda m: m["shards"][0].update(labels_file="/etc/passwd"), "'labels_file' should be a plain"),
    "shard newline": (
        lambda m: m["shards"][0].update(file="moments-00000.bin\n"),
        "'file' should be a plain file name",
    ),
    "shard twice": (lambda m: m["shards"][2].update(file="moments-00000.bin"), "names a file twice"),
    "shard order": (lambda m: m["shards"].reverse(), "not in order"),
    "shard count": (
        lambda m: (m["shards"][0].update(count=4), m["shards"][2].update(count=4)),
        r"has 2560 bytes where",
    ),
    "shard hash": (lambda m: m["shards"][0].update(sha256="0" * 63), "'sha256' should be a sha256"),
    "skipped": (lambda m: m["shards"][0].update(skipped=[["a"]]), r"'skipped\[0\]' should be a name and a reason"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_the_manifest(tmp_path: Path, lie: str) -> None:
    make(tmp_path)
    change, message = LIES[lie]
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        Shards.open(tmp_path)
    assert "\n" not in str(caught.value) and re.search("prepare", str(caught.value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"x"', "\x00", "{}", '{"version": 1}'])
def test_manifests_that_are_no_manifest(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json"):
        Shards.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        Shards.open(tmp_path)


def test_files_missing_short_or_changed(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / "moments-00002.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"moments-00002.bin has 1535 bytes where .* says 1536; repeat the `selftrans"):
        Shards.open(tmp_path)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    Shards.open(tmp_path)  # one bit: only the hash can tell
    with pytest.raises(ValueError, match=r"moments-00002.bin fails its sha256; delete the file and repeat"):
        Shards.open(tmp_path, verify=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"moments-00002.bin is missing"):
        Shards.open(tmp_path)
    file.mkdir()
    with pytest.raises(ValueError, match=r"moments-00002.bin is missing"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_moments_that_are_not_finite_are_named(tmp_path: Path, dtype: str, value: float) -> None:
    moments, _ = make(tmp_path, dtype)
    moments[0] = np.finfo(dtype).max  # as large as a sound number can be, and its negative
    moments[1] = np.finfo(dtype).min
    (tmp_path / "moments-00000.bin").write_bytes(moments[:5].tobytes())
    moments[6, 1, 3, 2, 2] = value
    (tmp_path / "moments-00002.bin").write_bytes(moments[5:].tobytes())
    shards = Shards.open(tmp_path)
    shards.read(np.array([0, 1, 5, 7]))
    with pytest.raises(ValueError, match=r"moments-00002.bin holds NaN or infinite moments for picture 6 \(row 1 of"):
        shards.read(np.array([0, 7, 6, 2]))


@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_labels_out_of_range_are_named(tmp_path: Path, label: int) -> None:
    _, labels = make(tmp_path)
    labels[7] = label
    (tmp_path / "labels-00002.bin").write_bytes(labels[5:].astype("<i8").tobytes())
    with pytest.raises(ValueError, match=rf"labels-00002.bin has label {label} at row 2, outside 0 .. 2"):
        Shards.open(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = "version count copies shape stochastic dtype scale shift autoencoder resolution image_channels classes options"


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([*FIELDS.split(), "shards"]), key=st.sampled_from(["", "file", "count", "skipped"]), value=JSON
)
def test_any_value_of_any_field_parses_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, key: str, value: object
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        folder.mkdir()
        make(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if name == "shards" and key:
        manifest["shards"][0][key] = value
    else:
        manifest[name] = value
    try:
        parsed = Manifest.from_json(json.dumps(manifest))
    except ValueError as error:
        message = str(error)
    else:
        message = "manifest.json"
        assert Manifest.from_json(parsed.to_json()) == parsed
    assert "manifest.json" in message and "\n" not in message
