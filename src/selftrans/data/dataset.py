"""Prepared data on disk => named tensors, memory-mapped and gathered by row.

Shape legend: N batch, M moments channels, (C, *S) latent, T tokens of width D of the features, at most K captions per row,
L tokens of width E of a caption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selftrans.data.manifest import Features, Manifest
from selftrans.data.manifest_text import CAPTION, COUNT, IDS, NULL
from selftrans.data.shard_file import NUMBERS, REMEDY, numpy_dtype, open_tensors
from selftrans.data.sources.source import present_classes
from selftrans.data.streaming.remote import is_url
from selftrans.data.streaming.shard_cache import CacheOptions
from selftrans.encoders.text import TextEncoder, encoder_of
from selftrans.storage import sha256_file
from selftrans.types import MASK, TEXT, Cond

OF_CAPTION = (TEXT, IDS, MASK)  #: tensors with an entry for each caption of a row
PROMPTS = 64  #: how many captions `Dataset.prompts` has


class Dataset:
    """Prepared data, read by position 0 .. len - 1; opened by `Dataset.open`. Reading is safe from any thread."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        tensors: dict[str, Any],
        labels: np.ndarray,
        counts: np.ndarray | None = None,
    ) -> None:
        self.path, self.manifest, self.labels = path, manifest, labels  #: labels (len,) int64
        self.origin = str(path)  #: where the data came from: the folder, or a URL
        self.cache = CacheOptions()  #: where the shards of data at a URL are fetched to
        self.counts = counts  #: (len,) captions of each row; None for data without captions
        self._tensors = tensors  # name -> one array (count, *row shape) per shard
        self._starts = np.cumsum([0] + [shard.count for shard in manifest.shards])[:-1]
        self.text_encoder: str | None = None  #: hub id or folder of the encoder of stored ids, if it has moved
        self._encoder: TextEncoder | None = None  # of stored ids; loaded at first use

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        verify: bool = False,
        text_encoder: str | None = None,
        cache: CacheOptions = CacheOptions(),  # noqa: B008 - a tuple
    ) -> Dataset:
        """Open a folder made by `prepare`, or one at a URL, whose shards are fetched into `cache` (see `streamed`).

        `verify` reads every file and compares its sha256 with the manifest. `text_encoder`: see the attribute.
        Raises ValueError, with the remedy, when the manifest is missing or invalid, when a shard is missing or has unexpected
        tensors, when its sha256 differs (`verify`), or when a label is out of range.
        """
        if is_url(path):
            from selftrans.data.streaming.streamed import open_streamed  # a circular import at module level

            return open_streamed(str(path), verify=verify, text_encoder=text_encoder, cache=cache)
        path = Path(path)
        manifest = Manifest.load(path)
        stored: dict[str, list[np.ndarray]] = {name: [] for name in manifest.layout}
        for shard in manifest.shards:
            tensors = open_tensors(path / shard.file, manifest.layout, shard.count)
            for name, tensor in tensors.items():
                stored[name].append(tensor)
            check_index(path / shard.file, manifest, tensors)
        labels = np.concatenate([np.zeros(0, dtype=np.int64), *stored.pop("labels")])
        counts = np.concatenate(stored.pop(COUNT)) if manifest.text else None
        dataset = cls(path, manifest, dict(stored), labels, counts)
        dataset.text_encoder = text_encoder
        if verify:
            dataset.verify()
        return dataset

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One row as `read` returns it, without the first dimension, as a `torch.utils.data.DataLoader` asks for it.

        -1 is the last row. Raises IndexError out of range.
        """
        at = row + len(self) if row < 0 else row
        if not 0 <= at < len(self):
            raise IndexError(f"row {row} is outside the {self.manifest.counted(len(self))} of {self.path}")
        return {name: tensor[0] for name, tensor in self.read(np.array([at])).items()}

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of each part of one shape, in order: a batch is of one part."""
        return tuple(len(part) for part in self.of_one_shape)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(C, *S) of the latents of each part."""
        return tuple(part.manifest.shape for part in self.of_one_shape)

    @property
    def of_one_shape(self) -> tuple[Dataset, ...]:
        """The parts, each as a data set whose latents have one shape. Here all rows are one part."""
        return (self,)

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process opens the files itself: the mapped arrays must not be pickled
        opened = partial(Dataset.open, text_encoder=self.text_encoder, cache=self.cache)
        return opened, (self.origin,), "features" in self._tensors

    def __setstate__(self, with_features: bool) -> None:
        if with_features:
            self.open_features()

    def prefetch(self, now: Collection[int], then: Collection[int]) -> None:
        """Fetch the shards `now`, which are read next, then the shards `then`. Data on this machine need no fetching."""

    def fetch(self, *, progress: bool = True) -> None:
        """Copy every shard that is not yet on this machine to it."""

    def dry_run_data(self) -> Dataset:
        """Data on this machine, of the same size and kind, with which a dry run times training."""
        return self

    def some_rows(self, most: int) -> np.ndarray:
        """At most `most` different rows, chosen by a fixed shuffle."""
        return np.random.default_rng(0).permutation(len(self))[:most]

    @property
    def random_access(self) -> Dataset:
        """The same rows, with a `read` that is fast for a few scattered rows."""
        return self

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The classes that have samples, in order; empty when all classes have some, or when there are no classes."""
        return present_classes(self.labels, self.manifest.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that `read` returns: moments, labels, text (or ids) and mask, and features once they are opened."""
        return *(name for name in self._tensors if name != CAPTION), "labels"

    def read(
        self, rows: np.ndarray | Tensor, names: Collection[str] | None = None, which: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Rows (N,) of the tensors `names` (None: all), in the order of `rows` and in the stored dtype.

        Shapes: moments (N, copies, M, *S), labels (N,) int64, features (N, copies, T, D) float16; of the caption `which` (N,)
        of each row (None: the first) text (N, L, E) or ids (N, L) int32, and mask (N, L) bool. The tensors are copies, and
        no other caption is read. Raises ValueError for a row or caption out of range, and for values that are not finite
        (naming shard and row).
        """
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        self._check_range(rows)
        wanted = self.names if names is None else names
        if self.counts is not None:
            which = np.zeros_like(rows) if which is None else np.asarray(which, dtype=np.int64).reshape(-1)
            if which.shape != rows.shape or ((which < 0) | (which >= self.counts[rows])).any():
                raise ValueError(f"a number in `which`, from 0, is none of the captions of its picture in {self.path}")
        chosen = dict.fromkeys(OF_CAPTION, which)
        return {
            name: torch.from_numpy(self.labels[rows])
            if name == "labels"
            else self._gather(name, rows, chosen.get(name))
            for name in wanted
        }

    def condition(self, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> Cond:
        """The condition of rows that `read` returned, on `device` (None: the device of the tensors).

        Labels (all 0 when the data have no conditions), or float32 tokens and mask of a caption. Stored ids are encoded.
        """
        text = self.manifest.text
        if text is None:
            return tensors["labels"].to(device=device, non_blocking=True)
        if text.stored == "ids":
            return self._text_encoder(device or "cpu").encode_ids(tensors[IDS], tensors[MASK])
        moved = {name: tensors[name].to(device=device, non_blocking=True) for name in (TEXT, MASK)}
        return {TEXT: moved[TEXT].float(), MASK: moved[MASK]}

    def captions(self, rows: np.ndarray | Tensor) -> list[list[str]]:
        """The captions of each row (N,), as they were in the source; a list of empty lists without captions."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        self._check_range(rows)
        if self.counts is None:
            return [[] for _ in rows]
        pairs = zip(self._gather(CAPTION, rows).numpy(), self.counts[rows], strict=True)  # (N, K, B)
        return [[bytes(x).rstrip(b"\0").decode("utf-8", "replace") for x in each[:count]] for each, count in pairs]

    def text(self, rows: np.ndarray | Tensor, which: np.ndarray | None = None) -> Cond:
        """Tokens of the caption `which` (N,) of each row (None: the first), on the CPU. ValueError without captions."""
        if self.manifest.text is None:
            raise ValueError(f"{self.path} has {self.manifest.conditions}, not captions")
        names = [name for name in self.names if name in (TEXT, IDS, MASK)]
        return self.condition(self.read(rows, names, which), "cpu")

    def null(self) -> Cond | None:
        """The empty caption, one row: tokens (1, L, E) float32 and mask (1, L); None when conditions are of another kind.

        Raises ValueError when its file is missing or damaged.
        """
        manifest = self.manifest
        if manifest.text is None:
            return None
        stored = open_tensors(self.path / NULL, manifest.text.null_layout(manifest.conditions), 1)
        text = torch.from_numpy(stored[TEXT].copy()).view(NUMBERS[manifest.text.dtype][0]).float()
        if not torch.isfinite(text).all():
            raise ValueError(f"{self.path / NULL} holds NaN or infinite tokens; delete the file and {REMEDY}")
        return {TEXT: text, MASK: torch.from_numpy(stored[MASK] != 0)}

    @property
    def prompts(self) -> tuple[str, ...]:
        """Up to 64 different captions of different rows, the same at every call; empty when there are no captions."""
        return tuple(self._prompts)

    @property
    def prompt_rows(self) -> np.ndarray:
        """(P,) the rows whose first captions are `prompts`."""
        return np.array([*self._prompts.values()], dtype=np.int64)

    @cached_property
    def _prompts(self) -> dict[str, int]:
        """Caption => its row."""
        if self.counts is None:
            return {}
        found, rows = dict[str, int](), self.some_rows(16 * PROMPTS)  # more, since captions may be equal
        for some in np.split(rows, [PROMPTS << k for k in range(4)]):  # at a URL, each row is a request
            for row, of_row in zip(some.tolist(), self.random_access.captions(some), strict=True):
                found.setdefault(of_row[0], row)
            if len(found) >= PROMPTS:
                break
        return dict(islice(found.items(), PROMPTS))

    def ready(self, device: torch.device | str) -> None:
        """Load the text encoder now if the data store ids. ValueError when it is missing or is not the one of the data."""
        if self.manifest.text and self.manifest.text.stored == "ids":
            self._text_encoder(device)

    def _text_encoder(self, device: torch.device | str) -> TextEncoder:
        """The encoder of stored ids; on a GPU in the manifest's dtype. ValueError when it is not the one of the data."""
        device, text, conditions = torch.device(device), self.manifest.text, self.manifest.conditions
        assert text is not None
        if self._encoder is None or self._encoder.model.device.type != device.type:
            dtype = torch.float32 if device.type == "cpu" else NUMBERS[text.dtype][0]
            self._encoder = encoder_of(conditions, self.text_encoder, device=device, dtype=dtype)
        return self._encoder

    def open_features(self) -> Features:
        """Open the stored features, which `read` returns from now on, and return their description.

        Raises ValueError when there are none (`prepare --features` makes them), or a file is missing or damaged.
        """
        features = self.manifest.features
        if features is None:
            raise ValueError(f"{self.path} holds no features; repeat its `selftrans prepare`, with --features MODEL")
        self._tensors["features"] = [
            open_tensors(self.path / file.name, features.layout(self.manifest), shard.count)["features"]
            for file, shard in zip(features.files, self.manifest.shards, strict=True)
        ]
        return features

    def verify(self) -> None:
        """Compare the sha256 of every file with the manifest. Raises ValueError naming the first that is missing or differs."""
        for name in self.damaged():
            if not (self.path / name).is_file():
                raise ValueError(f"shard {self.path / name} is missing; {REMEDY}")
            raise ValueError(f"shard {self.path / name} fails its sha256; delete the file and {REMEDY}")

    def damaged(self, *, features: bool = True) -> Iterator[str]:
        """Names of the files that are missing or whose sha256 differs from the manifest; reads every byte."""
        expected = {shard.file: shard.sha256 for shard in self.manifest.shards}
        if self.manifest.text:
            expected[NULL] = self.manifest.text.null
        if features and self.manifest.features:
            expected |= {file.name: file.sha256 for file in self.manifest.features.files}
        for name, sha256 in expected.items():
            if not (self.path / name).is_file() or sha256_file(self.path / name) != sha256:
                yield name

    def _check_range(self, rows: np.ndarray | Tensor) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(
                f"indices {rows.min()} .. {rows.max()} are outside the {len(self)} {self.manifest.unit} of {self.path}"
            )

    def _gather(self, name: str, rows: np.ndarray, which: np.ndarray | None = None) -> Tensor:
        """Rows (N,) of one tensor, or of one in OF_CAPTION the captions `which` (N,). ValueError for values not finite."""
        shards, described = self._tensors[name], self.manifest.features if name == "features" else None
        stored, shape = (described.layout(self.manifest) if described else self.manifest.layout)[name]
        out = np.empty((len(rows), *(shape if which is None else shape[1:])), dtype=numpy_dtype(stored))
        # numpy gathers in this thread only, which leaves the other cores to the training step
        for k, at, local in by_part(self._starts, rows):
            out[at] = shards[k][local] if which is None else shards[k][local, which[at]]
        if name in (IDS, CAPTION, MASK):
            return torch.from_numpy(out != 0 if name == MASK else out)
        dtype, bits, infinity = NUMBERS[stored]
        sign = np.array(1 << (8 * out.itemsize - 1), dtype=bits)
        # comparing the bits as integers is exact, and many times faster than isfinite in half precision
        magnitude = out.view(bits) & ~sign
        if magnitude.max(initial=0) >= infinity:
            index = int(np.argmax(magnitude.reshape(len(rows), -1).max(axis=1) >= infinity))
            self._refuse(name, int(rows[index]))
        return torch.from_numpy(out).view(dtype)

    def _refuse(self, name: str, row: int) -> None:
        """Raise ValueError for values that are not finite at `row`."""
        k = int(np.searchsorted(self._starts, row, side="right")) - 1
        features = self.manifest.features if name == "features" else None
        file = features.files[k].name if features else self.manifest.shards[k].file
        raise ValueError(
            f"shard {self.origin}/{file} holds NaN or infinite {name} for {self.manifest.noun} {row} "
            f"(row {row - self._starts[k]} of the shard); delete the file and {REMEDY}"
        )


def by_part(starts: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each part with some of these rows: its number, their positions in `rows`, their numbers in it. starts: first rows."""
    part_of = np.searchsorted(starts, rows, side="right") - 1
    for k in np.unique(part_of).tolist():
        at = np.flatnonzero(part_of == k)
        yield k, at, rows[at] - starts[k]


def check_index(file: object, manifest: Manifest, tensors: Mapping[str, np.ndarray]) -> None:
    """ValueError, naming the file, for a label or a number of captions that the manifest does not allow."""
    allowed = [("label", "labels", 0, max(manifest.num_classes, 1) - 1)]
    if manifest.text:
        allowed.append(("caption count", COUNT, 1, manifest.text.captions))
    for what, name, low, high in allowed:
        wrong = np.flatnonzero((tensors[name] < low) | (tensors[name] > high))
        if len(wrong):
            raise ValueError(
                f"shard {file} has {what} {tensors[name][wrong[0]]} at row {wrong[0]}, outside {low} .. {high}; "
                f"delete the file and {REMEDY}"
            )
