"""Every parser of untrusted files, as a function of the file, with valid examples to start from.

A parser may return, or raise ValueError in one short line. It may not raise anything else, write outside its folder, start
a process, open a connection, look up the names in a pickle, or take memory and time out of proportion to its input.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import load_model
from selftrans.config import to_json
from selftrans.data import resumable
from selftrans.data.buckets import read_names
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Features
from selftrans.data.sources.captions import CaptionSource, annotated, parse_captions
from selftrans.data.sources.clips import MediaOptions, open_clips
from selftrans.data.sources.decode import open_picture
from selftrans.data.sources.file_kinds import SOUNDS
from selftrans.data.sources.npz import npz_labels, npz_values
from selftrans.data.sources.open_source import iter_images, open_source
from selftrans.data.sources.source import Source
from selftrans.encoders.media import Mel, Video, parse_media
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.opened_samples import _stored
from selftrans.experiments.reference import _names
from selftrans.interop.importing import import_run
from selftrans.interop.published_file import read as read_published
from selftrans.plain_json import from_plain, parse_object, read_text
from selftrans.recipes import recipe
from selftrans.sampling import folder as samples_io
from selftrans.sampling.sample_file import read_npy, read_png, write_npy
from selftrans.train.log import JsonlLog
from selftrans.train.resume import _read, from_json
from selftrans.types import Conditions
from tests.support.clips import moving, save_gif, save_mp4, save_sound, sine
from tests.support.pictures import encoded, noise
from tests.support.shards import make

LONGEST = 1200  #: characters of an error message without the path of its file


class Parser(NamedTuple):
    file: str  #: name of the input file
    parse: Callable[[Path], object]  #: the file
    examples: Callable[[], list[bytes]]
    runs: int  #: inputs tried in the slow suite, guided by coverage
    around: Callable[[Path], object] = lambda folder: None  #: writes the other files of the folder, once
    #: input -> content of the file, with correct lengths and checksums; otherwise these would refuse every mutation
    wrap: Callable[[bytes], bytes] = bytes


# ---- other files that a parser needs, and valid examples


def jsons(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


@functools.cache
def prepared() -> dict[str, bytes]:
    """A folder of shards, from `tests.support.shards`."""
    with temporary() as folder:
        make(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@functools.cache
def run_files() -> dict[str, bytes]:
    """A checkpoint of a model with a few hundred parameters."""
    small = {"model.width": 4, "model.depth": 1, "model.heads": 1, "model.patch": 4}
    config = recipe("digits").override(small).restricted()
    model = config.build_model((1, 8, 8), Conditions("labels", 2))
    header = {
        "stage": "stage1",
        "step": 3,
        "shape": [1, 8, 8],
        "order": ["stage1", "stage2"],
        "conditions": {"kind": "labels", "num_classes": 2},
        "classes": ["a", "b"],
        "autoencoder": "pixel",
        "config": json.loads(to_json(config)),
    }
    with temporary() as folder:
        weights = dict(model.state_dict())
        state = header | {"seconds": 1.5, "window": {"loss": [0.5, 1]}, "scaler": None, "processes": 1, "teacher": None}
        path = checkpoint.save(folder, 3, {"student": weights, "ema": weights, "heads": {}}, state, header)
        return {file.name: file.read_bytes() for file in path.iterdir()}


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def put_anew(path: Path, data: bytes) -> None:
    """Write a file in the place of another one. ext4 takes 1 ms to overwrite a file, longer than most parsers read it."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def put(files: Callable[[], dict[str, bytes]], but: str = "") -> Callable[[Path], object]:
    def around(folder: Path) -> None:
        for name, data in files().items():
            if name != but:
                (folder / name).write_bytes(data)

    return around


def unfinished(folder: Path) -> None:
    """A folder of shards before its manifest was written."""
    put(prepared, but="manifest.json")(folder)
    plan = json.loads(prepared()["manifest.json"]) | {"count": 0, "shards": []}
    (folder / "plan.json").write_text(json.dumps(plan))


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these files, by the standard library."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def stored(files: dict[str, bytes]) -> bytes:
    """`packed` without compression, in microseconds: it is made for each input, and `zipfile` is watched for coverage."""
    entries, directory = bytearray(), bytearray()
    for name, data in files.items():
        # version, flags, method, time, date (1 January 1980), checksum, both sizes, length of the name, no extra field
        about = struct.pack("<5H3I2H", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0)
        place = struct.pack("<3H2I", 0, 0, 0, 0o600 << 16, len(entries))
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + about + place + name.encode()
        entries += b"PK\x03\x04" + about + name.encode() + data
    counts = struct.pack("<4H2IH", 0, 0, len(files), len(files), len(directory), len(entries), 0)
    return bytes(entries + directory) + b"PK\x05\x06" + counts


