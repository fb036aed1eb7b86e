"""Samples => moments => one shard on disk.

Shape legend: N batch, (H, W, C) image, M moments channels, (C, *S) latent or values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from selftrans.data.encode_captions import CaptionEncoder
from selftrans.data.manifest import VERSION, Manifest, Shard, conditions_of
from selftrans.data.resolution import sides, size_text
from selftrans.data.shard_file import NUMBERS, stored, write_shard
from selftrans.data.shard_plan import Decoded, ShardPlan
from selftrans.data.sources.npz import NpzValues
from selftrans.data.sources.source import FileSamples, Source
from selftrans.encoders.autoencoder import Autoencoder, from_uint8
from selftrans.encoders.identity import identity_kind, standardised_name
from selftrans.messages import printable
from selftrans.plain_json import Option
from selftrans.storage import sha256_file


@dataclass(frozen=True)
class ShardEncoder(ShardPlan):
    """Encodes samples, by index, into the moments that a shard stores."""

    autoencoder: Autoencoder
    device: torch.device
    flip: bool
    dtype: str
    text: CaptionEncoder | None = None  #: for pictures with captions

    @torch.no_grad()
    def encode(self, decoded: Decoded) -> np.ndarray:
        """Moments (N, copies, M, *S) in the stored dtype. Raises ValueError when they exceed its range."""
        arrays = np.stack(decoded.arrays)  # (N, H, W, C) or (N, C, *S)
        if identity_kind(self.autoencoder.name) == "pixel":
            return self._look_up(arrays)
        moments = torch.stack([self.autoencoder.encode(view).stack() for view in self._views(arrays)], dim=1)
        too_large = f"its moments are too large for {self.dtype}; try --dtype float32"
        return stored(moments, self.dtype, lambda row: f"{printable(self.source.name(decoded.good[row]))}: {too_large}")

    def _views(self, arrays: np.ndarray) -> tuple[Tensor, ...]:
        """The inputs of the autoencoder: values, or pixels and, with `flip`, the mirrored pixels."""
        inputs = torch.from_numpy(arrays).to(self.device)
        if not self.autoencoder.pictures:
            return (inputs,)
        pixels = from_uint8(inputs)
        return (pixels, pixels.flip(dims=(-1,))) if self.flip else (pixels,)

    def _look_up(self, images: np.ndarray) -> np.ndarray:
        """The moments of pixels, looked up in a table of the 256 values.

        Arithmetic on full batches competes with the decoding threads for cores and is ten times slower.
        """
        values = from_uint8(torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1))
        table = values.flatten().to(NUMBERS[self.dtype][0]).numpy()
        planes = images.transpose(0, 3, 1, 2)
        views = (planes, planes[..., ::-1]) if self.flip else (planes,)
        return table[np.ascontiguousarray(np.stack(views, axis=1))]

    def plan(self, source: str, options: dict[str, Option]) -> Manifest:
        """The manifest without its shards. Raises ValueError for a resolution that the autoencoder cannot downsample."""
        model = self.autoencoder
        resolution = channels = None
        if model.pictures:
            pictures = cast(Source, self.source)
            resolution, channels = pictures.resolution, pictures.channels
            size = sides(resolution)
            if any(side % model.downsample for side in size):
                raise ValueError(
                    f"resolution {size_text(resolution)} is not a multiple of {model.downsample}, as {model.name} needs; "
                    "give another --resolution"
                )
            shape: tuple[int, ...] = (model.channels or channels, *(side // model.downsample for side in size))
        else:
            shape = cast(NpzValues | FileSamples, self.source).shape
        try:
            space = model.latent_space.of_channels(shape[0])
        except ValueError as error:
            raise ValueError(f"autoencoder {printable(model.name, 200)} {error}") from None
        kind = identity_kind(model.name)
        return Manifest(
            version=VERSION,
            count=0,
            copies=2 if self.flip else 1,
            shape=shape,
            latent_space=space,
            dtype=self.dtype,
            autoencoder=standardised_name(kind, space) if kind and space != model.latent_space else model.name,
            resolution=resolution,
            image_channels=channels,
            conditions=self.text.conditions if self.text else conditions_of(self.source.classes),
            classes=self.source.classes,
            source=source,
            options=options,
            shards=(),
            features=None,
            text=self.text.record if self.text else None,
        )

    def write(
        self, plan: Manifest, out: Path, shard: int, decoded: Iterator[Decoded], advance: Callable[[int], object]
    ) -> Shard:
        """Encode and write one shard from the next batches of `decoded`."""
        file, skipped = Shard(shard, 0, "", ()).file, list[tuple[str, str]]()
        with write_shard(out / file, plan.layout, self.asked(shard)) as rows:
            for batch in islice(decoded, len(self.batches(shard))):
                skipped += batch.skipped
                if batch.good:
                    encoded = self.encode(batch)
                    assert encoded.shape[1:] == plan.moments_shape, "the moments must have the shape in the manifest"
                    text = self.text.rows(batch.good) if self.text else {}
                    rows.write({"moments": encoded, "labels": self.source.labels[batch.good], **text})
                advance(batch.asked)
        return Shard(shard, rows.count, sha256_file(out / file), tuple(skipped))
