"""References of `selftrans evaluate` ⇒ statistics, computed once and kept in the user's cache.

Shape legend: images are pictures, uint8 (n, H, W, C), or arrays that are no pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from tqdm import tqdm

from selftrans.data.dataset import Dataset
from selftrans.evaluate.classifier import digits
from selftrans.evaluate.extractors import Extractor
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.image_files import open_images
from selftrans.storage import first_line

WANTED = "give a folder, zip or npz of pictures, prepared data, or statistics"


def reference_of(reference: str | Path, extractor: Extractor) -> Statistics:
    """Statistics of a reference (see `evaluate_samples`) in the features of `extractor`, from the cache if they are there.

    An npz of statistics that holds pictures, too (ADM's reference batches), has its features from those.
    """
    path = Path(reference)
    if str(reference) == "digits":
        return Statistics.of(digits()[0], extractor, source="digits")
    if path.suffix == ".npz" and (names := _names(path)) & {"mu"}:
        statistics = Statistics.load(path)
        if statistics.features is not None or not names & {"arr_0"} or statistics.dim != extractor.dim:
            return statistics
        return dataclasses.replace(statistics, features=_cached(path, extractor).features)  # of fewer than mu and sigma
    return _cached(path, extractor)


def _cached(path: Path, extractor: Extractor) -> Statistics:
    """Statistics of pictures: from the cache, or computed and put there, if it can be written."""
    must_exist(path, WANTED)
    kept = cache() / f"{_identity(path, extractor)}.npz"
    if kept.exists():
        with contextlib.suppress(ValueError):  # damaged: computed again
            return Statistics.load(kept)
    statistics = Statistics.of(counted(open_images(path), None), extractor, source=described(path))
    with contextlib.suppress(ValueError):  # a full disk, or a home that cannot be written
        statistics.save(kept)
    return statistics


def described(reference: str | Path) -> str:
    """A reference as reports name it: images decoded from latents are not those that the VAE was given."""
    if not Path(reference, "manifest.json").exists():
        return str(reference)
    manifest = Dataset.open(reference).manifest
    return str(reference) + (f", decoded by {manifest.autoencoder}" if manifest.latent_space.stochastic else "")


def cache() -> Path:
    """Where statistics of references are kept: XDG_CACHE_HOME, by default ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "selftrans", "statistics")


def _identity(path: Path, extractor: Extractor) -> str:
    """A hash of the extractor's weights and of which pictures these are: place, names, sizes, times of change."""
    lines = [extractor.sha256, str(path.resolve())]
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".json")
    )
    if (path / "manifest.json").exists():
        files = [path / "manifest.json"]  # holds the sha256 of every shard
        lines.append("posterior means")  # how they are decoded; older versions drew samples
    for file in files:
        about = file.stat()
        lines.append(f"{file.relative_to(path) if file != path else ''}|{about.st_size}|{about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


def _names(path: Path) -> set[str]:
    """Arrays of an npz. ValueError where there is none."""
    must_exist(path, WANTED)
    try:
        with ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # a damaged directory makes zipfile raise more than BadZipFile
        raise ValueError(f"{path} cannot be read ({first_line(error)}); {WANTED}") from error


def must_exist(path: Path, wanted: str = "give a folder, zip or npz of pictures, or a run") -> None:
    """ValueError where nothing is at `path`: a name with one slash would be looked for on the hub, slowly."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; {wanted}")


def counted(batches: Iterator[np.ndarray], total: int | None) -> Iterator[np.ndarray]:
    """The same batches, with a progress bar."""
    with tqdm(desc="measuring", unit="img", total=total) as bar:
        for images in batches:
            yield images
            bar.update(len(images))