def wrapping(make: Callable[[], Callable[[bytes], bytes]]) -> Callable[[bytes], bytes]:
    """What `make` returns, made with the first input: the files around an input are the same for all."""
    made = functools.cache(make)
    return lambda data: made()(data)


def member(name: str, others: Callable[[], dict[str, bytes]] = dict) -> Callable[[bytes], bytes]:
    """A zip of the input, by this name, and of other files."""
    return wrapping(lambda: functools.partial(_with_member, name, others()))


def _with_member(name: str, others: dict[str, bytes], data: bytes) -> bytes:
    return stored({**others, name: data})


def labelled(image: np.ndarray) -> bytes:
    with temporary() as folder:
        shaped = image.reshape(1, *image.shape[:2], -1)
        samples_io._SampleFolder(folder, 1).write_batch(np.zeros(1, np.int64), np.ones(1, np.int64), shaped)
        return (folder / "000000.png").read_bytes()


def stored_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    write_npy(buffer, array, 1)
    return buffer.getvalue()


def parquet() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    def table(cells: list[Any], **options: Any) -> bytes:
        buffer = io.BytesIO()
        rows = pyarrow.table({"image": cells, "label": list(range(len(cells)))})
        pyarrow.parquet.write_table(rows, buffer, **options)
        return buffer.getvalue()

    data = [encoded(noise(8, i)) for i in range(2)]
    return [table(data), table([{"bytes": cell, "path": None} for cell in data], compression="gzip")]


def images(n: int = 3) -> np.ndarray:
    return np.stack([noise(8, i) for i in range(n)])


