"""Images in the sizes of prepared data with several aspect ratios, in the same proportions.

Image k has the size of a row of the data: that of its caption, if its captions are those of the same data. Rows are taken in a
fixed shuffle, so as many images as rows have exactly the proportions of the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from selftrans.data.dataset import Dataset
from selftrans.data.resolution import size_text
from selftrans.sampling.conditioning import shuffled
from selftrans.sampling.images import SampledBatch, Sampler


class SizedSampler:
    """The images 0 .. num - 1 of a sampler in the sizes of `dataset`, those of one size after another.

    Of data of one shape, they have the model's own size, in order. Raises ValueError for sizes that the model does not take.

    Attributes:
        order: (num,) int64 indices of the images, as they come.
    """

    def __init__(self, sampler: Sampler, dataset: Dataset | None) -> None:
        self.sampler, indices = sampler, np.arange(sampler.settings.num)
        self._groups: list[tuple[Dataset | None, np.ndarray]] = [(None, indices)]
        if dataset is not None and len(dataset.of_one_shape) > 1:
            rows = shuffled(len(dataset))[indices % len(dataset)]
            part_of = np.searchsorted(np.cumsum(dataset.parts), rows, side="right")
            groups = [(part, np.flatnonzero(part_of == k)) for k, part in enumerate(dataset.of_one_shape)]
            self._groups = [(part, of_part) for part, of_part in groups if len(of_part)]
            for part, _ in self._groups:  # now, not when the others have been sampled
                self._resize(part)
            sampler.described["sizes"] = {
                size_text(part.manifest.resolution): len(of_part)
                for part, of_part in self._groups
                if part and part.manifest.resolution
            }
        self.order = np.concatenate([of_part for _, of_part in self._groups])

    def sample(self) -> Iterator[SampledBatch]:
        """Yield the images in batches of one size."""
        for part, indices in self._groups:
            self._resize(part)
            yield from self.sampler.sample(indices)

    def _resize(self, part: Dataset | None) -> None:
        if part is not None and part.manifest.resolution is not None:
            self.sampler.resize(part.manifest.resolution)
            self.sampler.described.pop("size", None)
