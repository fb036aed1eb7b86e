"""Mean and covariance of features, computed in a stream, and their file format (ADM's npz names).

Shape legend: n images, F features, S spatial features.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selftrans.evaluate.extractors import Extractor, extract
from selftrans.messages import first_line, plural, printable, shape_text
from selftrans.storage import atomic_write

MAX_UNPACKED = 1 << 28  #: bytes up to which any compression ratio is accepted; statistics compress little
NEGATIVE = 1e-3  #: how far below zero an eigenvalue may be, relative to the covariance's Frobenius norm

TEXTS = ("extractor", "sha256", "source", "size")  #: fields of `Statistics` that are text


class Moments(NamedTuple):
    """Mean and unbiased covariance, float64."""

    mean: np.ndarray  #: (F,)
    cov: np.ndarray  #: (F, F)


class RunningMoments:
    """Mean and scatter of rows in a stream, by the pairwise update of Chan, Golub and LeVeque (1979).

    Simple sums of squares suffer cancellation when the mean is large compared to the deviation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.scatter: Any = 0.0  #: sum over rows of the outer product of deviations

    def update(self, rows: np.ndarray) -> None:
        """Add rows (n, F)."""
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        deviations, step, total = rows - mean, mean - self.mean, self.count + len(rows)
        self.scatter = (
            self.scatter + deviations.T @ deviations + np.outer(step, step) * (self.count * len(rows) / total)
        )
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def moments(self, source: str = "") -> Moments:
        """Mean (F,) and unbiased covariance (F, F); ValueError for fewer than two rows, which names their `source`."""
        if self.count < 2:
            images = f"{plural(self.count, 'image')} {'has' if self.count == 1 else 'have'}"
            raise ValueError(f"{source and f'{source}: '}{images} no covariance; give at least two")
        return Moments(self.mean, self.scatter / (self.count - 1))


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of a set of images, with their origin."""

    mean: np.ndarray  #: (F,) float64
    cov: np.ndarray  #: (F, F) float64
    count: int | None = None  #: number of images; None if the file does not record it
    features: np.ndarray | None = None  #: (n, F) float32, for kernel distance, precision and recall
    spatial: Moments | None = None  #: of spatial features (S,), if the extractor has them
    extractor: str = ""  #: its name; empty if the file does not record it
    sha256: str = ""  #: of the extractor's weights
    source: str = ""  #: description or path of the images
    size: str = ""  #: of every image, such as 256x256x3; empty if they have several, or the file does not record it

    @property
    def dim(self) -> int:
        """F, the number of features."""
        return len(self.mean)

    @classmethod
    def of(
        cls,
        batches: np.ndarray | Iterable[np.ndarray],
        extractor: Extractor,
        *,
        keep: bool = True,
        source: str = "",
        observe: Callable[[dict[str, np.ndarray]], None] | None = None,
    ) -> Statistics:
        """Statistics of a stream of image batches (see `extract`), independent of the batch size.

        `keep` stores the features in memory, as float32; `observe` is called with each output of the extractor. Raises
        ValueError for invalid images, or fewer than two.
        """
        running, spatial, kept, sizes = RunningMoments(), RunningMoments(), [], set[str]()
        for out in extract(_noted(batches, sizes), extractor):
            running.update(out["features"])
            if "spatial" in out:
                spatial.update(out["spatial"])
            if keep:
                kept.append(out["features"].astype(np.float32))
            if observe is not None:
                observe(out)
        return cls(
            *running.moments(source),
            count=running.count,
            features=np.concatenate(kept) if keep else None,
            spatial=spatial.moments() if spatial.count else None,
            extractor=extractor.name,
            sha256=extractor.sha256,
            source=source,
            size=sizes.pop() if len(sizes) == 1 else "",
        )

    def save(self, path: str | Path) -> None:
        """Write an npz: `mu`, `sigma`, `mu_s`, `sigma_s` as ADM names them, and the other fields that are known."""
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.cov}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.cov}
        if self.features is not None:
            arrays["features"] = self.features
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        arrays |= {name: np.str_(getattr(self, name)) for name in TEXTS}
        with atomic_write(Path(path)) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Load an npz written by `save` or by ADM; ValueError when it is damaged, pickled or something else."""
        path = Path(path)
        arrays = _read(path)
        if "mu" not in arrays or "sigma" not in arrays:
            names = ", ".join(sorted(arrays)) or "nothing"
            raise ValueError(f"{path} holds {names}, not mu and sigma; compute statistics from the images instead")
        mean, cov = _moments(arrays["mu"], arrays["sigma"], path)
        spatial = _moments(arrays["mu_s"], arrays["sigma_s"], path) if {"mu_s", "sigma_s"} <= arrays.keys() else None
        text = {name: str(arrays[name]) for name in TEXTS if name in arrays}
        count = int(arrays["count"]) if "count" in arrays else None
        features = arrays.get("features")
        if features is not None and features.shape != (len(features) if count is None else count, len(mean)):
            raise ValueError(
                f"{path} holds features {features.shape} of {count} images of {len(mean)}; compute it again"
            )
        loaded = cls(mean, cov, count=count, features=features, spatial=spatial, **text)
        return loaded if loaded.source else replace(loaded, source=path.name)