def statistics() -> dict[str, Any]:
    spatial = {"mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    more = {"features": np.zeros((5, 3), np.float32), "count": np.int64(5), "extractor": np.str_("x")}
    return {"mu": np.zeros(3), "sigma": np.eye(3), **spatial, **more}


@functools.cache
def classifier() -> bytes:
    with temporary() as folder:
        SmallClassifier(resolution=4, channels=1, num_classes=2, width=1, dim=2).save(folder / "c.safetensors")
        return (folder / "c.safetensors").read_bytes()


def stored_features() -> list[bytes]:
    entries = [{"index": i, "sha256": "0" * 64} for i in range(2)]
    about = {
        "encoder": "a/vit",
        "sha256": "1" * 64,
        "precision": "float32",
        "grid": 2,
        "width": 4,
        "fingerprint": "2" * 64,
    }
    return jsons({**about, "files": entries}, {**about, "files": []})


def published() -> dict[str, Any]:
    return {"blocks.0.attn.qkv.weight": torch.zeros(6, 2), "x_embedder.proj.bias": torch.zeros(2)}


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@functools.cache
def torch_files() -> list[bytes]:
    complete = {"model": published(), "ema": published(), "opt": {"state": {}, "param_groups": []}, "steps": 3}
    return [saved(published()), saved(complete | {"args": argparse.Namespace(model="SiT-XL/2", path_type="linear")})]


@functools.cache
def models(depth: int) -> dict[str, torch.Tensor]:
    from tests.support.published_files import state

    sizes = {"width": 4, "depth": depth, "heads": 1, "patch": 4, "channels": 1, "side": 8, "classes": 2}
    return {name: tensor.half() for name, tensor in state(**sizes, projectors="stage1").items()}


@functools.cache
def published_lightning() -> dict[str, torch.Tensor]:
    from tests.support.published_lightning import state

    return state(width=4, depth=1, heads=1, patch=4, channels=1, side=8, classes=10)


@functools.cache
def lightning_file() -> bytes:
    from tests.support.published_lightning import settings

    return saved({"ema": published_lightning(), "config": settings()})


@functools.cache
def torch_models() -> list[bytes]:
    from tests.support.published_files import options

    extra = {"opt": {"state": {}, "param_groups": []}, "args": options("repa", encoder_depth=1), "steps": 3}
    return [saved({"ema": models(1)} | extra)]


# ---- a part of a file, and the file around it


def header(file: bytes) -> bytes:
    """The json of a safetensors file."""
    return file[8 : 8 + int.from_bytes(file[:8], "little")]


def with_header(file: bytes) -> Callable[[bytes], bytes]:
    """A safetensors file with another header and the same data."""
    numbers = file[8 + len(header(file)) :]
    return lambda data: len(data).to_bytes(8, "little") + data + numbers


def pickled(file: bytes) -> bytes:
    """The pickle in a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def with_pickle(file: bytes) -> Callable[[bytes], bytes]:
    """A file of torch.save with another pickle and the same tensors."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    return lambda data: stored({name: data if name.endswith("/data.pkl") else x for name, x in records.items()})


def sealed(data: bytes) -> bytes:
    """A state.json with a correct hash of its own content."""
    try:
        state = json.loads(data)
        state["sha256"].pop("state.json", None)
        state["sha256"]["state.json"] = checkpoint._state_sha256(state)
        return json.dumps(state).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


# ---- the parsers, as the commands call them


def imported(path: Path) -> None:
    """The complete `selftrans import`; its output is removed."""
    try:
        import_run(path, path.parent / "run", heads=1, say=lambda line: None)
    finally:
        shutil.rmtree(path.parent / "run", ignore_errors=True)


def picture(path: Path) -> None:
    source = Source(["a.png"], lambda i: open_picture(path), labels=np.zeros(1, np.int64), resolution=8)
    assert source.read(0).shape == (8, 8, 3)


def clip(path: Path) -> None:
    frames = None if path.suffix in SOUNDS else 2
    options = MediaOptions(
        frames=frames, **({} if frames else {"audio": "mel", "rate": 1000, "length": 0.1, "bins": 4})
    )
    opened = open_clips(path.parent, options, resolution=8 if frames else None)
    assert opened is not None and opened.read(0).shape == opened.shape


def clips(suffix: str) -> Callable[[], list[bytes]]:
    def examples() -> list[bytes]:
        with temporary() as folder:
            path = folder / f"a{suffix}"
            if suffix in SOUNDS:
                save_sound(path, sine(200, 0.05, 2000), 2000)
            else:
                (save_gif if suffix == ".gif" else save_mp4)(path, moving(0, frames=3))
            return [path.read_bytes()]

    return examples


def media_name(path: Path) -> None:
    media = parse_media(path.read_bytes().decode(errors="replace"))
    assert parse_media(media.name) == media


def source(path: Path) -> None:
    opened = open_source(path, resolution=8)
    for i in range(min(len(opened), 4)):
        with contextlib.suppress(ValueError):
            opened.read(i)


def captioned_source(path: Path) -> None:
    opened = open_source(path, resolution=8, captions=CaptionSource())
    assert opened.captions is not None and len(opened.captions) == len(opened) and len(opened.fingerprint) == 64
    assert all(captions or i in opened.faults for i, captions in enumerate(opened.captions))
    for i in range(min(len(opened), 4)):
        with contextlib.suppress(ValueError):
            opened.read(i)


def annotations(path: Path) -> None:
    pictures = Source(["a.png", "x/b.png"], lambda i: open_picture(path), labels=np.zeros(2, np.int64), resolution=8)
    opened = annotated(pictures, path)
    assert len(opened.fingerprint) == 64 and {"a.png", "x/b.png"} <= {*opened.names}


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.png", encoded(noise(4))), ("a.txt", b"one\ntwo"), ("b.json", b'{"caption": "x"}')):
            info = tarfile.TarInfo(name if name != "b.json" else "long" * 30 + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def coco() -> list[bytes]:
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    captions = [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}, {"image_id": 2, "caption": ""}]
    return jsons({"images": images, "annotations": captions})


@functools.cache
def captioned() -> dict[str, bytes]:
    """A folder of shards with captions."""
    from tests.support.captioned import prepared as prepare_captioned

    with temporary() as folder:
        data = prepare_captioned(folder, count=4)
        return {path.name: path.read_bytes() for path in data.iterdir()}


def read_captions(path: Path) -> None:
    dataset = Dataset.open(path.parent)
    dataset.manifest.summary()
    dataset.read(np.arange(len(dataset)))
    assert len(dataset.captions(np.arange(len(dataset)))) == len(dataset) and dataset.null() is not None


def sample(path: Path) -> None:
    pixels, label = read_png(path)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and label >= -1


def sample_array(path: Path) -> None:
    values, label = read_npy(path)
    assert values.dtype == np.float32 and np.isfinite(values).all() and label >= 0


def npz_samples(path: Path) -> None:
    for batch in iter_images(path):
        assert batch.dtype in (np.float32, np.uint8) and 3 <= batch.ndim <= 5 and np.isfinite(batch).all()


def npz_pictures(path: Path) -> None:
    samples_io._npz_count(path)
    labels = npz_labels(path)
    assert labels is None or labels.dtype == np.int64
    for batch in iter_images(path):
        assert batch.dtype in (np.float32, np.uint8) and 3 <= batch.ndim <= 5


def read_all(path: Path) -> None:
    dataset = Dataset.open(path.parent)
    tensors = dataset.read(np.arange(len(dataset)))
    assert torch.isfinite(tensors["moments"]).all() and int(tensors["labels"].max()) < 3


def values(path: Path) -> None:
    arrays = npz_values(path)
    assert len(arrays.fingerprint) == 64 and arrays.labels.shape == (len(arrays),)
    for i in range(min(len(arrays), 4)):
        assert arrays.read(i).shape == arrays.shape


def table(path: Path) -> None:
    """Reads rows through the cache of `datasets`, which is put in the folder for this test."""
    import datasets

    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, str(path.parent / "cache")
    datasets.disable_progress_bars()
    try:
        source(path)
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
        shutil.rmtree(path.parent / "cache", ignore_errors=True)


def samples_json(path: Path) -> None:
    with contextlib.suppress(ValueError):
        _stored(path.parent)
    data = path.read_bytes()
    try:
        samples_io._SampleFolder(path.parent, 3).begin({"steps": 4, "guidance": {"scale": 1.5}})
    finally:
        put_anew(path, data)


def journal(path: Path) -> None:
    JsonlLog(path, resume_step=4).close()
    for line in path.read_text().splitlines():
        assert json.loads(line)["step"] <= 4


SETTINGS = {"steps": 4, "guidance": {"scale": 1.5}}
PARSERS: dict[str, Parser] = {
    "manifest": Parser(
        "manifest.json",
        lambda path: Dataset.open(path.parent).manifest.summary(),
        lambda: [prepared()["manifest.json"]],
        6_000,
        put(prepared, but="manifest.json"),
    ),
    "buckets": Parser(
        "buckets.json",
        lambda path: read_names(path.parent),
        lambda: [b'{"version": 1, "buckets": ["192x336", "256x256"]}'],
        1_500,
    ),
    "captions_manifest": Parser(
        "manifest.json",
        read_captions,
        lambda: [captioned()["manifest.json"]],
        1_500,
        put(captioned, but="manifest.json"),
    ),
    "captions_shard": Parser(
        "shard-00000.safetensors",
        read_captions,
        lambda: [captioned()["shard-00000.safetensors"]],
        1_500,
        put(captioned, but="shard-00000.safetensors"),
    ),
    "captions_null": Parser(
        "null.safetensors",
        read_captions,
        lambda: [captioned()["null.safetensors"]],
        700,
        put(captioned, but="null.safetensors"),
    ),
    "captions_json": Parser(
        "a.json",
        lambda path: parse_captions(".json", path.read_bytes()),
        lambda: jsons({"caption": "x"}, {"captions": ["x", "y"], "width": 3}, {"text": "x"}),
        1_500,
    ),
    "wav": Parser("a.wav", clip, clips(".wav"), 1_000),
    "flac": Parser("a.flac", clip, clips(".flac"), 1_000),
    "gif_video": Parser("a.gif", clip, clips(".gif"), 500),
    "mp4": Parser("a.mp4", clip, clips(".mp4"), 700),
    "media_name": Parser("name", media_name, lambda: [Mel(8000, 9, 64).name.encode(), Video(2.5).name.encode()], 1_000),
    "annotations": Parser("captions.json", annotations, coco, 1_500),
    "tar": Parser("a.tar", captioned_source, lambda: [tarred()], 3_000),
    "shard": Parser(
        "shard-00000.safetensors",
        read_all,
        lambda: [prepared()["shard-00000.safetensors"]],
        3_000,
        put(prepared, but="shard-00000.safetensors"),
    ),
    "shard_header": Parser(
        "shard-00000.safetensors",
        read_all,
        lambda: [header(prepared()["shard-00000.safetensors"])],
        4_500,
        put(prepared, but="shard-00000.safetensors"),
        wrapping(lambda: with_header(prepared()["shard-00000.safetensors"])),
    ),
    "shard_record": Parser(
        "shard-00000.json",
        lambda path: resumable.earlier(path.parent),
        lambda: jsons(json.loads(prepared()["manifest.json"])["shards"][0]),
        3_500,
        unfinished,
    ),
    "config": Parser(
        "config.json",
        lambda path: _read(path, from_json).check(),
        lambda: [to_json(recipe("digits").restricted()).encode()],
        8_000,
    ),
    "state": Parser(
        "state.json",
        lambda path: checkpoint.read(path.parent),
        lambda: [run_files()["state.json"]],
        2_500,
        put(run_files, but="state.json"),
    ),
    "sealed_state": Parser(
        "state.json",
        lambda path: checkpoint.read(path.parent),
        lambda: [run_files()["state.json"]],
        4_500,
        put(run_files, but="state.json"),
        sealed,
    ),
    "header": Parser("ema.safetensors", checkpoint.read_header, lambda: [run_files()["ema.safetensors"]], 5_500),
    "weights": Parser("ema.safetensors", load_model, lambda: [run_files()["ema.safetensors"]], 700),
    "weights_header": Parser(
        "ema.safetensors",
        load_model,
        lambda: [header(run_files()["ema.safetensors"])],
        1_500,
        wrap=wrapping(lambda: with_header(run_files()["ema.safetensors"])),
    ),
    "classifier": Parser("c.safetensors", SmallClassifier.load, lambda: [classifier()], 2_000),
    "samples": Parser(
        "samples.json",
        samples_json,
        lambda: jsons(
            {"num": 3, "complete": True, "settings": SETTINGS}, {"num": 1, "complete": False, "settings": SETTINGS}
        ),
        4_000,
        lambda folder: (folder / "samples.npz").write_bytes(npz(arr_0=images(), arr_1=np.arange(3))),
    ),
    "sample": Parser(
        "000000.png", sample, lambda: [labelled(noise(6)), labelled(noise(6, channels=1)), encoded(noise(6))], 2_500
    ),
    "sample_array": Parser(
        "000000.npy",
        sample_array,
        lambda: [stored_array(np.ones(shape, np.float32)) for shape in ((1, 3), (2, 2, 2), (1, 2, 1, 2))],
        3_000,
    ),
    "npz_samples": Parser(
        "x.npz",
        npz_samples,
        lambda: [npy(np.ones((3, 1, 4), np.float32)), npy(np.ones((2, 2, 2, 2), np.float32))],
        3_000,
        wrap=member("arr_0.npy"),
    ),
    "npz": Parser(
        "x.npz",
        npz_pictures,
        lambda: [npz(arr_0=images(), arr_1=np.arange(3)), packed({"arr_0.npy": npy(images())}, zipfile.ZIP_DEFLATED)],
        2_000,
    ),
    "npz_member": Parser("x.npz", npz_pictures, lambda: [npy(images())], 2_500, wrap=member("arr_0.npy")),
    "statistics": Parser(
        "s.npz", Statistics.load, lambda: [npz(**statistics()), npz(mu=np.zeros(3), sigma=np.eye(3))], 1_500
    ),
    "statistics_member": Parser(
        "s.npz",
        Statistics.load,
        lambda: [npy(np.zeros(3)), npy(np.zeros(3, np.float32))],
        1_500,
        wrap=member("mu.npy", lambda: {"sigma.npy": npy(np.eye(3)), "source.npy": npy(np.str_("x"))}),
    ),
    "reference": Parser("r.npz", _names, lambda: [npz(**statistics()), npz(arr_0=images())], 2_000),
    "picture": Parser(
        "a.png",
        picture,
        lambda: [encoded(noise(9), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")],
        3_500,
    ),
    "zip": Parser(
        "x.zip",
        source,
        lambda: [
            packed({f"{name}/a.png": encoded(noise()) for name in ("cat", "dog")}, method)
            for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        ],
        2_500,
    ),
    "parquet": Parser("x.parquet", table, parquet, 200),
    "features": Parser(
        "features-00000.json",
        lambda path: from_plain(Features, parse_object(read_text(path), "x"), "x"),
        stored_features,
        4_500,
    ),
    "values": Parser(
        "x.npz",
        values,
        lambda: [
            npz(data=np.ones((3, 2, 4)), labels=np.arange(3), classes=np.array(["a", "b", "c"])),
            packed({"data.npy": npy(np.ones((3, 2, 4), np.float32))}, zipfile.ZIP_DEFLATED),
        ],
        2_000,
    ),
    "values_member": Parser("x.npz", values, lambda: [npy(np.ones((3, 2, 4)))], 2_500, wrap=member("data.npy")),
    "values_labels": Parser(
        "x.npz",
        values,
        lambda: [npy(np.arange(3)), npy(np.arange(3, dtype=np.uint8))],
        1_500,
        wrap=member("labels.npy", lambda: {"data.npy": npy(np.ones((3, 2, 4)))}),
    ),
    "values_classes": Parser(
        "x.npz",
        values,
        lambda: [npy(np.array(["a", "b", "c"]))],
        1_500,
        wrap=member("classes.npy", lambda: {"data.npy": npy(np.ones((3, 2, 4))), "labels.npy": npy(np.arange(3))}),
    ),
    "torch": Parser("x.pt", read_published, torch_files, 1_500),
    "torch_pickle": Parser(
        "x.pt",
        read_published,
        lambda: [pickled(torch_files()[1])],
        2_000,
        wrap=wrapping(lambda: with_pickle(torch_files()[1])),
    ),
    "safetensors": Parser(
        "x.safetensors",
        read_published,
        lambda: [save(published()), save({f"ema.{name}": tensor for name, tensor in published().items()})],
        3_500,
    ),
    "import": Parser("x.safetensors", imported, lambda: [save(models(2))], 300),
    "import_header": Parser(
        "x.safetensors",
        imported,
        lambda: [header(save(models(2)))],
        500,
        wrap=wrapping(lambda: with_header(save(models(2)))),
    ),
    "import_lightning": Parser(
        "x.safetensors",
        imported,
        lambda: [header(save(published_lightning()))],
        300,
        wrap=wrapping(lambda: with_header(save(published_lightning()))),
    ),
    "import_lightning_pickle": Parser(
        "x.pt",
        imported,
        lambda: [pickled(lightning_file())],
        250,
        wrap=wrapping(lambda: with_pickle(lightning_file())),
    ),
    "import_pickle": Parser(
        "x.pt",
        imported,
        lambda: [pickled(torch_models()[0])],
        500,
        wrap=wrapping(lambda: with_pickle(torch_models()[0])),
    ),
    "log": Parser(
        "log.jsonl", journal, lambda: [b'{"step": 2}\n{"step": 4}\n{"step": 6, "loss": 0.5}\n{"step": 8'], 2_000
    ),
}


# ---- one input


@contextlib.contextmanager
def folder_for(name: str) -> Iterator[Path]:
    """A folder with the other files that the parser `name` needs."""
    with temporary() as folder:
        PARSERS[name].around(folder)
        for data in PARSERS[name].examples():  # does all lazy imports before anything is watched
            (folder / PARSERS[name].file).write_bytes(PARSERS[name].wrap(data))
            PARSERS[name].parse(folder / PARSERS[name].file)
        before = sorted(os.listdir(folder))
        yield folder
        assert sorted(os.listdir(folder)) == before


def attempt(name: str, folder: Path, data: bytes) -> bool:
    """Parse `data`; True if it was accepted. AssertionError if the parser does what it may not."""
    parser = PARSERS[name]
    path = folder / parser.file
    put_anew(path, parser.wrap(data))
    try:
        with warnings.catch_warnings(), watched(folder):
            warnings.simplefilter("ignore")
            parser.parse(path)
    except ValueError as error:
        message = str(error).replace(str(path), "").replace(str(folder), "")
        assert message.strip() and "\n" not in message and len(message) < LONGEST, repr(message)
        return False
    return True


WATCHED: list[Path] = []
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.symlink",
    "socket.connect",
    "pickle.find_class",
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")


class Violation(AssertionError):
    """A parser did something that a file must never cause."""


VIOLATIONS: list[str] = []  #: since `watched` began; kept because a parser may catch the error


def _violation(what: str) -> None:
    VIOLATIONS.append(what)
    raise Violation(what)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not WATCHED:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in FORBIDDEN:
        _violation(f"{event} {arguments}")
    if writes or event in CHANGES:
        below = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1  # descriptor of an open folder
        base = os.readlink(f"/proc/self/fd/{below}") if below >= 0 else os.getcwd()
        for name in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            target = Path(os.path.abspath(os.path.join(base, os.fsdecode(name)))) if not isinstance(name, int) else None
            if target and not target.is_relative_to(WATCHED[-1]) and target != Path(os.devnull):
                _violation(f"{event} {target}")


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raise Violation for a process, a connection, an unpickled name, or a file written outside `folder`."""
    WATCHED.append(Path(os.path.abspath(folder)))
    VIOLATIONS.clear()
    try:
        yield
    finally:
        WATCHED.pop()
        if VIOLATIONS:
            raise Violation(VIOLATIONS[0])


sys.addaudithook(_audit)
