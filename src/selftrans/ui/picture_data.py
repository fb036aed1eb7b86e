"""The picture whose features are drawn: a row of a run's data, or an uploaded one, as latents of its model.

Shape legend: N pictures, (C, *S) latent, (H, W, C) picture.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selftrans.checkpoints.load import LoadedModel
from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decode_images, latents_of
from selftrans.data.resolution import resolution_of
from selftrans.data.sources.decode import check_pixels, open_picture, to_array, unreadable
from selftrans.encoders.autoencoder import Autoencoder, DiffusersAutoencoder, from_uint8, load_autoencoder
from selftrans.evaluate.plots import as_pictures, middle_slices
from selftrans.ui.contained import Contained, part
from selftrans.ui.run_state import RunState

OTHERS = 7  #: further pictures of the data from which the components are computed
UPLOAD_BYTES, UPLOAD_PIXELS = 16 << 20, 50_000_000  #: of an uploaded picture


class Pictures(NamedTuple):
    """Latents; the first is the one that is looked at."""

    z0: Tensor  #: (N, C, *S)
    labels: Tensor | None  #: (N,) of pictures of the data; None for an uploaded one
    shown: np.ndarray  #: (1, H, W, C) uint8, the first as it is decoded


def data_of(state: RunState, roots: Sequence[Path]) -> Dataset | None:
    """The prepared data of a run; None where they are in none of the folders `roots`, or cannot be read."""
    named = part(state.read().config, "data", dict).get("path")
    places = [_place(named, roots)] if isinstance(named, str) and "\0" not in named else []
    for place in [*places, state.place / "data"]:
        if place is not None and is_prepared(place.path) and not _has_links(place):
            try:
                return open_data(place.path)
            except ValueError:
                return None
    return None


def _place(named: str, roots: Sequence[Path]) -> Contained | None:
    path = Path(os.path.realpath(named))
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return None if root is None else Contained(root, path.relative_to(root).parts)


def _has_links(place: Contained) -> bool:
    """Whether a folder of data is reached through a symbolic link, or holds one."""
    return not place.inside() or any(
        os.path.islink(os.path.join(folder, name))
        for folder, below, names in os.walk(place.path)
        for name in (*below, *names)
    )


def decoded_upload(text: str | None) -> bytes | None:
    """The content of a picture from base64. ValueError where it is too large or no base64."""
    if text is None:
        return None
    if len(text) > UPLOAD_BYTES * 4 // 3:
        raise ValueError(f"the picture is larger than {UPLOAD_BYTES >> 20} MB")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the picture is not sent as base64") from error


def pictures(
    loaded: LoadedModel, dataset: Dataset | None, row: int, upload: bytes | None, device: torch.device
) -> Pictures:
    """The latents of an upload, or of a row of the data, and of OTHERS rows. ValueError where there is no such picture."""
    autoencoder, shape = load_autoencoder(loaded.autoencoder, device=device), tuple(loaded.model.shape)
    parts = () if dataset is None else dataset.of_one_shape
    fitting = next((part for part in parts if tuple(part.manifest.shape) == shape), None)
    others = np.random.default_rng(0).permutation(len(fitting))[:OTHERS] if fitting else np.zeros(0, dtype=np.int64)
    if upload is not None:
        first, labels = encoded(upload, autoencoder, shape), None
        z0 = torch.cat([first.cpu(), latents_of(fitting, others)[0]]) if fitting else first.cpu()
    elif fitting is None:
        raise ValueError(
            "the data of this run are not in the folders of this page; start it with their folder, too, or choose a picture"
        )
    elif not 0 <= row < len(fitting):
        raise ValueError(f"row {row:,} is not in the data; use 0 to {len(fitting) - 1:,}")
    else:
        z0, labels = latents_of(fitting, np.append(row, others))
    return Pictures(z0, labels, as_pictures(middle_slices(decode_images(autoencoder, z0[:1].to(device)))))


def encoded(content: bytes, autoencoder: Autoencoder, shape: tuple[int, ...]) -> Tensor:
    """The latent (1, C, H, W) of a picture file, cropped and resized as `prepare` does. ValueError where it has none."""
    if not autoencoder.pictures or len(shape) != 3:
        raise ValueError("this model is not one of pictures; choose a row of its data")
    height, width = (side * autoencoder.downsample for side in shape[1:])
    channels = autoencoder.pixel_channels if isinstance(autoencoder, DiffusersAutoencoder) else shape[0]
    try:
        image = open_picture(io.BytesIO(content))
        check_pixels(image.size, UPLOAD_PIXELS)
        array = to_array(image, resolution_of(height, width), channels)
    except Exception as error:  # decoders raise many types
        raise unreadable("the picture", error) from error
    return autoencoder.latent_space.mean(autoencoder.encode(from_uint8(torch.from_numpy(array[None]))).stack())