def _noted(batches: np.ndarray | Iterable[np.ndarray], sizes: set[str]) -> Iterator[np.ndarray]:
    """Yield the batches; `sizes` gets those of their images."""
    for images in [batches] if isinstance(batches, np.ndarray) else batches:
        if len(images):
            sizes.add(shape_text(images.shape[1:]))
        yield images


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz that belong to statistics; images in the same file (ADM's arr_0) are not read."""
    wanted = {"mu", "sigma", "mu_s", "sigma_s", "features", "count", *TEXTS}
    if not path.is_file():
        raise ValueError(f"no statistics at {path}; give an npz with mu and sigma, or a folder of images")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip file")
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.file_size > max(MAX_UNPACKED, 200 * member.compress_size):
                    raise ValueError(f"{member.filename!r:.60} expands to {member.file_size} bytes")
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: _plain(name, file[name]) for name in names & wanted}
            return arrays or {printable(name, 20): np.empty(0) for name in sorted(names)[:9]}
    except Exception as error:  # a damaged zip or a wrong header raises many types
        raise ValueError(
            f"{path} is not a readable npz of plain arrays ({first_line(error)}); compute the statistics again"
        ) from None


def _plain(name: str, array: Any) -> np.ndarray:
    """Check that an array is numeric, or text if `name` is a text field; ValueError otherwise."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is not an array")
    words = name in TEXTS
    if array.dtype.kind not in ("U" if words else "iuf") or (array.ndim and (words or name == "count")):
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return array


def _moments(mean: np.ndarray, cov: np.ndarray, path: Path) -> Moments:
    """Mean and covariance as float64, checked for shape, finiteness, symmetry and sign."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path} holds a mean {mean.shape} and a covariance {cov.shape}, which do not match; compute it again"
        )
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path} holds statistics that are not finite; compute it again")
    if not np.allclose(cov, cov.T, rtol=1e-5, atol=1e-8 * max(1.0, np.abs(cov).max(initial=0.0))):
        raise ValueError(f"{path} holds a covariance that is not symmetric; compute it again")
    shifted = cov.copy()
    # zero eigenvalues, of fewer images than features, become as low as -1e-6 of the norm in float32; all are zero where all
    # images are the same
    shifted[np.diag_indices_from(cov)] += NEGATIVE * np.linalg.norm(cov) + np.finfo(np.float64).tiny
    try:
        np.linalg.cholesky(shifted)  # faster than eigenvalues
    except np.linalg.LinAlgError:
        wrong = "a covariance with negative eigenvalues, which is impossible"
        raise ValueError(f"{path} holds {wrong}; compute it again") from None
    return Moments(mean, (cov + cov.T) / 2)
