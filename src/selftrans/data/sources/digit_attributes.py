"""Attributes of a scanned digit, measured from its ink: what the captions of `digits_t2i` say, and how samples are judged.

Shape legend: N images of R rows and C columns; ink is float64 in [0, 1], 0 is paper. Lengths are in pixels of the scan;
rows count downwards and columns to the right, both from the middle of the image.
"""

from __future__ import annotations

import numpy as np

#: attribute -> its unit
ATTRIBUTES = {"thickness": "px", "slant": "degrees", "size": "px", "column": "px", "row": "px"}
FINE = 4  #: strokes are measured on an image with so many times the resolution
#: grey levels over which their edge is averaged: the middle quarter, so that blur does not count as thinness
EDGE = 0.25


def attributes(images: np.ndarray) -> dict[str, np.ndarray]:
    """Attribute -> (N,) float64, of uint8 images (N, R, C) or (N, R, C, 1) with bright ink on black.

    With I the ink of a pixel, sums over all pixels, m = sum I, and the second moments about the centroid
    s_xx = sum I (x - column)² / m, s_yy, s_xy:

    - thickness = 2 area / outline, the width of the strokes: a long stroke of length l and width w has the area l w and an
      outline of 2 l. Both are those of the level sets of the enlarged image, averaged over the grey levels of its edge; the
      outline is then the total variation of the clipped ink (coarea formula). For bars between 1.25 and 3 pixels wide the
      error is at most 13 %, from where the bar lies among the pixels; thinner ones are less certain.
    - slant = atan(-s_xy / s_yy), the angle of the vertical strokes; positive leans to the right, as rows count downwards.
    - size = sqrt(w h) with w = sqrt(12 s_xx) and h = sqrt(12 s_yy): the sides of a uniform rectangle with these moments.
    - column = sum I x / m and row = sum I y / m: the place of the centroid.

    All are 0 for an image without ink. Raises ValueError for images of another shape or type.
    """
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"attributes are measured on uint8 images (N, R, C) or (N, R, C, 1), not {images.dtype} {images.shape}"
        )
    ink = images / 255.0  # (N, R, C)
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in ink.shape[1:])
    mass = np.maximum(ink.sum(axis=(1, 2)), 1e-9)
    column, row = (ink @ columns).sum(axis=1) / mass, (ink.sum(axis=2) @ rows) / mass
    x, y = columns[None, None, :] - column[:, None, None], rows[None, :, None] - row[:, None, None]
    s_xx, s_yy, s_xy = ((ink * product).sum(axis=(1, 2)) / mass for product in (x * x, y * y, x * y))
    return {
        "thickness": _thickness(ink),
        "slant": np.degrees(np.arctan2(-s_xy, s_yy)) + 0.0,  # no -0
        "size": np.sqrt(12 * np.sqrt(s_xx * s_yy)),
        "column": column,
        "row": row,
    }


def levels(values: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Attribute -> (N,) int64 of -1, 0, 1: the lower, middle and upper third among the images of the same label.

    Within the label, so that a level says nothing of the label, and every combination of both exists: a seven that leans
    right leans more than most sevens.
    """
    found = {name: np.zeros(len(labels), dtype=np.int64) for name in values}
    for label in np.unique(labels):
        of = labels == label
        for name, value in values.items():
            low, high = np.quantile(value[of], [1 / 3, 2 / 3])
            found[name][of] = (value[of] > high).astype(np.int64) - (value[of] < low)
    return found


def _thickness(ink: np.ndarray) -> np.ndarray:
    """(N,) 2 area / outline in pixels; 0 where nothing is as dark as the edge."""
    fine = _enlarged(np.pad(ink, ((0, 0), (1, 1), (1, 1))))  # paper around it
    stroke = np.clip((fine - 0.5) / EDGE + 0.5, 0.0, 1.0)
    across, down = np.diff(stroke, axis=2)[:, :-1], np.diff(stroke, axis=1)[:, :, :-1]
    area, outline = stroke.sum(axis=(1, 2)) / FINE**2, np.hypot(across, down).sum(axis=(1, 2)) / FINE
    return np.divide(2 * area, outline, out=np.zeros_like(area), where=outline > 0)


def _enlarged(ink: np.ndarray) -> np.ndarray:
    """(N, FINE R, FINE C), interpolated linearly; what is outside the image is paper."""
    down, across = (_interpolation(side) for side in ink.shape[1:])
    return down @ ink @ across.T


def _interpolation(side: int) -> np.ndarray:
    """(FINE side, side) weights of linear interpolation between the centres of pixels."""
    centres = (np.arange(FINE * side) + 0.5) / FINE - 0.5
    return np.maximum(0.0, 1 - np.abs(centres[:, None] - np.arange(side)[None, :]))
