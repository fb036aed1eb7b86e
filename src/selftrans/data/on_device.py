"""Shards ⇒ the memory of a device: the whole set lies there and is indexed there, nothing is read during training.

ImageNet-256 in float16 moments of 4x32x32 latents (mean and std, unmirrored) takes 21 GB.
Shape legend: N batch, M moments channels, (C, H, W) latent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import NUMBERS, Shards

CHUNK = 1024  #: pictures copied at a time


class Resident(Shards):
    """The same numbers at the same positions as `shards`, held whole on `device`; stored features stay on the disk.

    Every number is checked once, here, where reading from the disk checks it at each visit. Raises ValueError for
    moments that are not finite, and when the device has no room.
    """

    def __init__(self, shards: Shards, device: torch.device | str) -> None:
        super().__init__(shards.path, shards.manifest, {}, shards.labels)
        self.device, manifest = torch.device(device), shards.manifest
        try:
            dtype = NUMBERS[manifest.dtype][0]
            self._held = torch.empty((len(shards), *manifest.moments_shape), dtype=dtype, device=device)
            self._held_labels = torch.from_numpy(shards.labels).to(device)
        except RuntimeError as error:  # torch's own error of a full device is one, too
            size = len(shards) * manifest.row_bytes / 1e9
            raise ValueError(
                f"{shards.path} takes {size:.1f} GB, which {self.device} has not free ({str(error).splitlines()[0]}); "
                "leave data.on_device off"
            ) from error
        for start in range(0, len(shards), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(shards)))
            self._held[start : start + len(rows)] = shards.read(rows)[0].to(device)

    def read(self, indices: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """As `Shards.read`, both results on the device."""
        rows = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if rows.device.type == "cpu":
            if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
                raise ValueError(f"indices {rows.min()} .. {rows.max()} leave the {len(self)} pictures of {self.path}")
            rows = rows.to(self.device, non_blocking=True)
        return self._held[rows], self._held_labels[rows]
