"""Prepared data: reading returns what was written; an invalid manifest or file is an error that names the fault."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest, Shard
from selftrans.data.on_device import OnDevice
from selftrans.data.shard_file import row_bytes
from selftrans.train.autoencoder_training import data_sha256
from selftrans.types import Conditions
from tests.support import captioned
from tests.support.shards import SHAPE, edit, make, write_shards


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("on_device", [False, True])
def test_read_returns_the_written_rows(tmp_path: Path, dtype: str, on_device: bool) -> None:
    moments, labels = make(tmp_path, dtype)
    dataset = Dataset.open(tmp_path, verify=True)
    assert len(dataset) == 8 and np.array_equal(dataset.labels, labels) and dataset.labels.dtype == np.int64
    if on_device:
        dataset = OnDevice(dataset, "cpu")
    for indices in ([3], [7, 0, 5, 4, 0, 6], [], range(8)):
        tensors = dataset.read(np.array(indices, dtype=np.int64))
        read, label = tensors["moments"], tensors["labels"]
        assert set(tensors) == set(dataset.names) == {"moments", "labels"}
        assert read.dtype == getattr(torch, dtype) and read.shape == (len(indices), *SHAPE)
        assert np.array_equal(read.numpy(), moments[list(indices)])
        assert label.dtype == torch.int64 and label.tolist() == labels[list(indices)].tolist()
        assert torch.equal(dataset.condition(tensors), label)  # type: ignore[arg-type]
    assert torch.equal(dataset.read(torch.tensor([6, 1]))["moments"], torch.from_numpy(moments[[6, 1]]))
    assert list(dataset.read(np.arange(2), ["labels"])) == ["labels"]


def test_hash_of_all_shards_is_the_one_that_files_have_recorded(tmp_path: Path) -> None:
    """By sha256sum: of the two hashes with a line feed between them (classifiers), or a space (autoencoders)."""
    make(tmp_path)
    dataset = Dataset.open(tmp_path)
    dataset.manifest = dataclasses.replace(
        dataset.manifest, shards=(Shard(0, 1, "a" * 64, ()), Shard(1, 1, "b" * 64, ()))
    )
    recorded = "5e9ae866add9a85d69c3481d059bb9f158a39e5670ba11f95112fc409630894e"
    assert dataset.manifest.shards_sha256() == recorded
    assert data_sha256(dataset) == "10b88f6109ff758ad4219e1c028f5e262ac4c2fe9628576840ab1ba35cd998f0"


def test_rows_are_copies_of_the_files(tmp_path: Path) -> None:
    moments, _ = make(tmp_path)
    dataset = Dataset.open(tmp_path)
    dataset.read(np.arange(8))["moments"].zero_()
    assert np.array_equal(dataset.read(np.arange(8))["moments"].numpy(), moments)
    dataset.verify()


def test_pickled_dataset_holds_the_path_not_the_data(tmp_path: Path) -> None:
    moments, _ = make(tmp_path)
    dataset = Dataset.open(tmp_path)
    rebuild, arguments, with_features = dataset.__reduce__()
    assert arguments == (str(tmp_path),) and not with_features
    assert np.array_equal(rebuild(*arguments).read(np.array([7]))["moments"].numpy(), moments[[7]])
    assert np.array_equal(copy.deepcopy(dataset).labels, dataset.labels)  # copied through pickle's protocol


def test_manifest_properties_and_round_trip(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = Manifest.load(tmp_path)
    assert (manifest.num_classes, manifest.conditions) == (3, Conditions("labels", 3))
    assert (manifest.moments_shape, row_bytes(manifest.layout)) == (SHAPE, 2 * 8 * 16 * 2 + 8)
    assert manifest.skipped == (("x/y.jpg", "cut off"),)
    assert Manifest.from_json(manifest.to_json()) == manifest
    summary = manifest.summary()
    assert "8 pictures of 32x32, 3 classes" in summary and "4x4x4 latents: owner/name" in summary
    assert "1 unreadable" in summary and "x/y.jpg: cut off" in summary


def test_manifest_of_data_that_are_not_pictures(tmp_path: Path) -> None:
    make(tmp_path)
    edit(tmp_path, lambda m: m.update(resolution=None, image_channels=None, autoencoder="values"))
    edit(tmp_path, lambda m: m["latent_space"].update(scale=[1, 2, 3.5, 4], shift=[0, 0, 0, 1]))
    manifest = Dataset.open(tmp_path).manifest
    assert manifest.latent_space.scale == (1, 2, 3.5, 4) and "8 samples, 3 classes" in manifest.summary()
    assert Manifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(ValueError, match="8 samples"):
        Dataset.open(tmp_path).read(np.array([8]))


def test_data_without_classes_have_the_label_zero(tmp_path: Path) -> None:
    moments, labels = make(tmp_path)
    write_shards(tmp_path, moments, 0 * labels)
    edit(tmp_path, lambda m: m.update(classes=[], conditions={"kind": "none", "num_classes": 0}))
    dataset = Dataset.open(tmp_path)
    assert dataset.manifest.conditions == Conditions("none")
    assert torch.equal(dataset.condition(dataset.read(np.arange(8))), torch.zeros(8, dtype=torch.int64))  # type: ignore[arg-type]


def test_names_from_a_manifest_are_escaped_for_the_terminal(tmp_path: Path) -> None:
    make(tmp_path)
    names = ["\x1b]0;owned\x07", "two\nlines", "\ud800"]  # the last cannot be encoded at all
    edit(tmp_path, lambda m: m.update(classes=names, autoencoder="\x1b[2J"))
    edit(tmp_path, lambda m: m["shards"][0].update(skipped=[["\x1b[8m", "\x1b[8m"]]))
    summary = Manifest.load(tmp_path).summary()
    assert summary.replace("\n", "").isprintable() and summary.encode()
    assert r"\x1b]0;owned\x07, two\nlines, \ud800" in summary


@pytest.mark.parametrize("indices", [[8], [-1], [0, 1 << 40]])
@pytest.mark.parametrize("on_device", [False, True])
def test_indices_out_of_range_are_refused(tmp_path: Path, indices: list[int], on_device: bool) -> None:
    make(tmp_path)
    dataset = OnDevice(Dataset.open(tmp_path), "cpu") if on_device else Dataset.open(tmp_path)
    for names in (None, ["labels"]):
        with pytest.raises(ValueError, match="8 pictures"):
            dataset.read(np.array(indices), names)


def test_missing_manifest_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest.json in .*run `selftrans prepare`"):
        Dataset.open(tmp_path)


MOMENTS = r"shard-00000.safetensors cannot be used \(its moments are F16 \(5, 2, 8, 4, 4\), the manifest expects "
TEXT_RECORD = {"stored": "tokens", "dtype": "float16", "captions": 3, "bytes": 34, "null": "0" * 64}
INVALID: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "count": (lambda m: m.update(count=9), "'count' is 9, its shards add up to 8"),
    "count negative": (
        lambda m: m.update(count=-1),
        "manifest.json: count should be an integer from 0 to 281474976710656, not ",
    ),
    "count true": (
        lambda m: m.update(count=True),
        "manifest.json: count should be an integer from 0 to 281474976710656, not ",
    ),
    "count float": (
        lambda m: m.update(count=8.0),
        "manifest.json: count should be an integer from 0 to 281474976710656, not ",
    ),
    "nothing": (lambda m: m.update(count=0, shards=[]), "'count' is 0"),
    "version old": (
        lambda m: m.update(version=1),
        "has version 1, whose .bin files this package no longer reads; repeat its `selftrans prepare` into a new folder",
    ),
    "version": (lambda m: m.update(version=3), "has version 3, this package reads version 2; install a newer version"),
    "version true": (
        lambda m: m.update(version=True),
        "manifest.json: version should be 2, not True; prepare the data",
    ),
    "version negative": (
        lambda m: m.update(version=-1),
        "manifest.json: version should be 2, not -1; prepare the data",
    ),
    "missing": (lambda m: m.pop("latent_space"), "manifest.json: latent_space is missing; prepare the data again"),
    "unknown": (lambda m: m.update(extra=1), "manifest.json: extra is unknown"),
    "shape": (lambda m: m.update(shape=[4, 4, 8]), MOMENTS + r"F16 \(5, 2, 8, 4, 8\)"),
    "shape flat": (lambda m: m.update(shape=[4, 16]), MOMENTS + r"F16 \(5, 2, 8, 16\)"),
    "shape short": (lambda m: m.update(shape=[4]), "'shape' should have 2 to 4 entries, not 1"),
    "shape empty": (lambda m: m.update(shape=[]), "'shape' should have 2 to 4 entries, not 0"),
    "shape zero": (lambda m: m.update(shape=[4, 0, 4]), r"manifest.json: shape\[1\] should be an integer from 1"),
    "shape huge": (lambda m: m.update(shape=[4, 1 << 60, 4]), r"manifest.json: shape\[1\] should be an integer"),
    "stochastic": (
        lambda m: m["latent_space"].update(stochastic="yes"),
        r"manifest.json: latent_space\.stochastic should be bool",
    ),
    "deterministic": (lambda m: m["latent_space"].update(stochastic=False), MOMENTS + r"F16 \(5, 2, 4, 4, 4\)"),
    "dtype": (lambda m: m.update(dtype="object"), "manifest.json: dtype should be one of float16, float32"),
    "wider dtype": (lambda m: m.update(dtype="float32"), MOMENTS + r"F32 \(5, 2, 8, 4, 4\)"),
    "scale nan": (
        lambda m: m["latent_space"].update(scale=float("nan")),
        "scale should be a finite number",
    ),
    "scale zero": (lambda m: m["latent_space"].update(scale=0), "'scale' is zero"),
    "scale of a channel zero": (lambda m: m["latent_space"].update(scale=[1, 0, 1, 1]), "'scale' is zero"),
    "scale of a channel text": (
        lambda m: m["latent_space"].update(scale=[1, "x"]),
        r"scale\[1\] should be a finite",
    ),
    "scale of three": (lambda m: m["latent_space"].update(scale=[1, 1, 1]), "'scale' should have 4 entries, not 3"),
    "shift huge": (lambda m: m["latent_space"].update(shift=10**400), r"latent_space\.shift should be a finite number"),
    "no scale": (lambda m: m["latent_space"].pop("scale"), r"manifest.json: latent_space\.scale is missing"),
    "latent space unknown": (
        lambda m: m["latent_space"].update(extra=1),
        r"manifest.json: latent_space\.extra is unknown",
    ),
    "copies": (lambda m: m.update(copies=3), "manifest.json: copies should be an integer from 1 to 2"),
    "resolution alone": (lambda m: m.update(resolution=None), "'resolution' and 'image_channels' should both be null"),
    "resolution zero": (lambda m: m.update(resolution=0), "manifest.json: resolution should be an integer from 1"),
    "text": (
        lambda m: m.update(conditions={"kind": "text"}),
        "'conditions' has kind 'text', whose 'tokens' is missing",
    ),
    "text with labels": (
        lambda m: m.update(text=TEXT_RECORD),
        "field 'text' is set, field 'conditions' says 3 classes",
    ),
    "text list": (lambda m: m.update(text=[]), "manifest.json: text should be an object"),
    "conditions": (
        lambda m: m["conditions"].update(kind="sound"),
        r"kind should be one of 'none', 'labels', 'text'",
    ),
    "conditions list": (
        lambda m: m["conditions"].update(kind=["none"]),
        r"kind should be one of 'none', 'labels', 'text'",
    ),
    "conditions none": (lambda m: m["conditions"].update(kind="none"), "'conditions' says no condition, .* names 3"),
    "conditions of four": (lambda m: m["conditions"].update(num_classes=4), "says 4 classes, field 'classes' names 3"),
    "conditions text": (lambda m: m.update(conditions="labels"), "manifest.json: conditions should be an object"),
    "classes": (lambda m: m.update(classes=["cat", "cat", "ü"]), "'classes' names a class twice"),
    "classes text": (lambda m: m.update(classes="cat"), "manifest.json: classes should be a list"),
    "classes number": (lambda m: m.update(classes=["cat", 3]), r"manifest.json: classes\[1\] should be text"),
    "options": (
        lambda m: m["options"].update(x=[1]),
        r"manifest.json: options\.x should be text, a number, true, false or null",
    ),
    "fewer classes": (
        lambda m: m.update(classes=["cat"], conditions={"kind": "labels", "num_classes": 1}),
        r"shard-00000.safetensors has label \d at row \d, outside 0 .. 0",
    ),
    "shard text": (lambda m: m.update(shards=["x"]), r"shards\[0\] should be an object"),
    "shard file": (lambda m: m["shards"][0].update(file="../x"), r"shards\[0\]\.file is unknown"),
    "shard index": (lambda m: m["shards"][0].update(index="../x"), r"shards\[0\]\.index should be an integer"),
    "shard order": (lambda m: m["shards"].reverse(), "not in order"),
    "shard count": (
        lambda m: (m["shards"][0].update(count=4), m["shards"][2].update(count=4)),
        MOMENTS + r"F16 \(4, 2, 8, 4, 4\)",
    ),
    "shard hash": (lambda m: m["shards"][0].update(sha256="0" * 63), r"shards\[0\]\.sha256 should be a sha256"),
    "no features": (lambda m: m.pop("features"), "manifest.json: features is missing"),
    "no skipped": (lambda m: m["shards"][0].pop("skipped"), r"shards\[0\]\.skipped is missing"),
    "skipped": (lambda m: m["shards"][0].update(skipped=[["a"]]), r"skipped\[0\] should be a list of 2"),
    "features": (lambda m: m.update(features=[]), "manifest.json: features should be an object"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_manifest_names_the_field(tmp_path: Path, case: str) -> None:
    make(tmp_path)
    change, message = INVALID[case]
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        Dataset.open(tmp_path)
    assert "\n" not in str(caught.value) and re.search("prepare|newer version", str(caught.value))


SHARD = r"shard-00000.safetensors cannot be used \(its "
INVALID_TEXT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no record": (lambda m: m.pop("text"), "kind 'text', which needs a field 'text' and no 'classes'"),
    "null record": (lambda m: m.update(text=None), "kind 'text', which needs a field 'text' and no 'classes'"),
    "classes": (lambda m: m.update(classes=["a"]), "kind 'text', which needs a field 'text' and no 'classes'"),
    "number of classes": (lambda m: m["conditions"].update(num_classes=3), "no 'classes' or 'num_classes'"),
    "stored": (lambda m: m["text"].update(stored="x"), r"text\.stored should be one of 'tokens', 'ids'"),
    "stored list": (lambda m: m["text"].update(stored=["ids"]), r"text\.stored should be one of 'tokens', 'ids'"),
    "ids": (lambda m: m["text"].update(stored="ids"), "shard-00000.safetensors cannot be used"),
    "dtype": (lambda m: m["text"].update(dtype="float32"), r"text\.dtype should be one of float16, bfloat16"),
    "other dtype": (lambda m: m["text"].update(dtype="bfloat16"), SHARD + "text are F16"),
    "captions": (lambda m: m["text"].update(captions=0), r"text\.captions should be an integer from 1 to 1024"),
    "fewer captions": (lambda m: m["text"].update(captions=1), SHARD + "(text|mask) are "),
    "bytes": (lambda m: m["text"].update(bytes=1 << 40), r"text\.bytes should be an integer from 1 to 4096"),
    "fewer bytes": (lambda m: m["text"].update(bytes=33), SHARD + r"caption are U8 \(16, 3, 34\)"),
    "null": (lambda m: m["text"].update(null="../x"), r"text\.null should be a sha256"),
    "no null": (
        lambda m: m["text"].update(null=""),
        "field 'text': 'null', the sha256 of null.safetensors, is missing",
    ),
    "unknown": (lambda m: m["text"].update(extra=1), r"manifest.json: text\.extra is unknown"),
    "tokens": (lambda m: m["conditions"].update(tokens=0), "kind 'text', whose 'tokens' is missing"),
    "other tokens": (lambda m: m["conditions"].update(tokens=13), SHARD + "(text|mask) are "),
    "width": (lambda m: m["conditions"].update(width=-1), r"conditions\.width should be an integer from 0 to 65536"),
    "encoder": (lambda m: m["conditions"].update(encoder=""), "kind 'text', whose 'encoder' is missing"),
    "sha256": (lambda m: m["conditions"].update(sha256="x"), r"conditions\.sha256 should be a sha256"),
    "no sha256": (lambda m: m["conditions"].pop("sha256"), "kind 'text', whose 'sha256' is missing"),
}


@pytest.mark.parametrize("case", INVALID_TEXT)
def test_invalid_manifest_of_captions_names_the_field(tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(captioned.shared(), tmp_path / "data")
    Dataset.open(folder)
    change, message = INVALID_TEXT[case]
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        Dataset.open(folder)
    assert "\n" not in str(caught.value) and "prepare" in str(caught.value)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_caption_counts_out_of_range_are_named(tmp_path: Path, count: int) -> None:
    folder = shutil.copytree(captioned.shared(), tmp_path / "data")
    tensors = load_file(folder / "shard-00000.safetensors")
    tensors["captions"][5] = count
    save_file(tensors, folder / "shard-00000.safetensors")
    with pytest.raises(
        ValueError, match=rf"shard-00000.safetensors has caption count {count} at row 5, outside 1 .. 3"
    ):
        Dataset.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"x"', "\x00", "{}", '{"version": 1}'])
def test_invalid_json_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json"):
        Dataset.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        Dataset.open(tmp_path)


def test_missing_truncated_and_changed_files_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / "shard-00002.safetensors"
    data = file.read_bytes()
    for wrong in (data[:-1], data + b"x", data[:50], b""):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"shard-00002.safetensors cannot be used \(.*\); repeat the `selftrans"):
            Dataset.open(tmp_path)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    Dataset.open(tmp_path)  # one bit: only the hash detects it
    with pytest.raises(ValueError, match=r"shard-00002.safetensors fails its sha256; delete the file and repeat"):
        Dataset.open(tmp_path, verify=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is missing"):
        Dataset.open(tmp_path)
    file.mkdir()
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is missing"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_moments_that_are_not_finite_are_named(tmp_path: Path, dtype: str, value: float) -> None:
    moments, labels = make(tmp_path, dtype)
    moments[0] = np.finfo(dtype).max  # the largest finite number, and its negative
    moments[1] = np.finfo(dtype).min
    moments[6, 1, 3, 2, 2] = value
    write_shards(tmp_path, moments, labels)
    dataset = Dataset.open(tmp_path)
    dataset.read(np.array([0, 1, 5, 7]))
    message = r"shard-00002.safetensors holds NaN or infinite moments for picture 6 \(row 1 of"
    with pytest.raises(ValueError, match=message):
        dataset.read(np.array([0, 7, 6, 2]))
    with pytest.raises(ValueError, match=message):
        OnDevice(dataset, "cpu")


@pytest.mark.parametrize("label", [-1, 3, 1 << 40])
def test_labels_out_of_range_are_named(tmp_path: Path, label: int) -> None:
    moments, labels = make(tmp_path)
    labels[7] = label
    write_shards(tmp_path, moments, labels)
    with pytest.raises(ValueError, match=rf"shard-00002.safetensors has label {label} at row 2, outside 0 .. 2"):
        Dataset.open(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "version count copies shape latent_space dtype autoencoder resolution image_channels conditions classes options "
    "features text"
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([*FIELDS.split(), "shards"]),
    key=st.sampled_from(
        ["", "index", "count", "skipped", "scale", "kind", "stored", "captions", "bytes", "null", "tokens"]
    ),
    value=JSON,
    captions=st.booleans(),
)
def test_any_value_of_any_field_parses_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, key: str, value: object, captions: bool
) -> None:
    folder = captioned.shared() if captions else tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        folder.mkdir()
        make(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    inner = manifest["shards"][0] if name == "shards" else manifest.get(name)
    if isinstance(inner, dict) and key:
        inner[key] = value
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
