"""Files => batches of images: stored pictures, arrays of an npz, or prepared data decoded by its autoencoder.

Pictures are uint8 (n, H, W, C), arrays that are not pictures float32 (n, C, *S).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.decoded import decoded_images
from selftrans.data.sources.open_source import iter_images


def open_images(path: Path) -> Iterator[np.ndarray]:
    """Images of a folder, zip or npz, or of prepared data, in batches. Raises ValueError for anything else."""
    if is_prepared(path):
        return decoded_images(open_data(path))
    return iter_images(path)
