"""References of `selftrans evaluate` ⇒ statistics, cached in the user's cache directory.

Shape legend: images are pictures, uint8 (n, H, W, C), or arrays that are not pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from tqdm import tqdm

from selftrans.checkpoints.load import LoadedModel
from selftrans.data.buckets import is_prepared, open_data
from selftrans.data.decoded import decoded_images
from selftrans.data.manifest import FILE
from selftrans.data.remote import is_url
from selftrans.evaluate.classifier import digits
from selftrans.evaluate.extractors import Extractor
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.image_files import open_images
from selftrans.storage import first_line

WANTED = "give a folder, zip or npz of pictures, prepared data, or statistics"


def reference_of(reference: str | Path, extractor: Extractor) -> Statistics:
    """Statistics of a reference (see `evaluate_samples`) in the features of `extractor`, from the cache if possible.

    For an npz of statistics that also holds pictures (ADM's reference batches), the features are computed from these.
    """
    path = Path(reference)
    if str(reference) == "digits":
        return Statistics.of(digits()[0], extractor, source="digits")
    if is_url(reference):
        return _of_url(str(reference), extractor)
    if path.suffix == ".npz" and (names := _names(path)) & {"mu"}:
        statistics = Statistics.load(path)
        if statistics.features is not None or not names & {"arr_0"} or statistics.dim != extractor.dim:
            return statistics
        return dataclasses.replace(
            statistics, features=_cached(path, extractor).features
        )  # fewer images than mu and sigma
    return _cached(path, extractor)


def _of_url(url: str, extractor: Extractor) -> Statistics:
    """Statistics of prepared data at a URL, as `_cached`; the manifest has the sha256 of every shard."""
    dataset = open_data(url)
    lines = [extractor.sha256, url, *(part.manifest.to_json() for part in dataset.of_one_shape)]
    name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]
    return _kept(name, lambda: decoded_images(dataset), len(dataset), extractor, described(url))


def _cached(path: Path, extractor: Extractor) -> Statistics:
    """Statistics of pictures, from the cache, or computed and written to it if possible."""
    must_exist(path, WANTED)
    return _kept(_identity(path, extractor), lambda: open_images(path), None, extractor, described(path))


def _kept(
    name: str,
    images: Callable[[], Iterator[np.ndarray]],
    total: int | None,
    extractor: Extractor,
    source: str,
) -> Statistics:
    cached = cache() / f"{name}.npz"
    if cached.exists():
        with contextlib.suppress(ValueError):  # damaged: compute again
            return Statistics.load(cached)
    statistics = Statistics.of(counted(images(), total), extractor, source=source)
    with contextlib.suppress(ValueError):  # a full disk, or a read-only home directory
        statistics.save(cached)
    return statistics


def described(reference: str | Path) -> str:
    """The name of a reference in reports: images decoded from latents differ from the VAE's inputs."""
    if not is_prepared(reference):
        return str(reference)
    manifest = open_data(reference).manifest
    return str(reference) + (f", decoded by {manifest.autoencoder}" if manifest.latent_space.stochastic else "")


def training_data(origin: str | Path, loaded: LoadedModel, *, remedy: str) -> str:
    """Directory of the data that a run was trained on. ValueError, with the remedy, if it is not recorded."""
    path = loaded.config.data.path
    if path is None and is_prepared(Path(origin) / "data"):
        path = str(Path(origin) / "data")
    if path is None:
        raise ValueError(f"{origin} does not record the path of its data; {remedy}")
    return path


def cache() -> Path:
    """The folder of cached statistics, in XDG_CACHE_HOME, by default ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "selftrans", "statistics")


def _identity(path: Path, extractor: Extractor) -> str:
    """A hash of the extractor's weights and of the paths, sizes and modification times of the pictures."""
    lines = [extractor.sha256, str(path.resolve())]
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".json")
    )
    if is_prepared(path):
        files = [part.path / FILE for part in open_data(path).of_one_shape]  # with the sha256 of every shard
        lines.append("posterior means")  # older versions decoded posterior samples
    for file in files:
        about = file.stat()
        lines.append(f"{file.relative_to(path) if file != path else ''}|{about.st_size}|{about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


def _names(path: Path) -> set[str]:
    """Names of the arrays of an npz. ValueError when it cannot be read."""
    must_exist(path, WANTED)
    try:
        with ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # for a damaged directory zipfile raises more than BadZipFile
        raise ValueError(f"{path} cannot be read ({first_line(error)}); {WANTED}") from error


def must_exist(path: Path, wanted: str = "give a folder, zip or npz of pictures, or a run") -> None:
    """ValueError when `path` does not exist: a name with one slash would otherwise be searched for on the hub, slowly."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; {wanted}")


def counted(batches: Iterator[np.ndarray], total: int | None) -> Iterator[np.ndarray]:
    """Yield the same batches, with a progress bar."""
    with tqdm(desc="measuring", unit="img", total=total) as bar:
        for images in batches:
            yield images
            bar.update(len(images))
