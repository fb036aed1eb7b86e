"""Captions => the tensors of a shard, and how much room they take: the text half of `prepare`.

Shape legend: N pictures, K captions of a picture at most, L tokens of E channels, B bytes of a caption.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from selftrans.data.manifest import Manifest
from selftrans.data.manifest_text import (
    CAPTION,
    COUNT,
    IDS,
    MAX_CAPTION_BYTES,
    MAX_CAPTIONS,
    NULL,
    STORES,
    TEXT_DTYPES,
    Store,
    Text,
)
from selftrans.data.shard_file import row_bytes, stored, write_shard
from selftrans.data.sources.captions import CaptionSource
from selftrans.encoders.pretrained import encoder_name
from selftrans.encoders.text import BUILT_IN, Lost, TextEncoder
from selftrans.messages import gigabytes, plural, printable
from selftrans.plain_json import Option
from selftrans.storage import nearest_existing, sha256_file
from selftrans.types import MASK, TEXT, Conditions

COUNTED = 4096  #: captions whose length is counted at a time
RESERVE = 1 << 26  #: bytes of disk that must be left


@dataclass(frozen=True)
class TextOptions:
    """What `prepare` does with captions."""

    encoder: str  #: hub id or folder of a text encoder of `transformers`, or "minilm"
    tokens: int | None = None  #: L; None: see `load_text_encoder`
    dtype: str = "float16"  #: of stored tokens, one of TEXT_DTYPES
    store: Store = "tokens"  #: or "ids", which are encoded during training
    source: CaptionSource = field(default_factory=CaptionSource)  #: where the captions are
    most: int = 5  #: captions kept of each picture; the first ones

    def __post_init__(self) -> None:
        for name, value, choices in (("dtype", self.dtype, TEXT_DTYPES), ("store", self.store, STORES)):
            if value not in choices:
                raise ValueError(f"text {name} {value!r} is not one of {', '.join(choices)}")
        if not 1 <= self.most <= MAX_CAPTIONS:
            raise ValueError(f"captions per picture should be from 1 to {MAX_CAPTIONS}, not {self.most}")

    def recorded(self) -> dict[str, Option]:
        """The options that the manifest records."""
        return {
            "text": self.encoder if self.encoder == BUILT_IN else encoder_name(self.encoder),
            "text_tokens": self.tokens,
            "text_dtype": self.dtype,
            "text_store": self.store,
            "caption_column": self.source.column,
            "captions_per_picture": self.most,
        }


@dataclass(frozen=True)
class CaptionEncoder:
    """Encodes the captions of pictures into the tensors that a shard stores."""

    encoder: TextEncoder
    captions: Sequence[tuple[str, ...]]  #: of each sample of the source
    record: Text

    @classmethod
    def of(cls, encoder: TextEncoder, captions: Sequence[tuple[str, ...]], options: TextOptions) -> CaptionEncoder:
        """The encoder of these captions, with K and B just large enough for them."""
        kept = [of_one[: options.most] for of_one in captions]
        longest = max((len(text.encode()) for of_one in kept for text in of_one), default=1)
        record = Text(
            stored=options.store,
            dtype=options.dtype,
            captions=max(1, max(map(len, kept), default=1)),
            bytes=min(longest, MAX_CAPTION_BYTES),
        )
        return cls(encoder, kept, record)

    @property
    def conditions(self) -> Conditions:
        return self.encoder.conditions()

    def rows(self, samples: Sequence[int]) -> dict[str, np.ndarray]:
        """The tensors of these samples (N,), each (N, ...) in the layout's dtype.

        Raises ValueError for tokens beyond the range of the stored dtype.
        """
        n, kept, tokens = len(samples), self.record.captions, self.encoder.tokens
        texts = [text for i in samples for text in self.captions[i]]
        counts = np.array([len(self.captions[i]) for i in samples], dtype=np.int32)
        real = np.arange(kept) < counts[:, None]  # (N, K)
        ids, mask = self.encoder.ids(texts)
        out = {
            MASK: np.zeros((n, kept, tokens), dtype=np.uint8),
            CAPTION: np.zeros((n, kept, self.record.bytes), dtype=np.uint8),
        }
        out[MASK][real] = mask.numpy()
        out[CAPTION][real] = np.stack([self._bytes(text) for text in texts])
        if self.record.stored == "ids":
            out[IDS] = np.zeros((n, kept, tokens), dtype=np.int32)
            out[IDS][real] = ids.numpy()
        else:
            encoded = self._stored(self.encoder.encode_ids(ids, mask)[TEXT], texts)  # type: ignore[index]
            out[TEXT] = np.zeros((n, kept, *encoded.shape[1:]), dtype=encoded.dtype)
            out[TEXT][real] = encoded
        return out | {COUNT: counts}

    def write_null(self, out: Path) -> Text:
        """Write null.safetensors, the empty caption; returns the record with its sha256."""
        cond = self.encoder.encode([""])
        assert isinstance(cond, dict)
        rows = {TEXT: self._stored(cond[TEXT], [""]), MASK: cond[MASK].cpu().numpy().astype(np.uint8)}
        with write_shard(out / NULL, self.record.null_layout(self.conditions), 1) as file:
            file.write(rows)
        return replace(self.record, null=sha256_file(out / NULL))

    def lost(self) -> list[str]:
        """Sentences on the captions that the encoder reads in part only."""
        texts = [text for of_one in self.captions for text in of_one]
        parts = [self.encoder.lost(texts[i : i + COUNTED]) for i in range(0, len(texts), COUNTED)]
        return Lost(*map(sum, zip(*parts, strict=True))).said(len(texts), "caption", self.encoder) if parts else []

    def _bytes(self, text: str) -> np.ndarray:
        """(B,) UTF-8, cut after the last complete character that fits."""
        data = text.encode()[: self.record.bytes].decode("utf-8", "ignore").encode()
        return np.frombuffer(data.ljust(self.record.bytes, b"\0"), dtype=np.uint8)

    def _stored(self, encoded: Tensor, texts: Sequence[str]) -> np.ndarray:
        """Tokens (N, L, E) in the stored dtype, bfloat16 as the int16 of the same bits."""
        too_large = f"by {self.encoder.name} are too large for {self.record.dtype}; try --text-dtype bfloat16"
        return stored(encoded, self.record.dtype, lambda row: f"tokens of {printable(texts[row], 60)!r} {too_large}")


def sizes(text: CaptionEncoder, dropped: int) -> str:
    """How many captions there are and what they take on disk, in one line, with the alternative."""
    conditions, record, count = text.conditions, text.record, len(text.captions)
    captions = sum(map(len, text.captions))
    line = f"{plural(captions, 'caption')} of {plural(count, 'picture')}, at most {record.captions} each"
    line += f" ({dropped:,} more left out: --captions-per-picture)" if dropped else ""

    def taken(store: Store) -> str:
        each = replace(record, stored=store).caption_bytes(conditions)
        return f"{each / 1e3:,.1f} kB a caption, {gigabytes(each * record.captions * count)} in all"

    shape = f"{conditions.tokens}x{conditions.width} {record.dtype}"
    if record.stored == "ids":
        return f"{line}; their ids take {taken('ids')}; stored tokens ({shape}) would take {taken('tokens')}"
    alternative = f"with --text-store ids {taken('ids')}, and training encodes them"
    return f"{line}; their tokens ({shape}) take {taken('tokens')}; {alternative}"


def check_disk(plan: Manifest, rows: int, out: Path) -> None:
    """Raise ValueError when the disk has too little room for this many rows."""
    needed, free = rows * row_bytes(plan.layout), shutil.disk_usage(nearest_existing(out)).free
    if needed + RESERVE > free:
        raise ValueError(
            f"{out} needs {gigabytes(needed)}, its disk has {gigabytes(free)} free; keep fewer captions "
            "(--captions-per-picture), store ids (--text-store ids), or choose another --out"
        )
