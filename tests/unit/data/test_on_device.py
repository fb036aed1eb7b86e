"""Data kept on the device: the same batches, and one line where they do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selftrans.data.dataset import Dataset
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare_builtin
from selftrans.train.batches import Stream, to_batch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_builtin("digits", tmp_path_factory.mktemp("digits") / "data")


def test_data_on_the_device_give_the_same_batches(shards: Dataset) -> None:
    on_device = OnDevice(shards, "cpu")
    rows = np.array([0, 1796, 5, 5, 1024, 1023])
    read, expected = on_device.read(rows), shards.read(torch.from_numpy(rows))
    assert all(
        torch.equal(read[name], expected[name]) and read[name].dtype == expected[name].dtype for name in shards.names
    )
    streams = (Stream(x, batch_size=7, accumulate=1, seed=3).from_step(250) for x in (shards, on_device))
    for _, one, two in zip(range(20), *streams, strict=False):  # past the end of an epoch
        assert np.array_equal(one[0], two[0])
        batches = []
        for drawn in (one, two):
            torch.manual_seed(1)
            batches.append(to_batch(drawn, shards, torch.device("cpu")))
        assert all(torch.equal(a, b) for a, b in zip(*(batch[:2] for batch in batches), strict=True))
    with pytest.raises(ValueError, match=r"indices -1 .. 1797 are outside the 1797 pictures"):
        on_device.read(np.array([-1, 1797]))


def test_device_out_of_memory_is_one_line(shards: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 21 GiB\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ValueError, match=r"needs 0.0 GB, more than cpu has free \(out of memory.*on_device off$"):
        OnDevice(shards, "cpu")
