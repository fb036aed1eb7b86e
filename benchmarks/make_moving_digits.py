"""Handwritten digits that move, as animated gifs in class folders: data for the recipe `moving_digits`.

    python benchmarks/make_moving_digits.py --out data/gifs
    selftrans prepare data/gifs --out data/moving --frames 8 --grey

Each of scikit-learn's 1,797 scans (8x8) moves on a straight line through a frame of 12x12 pixels, for 8 frames, and bounces off
its edges. Start and direction are drawn at random, with a fixed seed. The class is the digit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE, FRAMES = 12, 8


def positions(random: np.random.Generator) -> np.ndarray:
    """(FRAMES, 2) row and column of the scan's corner: a random start, and one of eight directions, one pixel a frame."""
    free, direction = SIDE - 8, int(random.choice([0, 1, 2, 3, 5, 6, 7, 8]))  # 4 would stand still
    step = np.array(divmod(direction, 3)) - 1
    line = random.integers(0, free + 1, 2) + np.arange(FRAMES)[:, None] * step
    return free - np.abs(free - line % (2 * free))  # reflected at both ends


def video(scan: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Frames (FRAMES, SIDE, SIDE) uint8 of a scan (8, 8) uint8."""
    frames = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
    for frame, (row, column) in zip(frames, positions(random), strict=True):
        frame[row : row + 8, column : column + 8] = scan
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the class folders")
    args = parser.parse_args()
    data = load_digits()
    scans = np.rint(data.images * (255 / 16)).astype(np.uint8)
    for k, (scan, label) in enumerate(zip(scans, data.target, strict=True)):
        folder = args.out / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        first, *rest = [Image.fromarray(frame) for frame in video(scan, np.random.default_rng([0, k]))]
        first.save(folder / f"{k:04d}.gif", save_all=True, append_images=rest, duration=100, loop=0)
    print(f"{len(scans)} videos -> {args.out}")


if __name__ == "__main__":
    main()
