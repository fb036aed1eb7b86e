"""Small pictures for tests: random pixels, encoded, in folders and zips."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.data.encode import ShardEncoder
from selftrans.data.shard_plan import Decoded


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side: int = 8, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (side, side, channels) if channels > 1 else (side, side)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


#: class folders with pictures, as files by name, and their names in code point order
TREE = {
    "dog/b.png": encoded(noise(seed=1)),
    "dog/a.PNG": encoded(noise(seed=2)),
    "cat/deep/er/c.png": encoded(noise(seed=3)),
    "Zebra finch/ü ñ 猫.png": encoded(noise(seed=4)),
}
ORDER = ["Zebra finch/ü ñ 猫.png", "cat/deep/er/c.png", "dog/a.PNG", "dog/b.png"]


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def class_folders(root: Path, count: int = 23) -> Path:
    """PNGs 00.png .. of 8x8 in the folders `cat` and `wild dog`."""
    return write(root, {f"{'cat' if i % 3 else 'wild dog'}/{i:02d}.png": encoded(noise(8, i)) for i in range(count)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_vae(folder: Path, channels: int = 2, seed: int = 0) -> str:
    """A tiny AutoencoderKL that halves once, with random weights, saved as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return str(folder)


@contextmanager
def stopped_after(count: int) -> Iterator[None]:
    """Ctrl-C after this many samples were encoded."""
    encode, seen = ShardEncoder.encode, 0

    def counting(self: ShardEncoder, decoded: Decoded) -> np.ndarray:
        nonlocal seen
        seen += len(decoded.good)
        if seen > count:
            raise KeyboardInterrupt
        return encode(self, decoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardEncoder, "encode", counting)
        with pytest.raises(KeyboardInterrupt):
            yield
