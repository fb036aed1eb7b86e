"""A folder of shards, written by hand from the format's description."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNTS, CLASSES, SHAPE = (5, 0, 3), ("cat", "dog", "ü"), (2, 8, 4, 4)  # copies, M = 2C, H, W


def make(folder: Path, dtype: str = "float16") -> tuple[np.ndarray, np.ndarray]:
    """Three shards, one of them empty, written by hand from the format's description."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((sum(COUNTS), *SHAPE)).astype(dtype)
    labels = rng.integers(0, len(CLASSES), sum(COUNTS))
    shards, start = [], 0
    for k, count in enumerate(COUNTS):
        parts = {
            f"moments-{k:05d}.bin": moments[start : start + count].astype({"float16": "<f2", "float32": "<f4"}[dtype]),
            f"labels-{k:05d}.bin": labels[start : start + count].astype("<i8"),
        }
        (file, labels_file), data = parts, [part.tobytes() for part in parts.values()]
        for name, content in zip(parts, data, strict=True):
            (folder / name).write_bytes(content)
        hashes = [hashlib.sha256(content).hexdigest() for content in data]
        shard = {"index": k, "file": file, "count": count, "sha256": hashes[0], "labels_file": labels_file}
        shards.append(shard | {"labels_sha256": hashes[1], "skipped": [["x/y.jpg", "cut off"]] if k == 1 else []})
        start += count
    manifest = {
        "version": 1,
        "count": sum(COUNTS),
        "copies": 2,
        "shape": [4, 4, 4],
        "stochastic": True,
        "dtype": dtype,
        "scale": 0.18215,
        "shift": 0.0,
        "autoencoder": "owner/name",
        "resolution": 32,
        "image_channels": 3,
        "classes": list(CLASSES),
        "source": "pictures",
        "options": {"flip": True, "resolution": None, "shard_size": 5},
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return moments, labels


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
