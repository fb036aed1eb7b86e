"""A folder of shards, written with the safetensors library from the description of the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

COUNTS, CLASSES, SHAPE = (5, 0, 3), ("cat", "dog", "ü"), (2, 8, 4, 4)  # copies, M = 2C, H, W


def make(folder: Path, dtype: str = "float16") -> tuple[np.ndarray, np.ndarray]:
    """Three shards, one of them empty, and their manifest; returns all moments and labels."""
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((sum(COUNTS), *SHAPE)).astype(dtype)
    labels = rng.integers(0, len(CLASSES), sum(COUNTS))
    write_shards(folder, moments, labels)
    shards = [
        {"index": k, "count": count, "sha256": sha256(folder, k), "skipped": [["x/y.jpg", "cut off"]] if k == 1 else []}
        for k, count in enumerate(COUNTS)
    ]
    manifest = {
        "version": 2,
        "count": sum(COUNTS),
        "copies": 2,
        "shape": [4, 4, 4],
        "latent_space": {"shift": 0.0, "scale": 0.18215, "stochastic": True},
        "dtype": dtype,
        "autoencoder": "owner/name",
        "resolution": 32,
        "image_channels": 3,
        "conditions": {"kind": "labels", "num_classes": 3},
        "classes": list(CLASSES),
        "source": "pictures",
        "options": {"flip": True, "resolution": None, "shard_size": 5},
        "shards": shards,
        "features": None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return moments, labels


def write_shards(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    """A safetensors file for each entry of COUNTS, with that many rows."""
    start = 0
    for k, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        (folder / name(k)).write_bytes(save({"moments": moments[rows], "labels": labels[rows].astype(np.int64)}))
        start += count


def name(k: int) -> str:
    return f"shard-{k:05d}.safetensors"


def sha256(folder: Path, k: int) -> str:
    return hashlib.sha256((folder / name(k)).read_bytes()).hexdigest()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
