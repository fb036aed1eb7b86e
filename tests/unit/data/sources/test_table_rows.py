"""Rows of tables, stored or streamed: the same pictures, labels and captions, and what happens when a stream breaks."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import pytest

from selftrans.cli.main import main
from selftrans.data.prepare import prepare
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import FAR, InOrder
from tests.support import toy
from tests.support.pictures import encoded, noise

STREAMED = Reading(streaming=True)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Twelve pictures in two parquet files, with classes and captions."""
    folder = tmp_path_factory.mktemp("tables") / "x"
    folder.mkdir()
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "text": datasets.Value("string"),
    }
    for k in range(2):
        cells = [{"bytes": encoded(noise(8, 6 * k + i)), "path": None} for i in range(6)]
        columns = {"image": cells, "label": [0, 1, 1] * 2, "text": [f"picture {6 * k + i}" for i in range(6)]}
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        rows.to_parquet(folder / f"{k}.parquet")
    return folder


def test_streamed_rows_are_the_stored_ones(tables):
    stored, streamed = (open_source(tables, resolution=8, reading=reading) for reading in (Reading(), STREAMED))
    assert streamed.fingerprint == stored.fingerprint and streamed.classes == ("cat", "dog")
    assert streamed.in_order and not stored.in_order and len(streamed) == 12
    for i in (0, 1, 2, 7, 7, 3, 11):
        assert np.array_equal(streamed.read(i), noise(8, i)) and np.array_equal(stored.read(i), noise(8, i))
    captioned = open_source(tables, resolution=8, captions=CaptionSource(), reading=STREAMED)
    assert captioned.captions == [(f"picture {i}",) for i in range(12)]


def test_shards_are_the_same_and_a_stored_preparation_goes_on_streamed(tables, tmp_path, capsys):
    prepare(tables, tmp_path / "a", resolution=8, shard_size=5, batch_size=2, progress=False)
    words = ["prepare", str(tables), "--resolution", "8", "--shard-size", "5", "--batch-size", "2", "--streaming"]
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    files = {path.name for path in (tmp_path / "a").glob("*.safetensors")}
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before = toy.tree(tmp_path / "a")
    assert main([*words, "--out", str(tmp_path / "a")]) == 0 and toy.tree(tmp_path / "a") == before


def test_part_of_the_shards_skips_the_rows_of_others(tables, tmp_path):
    options = {"resolution": 8, "shard_size": 3, "batch_size": 2, "progress": False, "reading": STREAMED}
    for part in ("2/2", "1/2"):
        prepare(tables, tmp_path / "parts", part=part, **options)
    prepare(tables, tmp_path / "whole", **options)
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("whole", "parts")
    )
    assert len(whole) == 4 and parts == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "streamed pictures are read once, in their order; give --resolution"),
        (["--resolution", "8", "--buckets", "3"], "buckets need the size of every picture"),
    ],
)
def test_what_streaming_cannot_do_is_refused(tables, tmp_path, capsys, words, message):
    assert main(["prepare", str(tables), "--out", str(tmp_path / "out"), "--streaming", *words]) == 1
    assert message in capsys.readouterr().err


def test_streaming_of_a_folder_is_ignored_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="streaming is ignored: .* is not a table"):
        open_source(toy.pictures(tmp_path / "x"), resolution=8, reading=STREAMED)


def broken(i):
    yield from range(i, 3)
    raise OSError("connection reset")


def test_broken_stream_is_no_bad_picture(tables, tmp_path, monkeypatch):
    """Otherwise --skip-bad would leave out all pictures after it."""
    real = datasets.IterableDataset.__iter__

    def breaks(self):
        yield from itertools.islice(real(self), 4)
        raise ConnectionError("connection reset\nby peer")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", breaks)
    options = {"resolution": 8, "batch_size": 2, "progress": False, "reading": STREAMED, "skip_bad": True}
    with pytest.raises(
        ValueError, match=r"row 00000004: cannot be read now \(.*connection reset.*repeat later"
    ) as error:
        prepare(tables, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", real)
    assert prepare(tables, tmp_path / "out", **options).count == 12


def test_items_in_order_are_read_once_and_far_or_earlier_ones_begin_again():
    begun = []

    def begin(i):
        begun.append(i)
        return iter(range(i, 1000))

    read = InOrder(begin)
    assert [read(i) for i in (3, 4, 4, 9)] == [3, 4, 4, 9] and begun == [3]
    assert read(2) == 2 and read(FAR + 500) == FAR + 500 and begun == [3, 2, FAR + 500]
    with pytest.raises(OSError, match="the stream has ended before this row"):
        read(1001)
    read = InOrder(broken)
    with pytest.raises(OSError, match="connection reset"):
        read(5)
    assert read(1) == 1
