"""Small pictures of several aspect ratios, in class folders or with captions, and data prepared from them as buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from selftrans.data.encode_captions import TextOptions
from selftrans.data.prepare_buckets import prepare_buckets
from tests.support import captioned, toy
from tests.support.pictures import encoded, write
from tests.support.shared import once

SIZES = ((8, 16), (16, 8), (12, 12))  #: of the pictures, in turn: wide, tall, square
NAMES = ("6x10", "8x8", "10x6")  #: of their buckets of 8x8 pixels: 8 / sqrt 2 is 5.7, and 64 / 6 is 10.7
COUNTS = {"6x10": 8, "8x8": 8, "10x6": 8}


def picture(i: int) -> np.ndarray:
    """(H, W, 3) uint8 of size SIZES[i % 3]."""
    return np.random.default_rng(i).integers(0, 256, (*SIZES[i % 3], 3), dtype=np.uint8)


def pictures(folder: Path, count: int = 24) -> Path:
    """PNGs in the folders `cat` and `dog`."""
    return write(folder, {f"{('cat', 'dog')[i // 3 % 2]}/{i:03d}.png": encoded(picture(i)) for i in range(count)})


def prepared(folder: Path, **options: Any) -> Path:
    """Three buckets of eight pictures each."""
    if not (folder / "pictures").exists():
        pictures(folder / "pictures")
    prepare_buckets(
        folder / "pictures", folder / "data", **{"resolution": 8, "buckets": 3, "progress": False} | options
    )
    return folder / "data"


@once
def shared() -> Path:
    """Such data that all tests share: copy them before you change them."""
    return prepared(toy.place("ratios"))


def with_captions(folder: Path, store: Any = "tokens") -> Path:
    """The same pictures with captions."""
    files = {}
    for i in range(24):
        files[f"{i:03d}.png"] = encoded(picture(i))
        files[f"{i:03d}.txt"] = "\n".join(captioned.sentences(i)).encode()
    write(folder / "pictures", files)
    return prepared(folder, text=TextOptions(captioned.save_text_encoder(folder / "encoder"), None, store=store))
