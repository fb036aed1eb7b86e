"""Buckets as one data set: rows, what must agree, and a buckets.json that was not written by the package."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from selftrans.data.buckets import Buckets, open_data
from selftrans.data.dataset import Dataset
from tests.support import ratios, toy


def test_rows_run_through_the_buckets():
    data = open_data(ratios.shared())
    assert isinstance(data, Buckets) and len(data) == 24
    for k, bucket in enumerate(data.buckets):
        rows = np.array([7, 0, 3])
        read, expected = data.read(8 * k + rows), bucket.read(rows)
        assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
    mixed = torch.tensor([23, 0, 9, 8])
    assert data.read(mixed, ["labels"])["labels"].tolist() == data.labels[mixed].tolist()
    assert data.labels.tolist() == [int(x) for bucket in data.buckets for x in bucket.labels]
    with pytest.raises(ValueError, match="rows are of several buckets"):
        data.read(mixed)
    with pytest.raises(ValueError, match=r"indices 0 .. 24 are outside the 24 pictures"):
        data.read(np.array([0, 24]))
    assert len(data.read(np.zeros(0, dtype=int))["moments"]) == 0
    assert len(pickle.loads(pickle.dumps(data))) == 24


def test_a_loader_of_torch_takes_the_rows():
    data = open_data(ratios.shared())
    bucket = data.buckets[0]
    batches = list(torch.utils.data.DataLoader(bucket, batch_size=3))
    read = bucket.read(np.arange(8))
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 2] and batches[0].keys() == read.keys()
    assert all(torch.equal(torch.cat([batch[name] for batch in batches]), read[name]) for name in read)
    assert torch.equal(data[-1]["moments"], data.buckets[-1].read(np.array([7]))["moments"][0])
    for row in (24, -25):
        with pytest.raises(IndexError, match=f"row {row} is outside the 24 pictures of "):
            data[row]


def test_manifest_is_that_of_the_squares_with_every_shard():
    data = open_data(ratios.shared())
    assert data.manifest.resolution == 8 and data.manifest.count == 24
    hashes = [shard.sha256 for bucket in data.buckets for shard in bucket.manifest.shards]
    assert [shard.sha256 for shard in data.manifest.shards] == hashes and len(set(hashes)) == 3
    type(data.manifest).from_json(data.manifest.to_json())


def test_damage_is_found_in_any_bucket(tmp_path):
    folder = toy.copy(ratios.shared(), tmp_path / "data")
    shard = folder / "10x6" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert list(open_data(folder).damaged()) == ["10x6/shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"10x6/shard-00000.safetensors fails its sha256"):
        open_data(folder, verify=True)


def test_commands_for_one_shape_name_the_remedy():
    with pytest.raises(ValueError, match=r"holds buckets of several sizes.*give one of its folders"):
        Dataset.open(ratios.shared())
    with pytest.raises(ValueError, match="holds buckets, for which no features are stored"):
        open_data(ratios.shared()).open_features()
    assert type(open_data(ratios.shared() / "8x8")) is Dataset


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff", "cannot be read"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "buckets.json holds no object; prepare the data again"),
        (b'{"version": 1}', "buckets.json: buckets is missing; prepare the data again"),
        (b'{"version": 2, "buckets": ["8x8"]}', "version should be 1, not 2"),
        (b'{"version": 1, "buckets": ["8x8"], "x": 1}', "x is unknown"),
        (b'{"version": 1, "buckets": "8x8"}', "should be a list"),
        (b'{"version": 1, "buckets": []}', "1 to 1024 different folders"),
        (b'{"version": 1, "buckets": ["8x8", "8x8"]}', "1 to 1024 different folders"),
        *((json.dumps({"version": 1, "buckets": [name]}).encode(), "should be the size of pictures") for name in
          ("..", "../8x8", "/8x8", "8x8/..", "8x8\n", "\u0668x8", "08x8", "", "8", "x", "8x8x8", "1234567x8", 8, None, [])),
        (b'{"version": 1, "buckets": ["8x12"]}', "no manifest.json in .*8x12"),
    ],
)  # fmt: skip
def test_hostile_buckets_json_is_refused_in_one_line(content, message, tmp_path):
    folder = toy.copy(ratios.shared(), tmp_path / "data")
    (folder / "buckets.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_data(folder)
    assert "\n" not in str(error.value)


def test_buckets_that_do_not_belong_together_are_refused(tmp_path):
    folder = toy.copy(ratios.shared(), tmp_path / "data")
    shutil.move(folder / "10x6", folder / "12x6")
    (folder / "buckets.json").write_text('{"version": 1, "buckets": ["8x8", "12x6"]}')
    with pytest.raises(ValueError, match="12x6 does not hold pictures of 12x6"):
        open_data(folder)
    manifest = json.loads((folder / "6x10" / "manifest.json").read_text())
    (folder / "6x10" / "manifest.json").write_text(json.dumps(manifest | {"classes": ["cat", "cow"]}))
    (folder / "buckets.json").write_text('{"version": 1, "buckets": ["8x8", "6x10"]}')
    with pytest.raises(ValueError, match=r"6x10 and .*8x8 differ in 'classes'"):
        open_data(folder)
