"""The options of `prepare`: what is read of a source, what encodes it, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from selftrans.data import resumable
from selftrans.data.encode_captions import TextOptions
from selftrans.data.manifest import DTYPES
from selftrans.data.resolution import Resolution
from selftrans.data.sources.clips import MediaOptions
from selftrans.data.sources.decode import STANDARD, Reading
from selftrans.precision import PRECISIONS, dtype_name

NETWORK_DTYPES = {dtype_name(name): dtype for name, dtype in PRECISIONS.items()}  #: "float32", ... -> torch dtype


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of `prepare` and `prepare_buckets`. ValueError for one out of range."""

    # what is read
    resolution: Resolution | None = None  #: side, or (height, width), to crop and resize to; None keeps the size
    square: bool = False  #: refuse pictures that are not square
    split: str | None = None  #: of a hub data set (None: train) or a folder (None: all)
    label_column: str | None = None  #: of tables
    reading: Reading = STANDARD  #: how pictures and frames of videos are read
    media: MediaOptions = field(default_factory=MediaOptions)  #: how sounds and videos are read
    skip_bad: bool = False  #: skip unreadable samples and list them in the manifest, instead of stopping at the first

    # what encodes it
    autoencoder: str = (
        "pixel"  #: with "values" the source holds arrays that are not pictures (see `npz_values`, `npy_values`)
    )
    #: store captions (see `open_source`) with these options; a text encoder's name (see `load_text_encoder`) becomes options
    text: TextOptions | None = None
    flip: bool = False  #: store the moments of the mirrored pictures as a second copy
    batch_size: int = 64
    precision: str = "float32"  #: of the networks
    device: str | torch.device | None = None  #: None: a GPU if there is one

    # how it is written
    standardise: bool | None = (
        None  #: give latents zero mean and unit variance per channel; None: see `standardise_option`
    )
    dtype: str | None = None  #: of the stored moments; None: float32 for values and sounds, else float16
    shard_size: int = 8192
    #: "I/N": make every Nth shard only; other processes make the others in the same folder. The part that ends last writes
    #: the manifest. Until then, the manifest that is returned lists the shards made so far
    part: str = "1/1"
    progress: bool = True  #: whether messages and progress bars are shown

    def __post_init__(self) -> None:
        if isinstance(self.text, str):
            object.__setattr__(self, "text", TextOptions(self.text))
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.precision not in NETWORK_DTYPES:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(NETWORK_DTYPES)}")
        if self.batch_size < 1 or self.shard_size < 1:
            raise ValueError(f"batch_size {self.batch_size} and shard_size {self.shard_size} should be 1 or more")
        resumable.parse_part(self.part)
