"""The external encoder of a stage: stored features of the data, or a frozen model that reads their pixels."""

from __future__ import annotations

from typing import Any

import torch

from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.encoders.vision import Encoder, load_encoder


class Stored:
    """Features that come with the data: nothing to compute, only their sizes and where they came from."""

    encode, flops, model = None, 0, None

    def __init__(self, shards: Dataset) -> None:
        found = shards.open_features()
        self.grid, self.width = found.grid, found.width
        self.source: dict[str, Any] = {"path": found.encoder, "sha256": found.sha256, "weights": found.sha256}


def external_encoder(
    name: str | None, config: RunConfig, shards: Dataset, device: torch.device, dtype: torch.dtype
) -> Stored | Encoder:
    """The encoder `name` on the grid of the student's tokens; None: what is stored with the data.

    Raises ValueError for data without features, and for a name where the data hold no pixels to encode.
    """
    manifest = shards.manifest
    prepare = (
        f"`selftrans prepare {manifest.source} --out {shards.path} --features MODEL`, its other options as they were"
    )
    if name is not None and manifest.autoencoder != "pixel":
        raise ValueError(
            f"{shards.path} holds latents of {manifest.autoencoder}, and encoder {name} reads pixels; store its features "
            f"by {prepare}, and leave the encoder out here"
        )
    if name is not None:
        return load_encoder(name, manifest.shape[1] // config.model.sizes()["patch"], device=device, dtype=dtype)
    try:
        return Stored(shards)
    except ValueError as error:
        if manifest.autoencoder == "pixel":
            raise ValueError(f"{error}; or give an encoder by hub id or folder, to be run on the pixels") from error
        raise ValueError(f"{error}: {prepare}") from error
