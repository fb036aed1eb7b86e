"""Prepared data => device memory: all moments are copied there once, so training reads none from disk.

ImageNet-256 in float16 moments of 4x32x32 latents (mean and std, unmirrored) takes 21 GB.
Shape legend: N batch, M moments channels, (C, *S) latent.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.data.shard_file import NUMBERS, row_bytes
from selftrans.data.views import View

CHUNK = 1024  #: rows copied at a time


class OnDevice(View):
    """The same data as `dataset`, with moments and labels on `device`; text and features stay on disk.

    Every value is checked once, here; `Dataset` checks it at each read. Raises ValueError for
    moments that are not finite, and when the device has too little free memory.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str) -> None:
        super().__init__(dataset, dataset.labels, dataset.counts)
        self.device, manifest = torch.device(device), dataset.manifest
        try:
            dtype = NUMBERS[manifest.dtype][0]
            moments = torch.empty((len(dataset), *manifest.moments_shape), dtype=dtype, device=device)
            self._on_device = {"labels": torch.from_numpy(dataset.labels).to(device), "moments": moments}
        except RuntimeError as error:  # torch.OutOfMemoryError is a RuntimeError
            size = len(dataset) * row_bytes({"moments": manifest.layout["moments"]}) / 1e9
            raise ValueError(
                f"{dataset.path} needs {size:.1f} GB, more than {self.device} has free ({str(error).splitlines()[0]}); "
                "leave data.on_device off"
            ) from error
        for start in range(0, len(dataset), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(dataset)))
            moments[start : start + len(rows)] = dataset.read(rows, ["moments"])["moments"].to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process reads from disk: the device holds the moments once
        return self._dataset.__reduce__()

    @property
    def random_access(self) -> Dataset:
        """As that of the wrapped data: captions are not on the device."""
        return self._dataset.random_access

    def read(
        self, rows: np.ndarray | Tensor, names: Collection[str] | None = None, which: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """As `Dataset.read`; moments and labels are on the device."""
        wanted = self.names if names is None else names
        at = torch.as_tensor(rows, dtype=torch.int64).reshape(-1)
        if at.device.type == "cpu":
            self._check_range(at)
            at = at.to(self.device, non_blocking=True)
        on_disk = [name for name in wanted if name not in self._on_device]
        stored = self._dataset.read(rows, on_disk, which) if on_disk else {}
        return {name: stored[name] if name in stored else self._on_device[name][at] for name in wanted}
