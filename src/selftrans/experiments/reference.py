"""References ⇒ statistics, computed once: those of `selftrans evaluate` are kept in the user's cache directory, those of a
comparison in its folder.

Shape legend: images are pictures, uint8 (n, H, W, C), or arrays that are not pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch

from selftrans.checkpoints.load import LoadedModel
from selftrans.data.buckets import is_prepared, open_data, open_of_one_shape
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.data.sources.open_source import iter_images
from selftrans.device import default_device
from selftrans.encoders.autoencoder import stored_files
from selftrans.encoders.identity import check_scale
from selftrans.evaluate.classifier import digits
from selftrans.evaluate.extractors import Extractor
from selftrans.evaluate.statistics import Statistics
from selftrans.messages import first_line, plural
from selftrans.progress import progress_bar
from selftrans.storage import sha256_file

WANTED = "give a folder, zip or npz of pictures, prepared data, or statistics"


def reference_of(reference: str | Path, extractor: Extractor) -> Statistics:
    """Statistics of a reference (see `evaluate_samples`) in the features of `extractor`, from the cache if possible.

    For an npz of statistics that also holds pictures (ADM's reference batches), the features are computed from these.
    """
    path = Path(reference)
    if str(reference) == "digits":
        return Statistics.of(digits()[0], extractor, source="digits")
    if is_prepared(reference):
        dataset = open_data(reference)
        identity, size = _identity_of_data(dataset, extractor, torch.float32), len(dataset)
        file, source = cache() / f"{identity}.npz", described(reference)
        return _cached(
            file, identity, extractor, lambda: counted(decoded_images(dataset), size, "reference"), source, dataset
        )
    if path.suffix == ".npz" and (names := _names(path)) & {"mu"}:
        statistics = Statistics.load(path)
        if statistics.features is not None or not names & {"arr_0"} or statistics.dim != extractor.dim:
            return statistics
        pictures = _of_files(path, extractor)  # fewer than those of mu and sigma
        return dataclasses.replace(statistics, features=pictures.features, size=pictures.size)
    return _of_files(path, extractor)


def training_statistics(
    dataset: Dataset, extractor: Extractor, *, dtype: torch.dtype, folder: Path | None
) -> Statistics:
    """Mean and covariance of all prepared data, kept in `folder` (None: nowhere), where a later call finds them.

    A kept file is used for the same data, extractor, autoencoder, device and `dtype`, that of the autoencoder's network. The
    autoencoder is not loaded for this: its files are compared (see `stored_files`), and where there are none, its name.
    """
    images, source = partial(decoded_images, dataset, dtype=dtype), "training data"
    if folder is None:
        return Statistics.of(images(), extractor, source=source, keep=False)
    identity = _identity_of_data(dataset, extractor, dtype)
    file = folder / f"reference-{identity[:12]}.npz"
    return _cached(file, identity, extractor, images, source, dataset, keep=False)


def _of_files(path: Path, extractor: Extractor) -> Statistics:
    """Statistics of images in files, with their features; from the cache if possible."""
    must_exist(path, WANTED)
    identity = _identity_of_files(path, extractor)
    file = cache() / f"{identity}.npz"
    return _cached(file, identity, extractor, lambda: counted(open_images(path), None, "reference"), described(path))


def _cached(
    file: Path,
    identity: str,
    extractor: Extractor,
    images: Callable[[], Iterator[np.ndarray]],
    source: str,
    dataset: Dataset | None = None,
    *,
    keep: bool = True,
) -> Statistics:
    """The statistics in `file`, if it holds those of this identity, else computed, and written to it if possible.

    `dataset`: the data that the images are decoded from; if the files of its autoencoder are on this machine, they must be
    those that the statistics were computed with. A file of anything else, or a damaged one, is replaced. `keep`: with features.
    """
    autoencoder = "pixel" if dataset is None else dataset.manifest.autoencoder
    decoder = decoder_sha256(autoencoder)
    with contextlib.suppress(ValueError):  # missing or damaged
        found = Statistics.load(file)
        same = (found.sha256, found.dim) == (extractor.sha256, extractor.dim)
        same = same and (dataset is None or found.count == len(dataset))
        mark = found.source.rpartition(" [")[2]
        if same and mark.endswith("]") and mark.startswith(identity + decoder):
            return dataclasses.replace(found, source=source)
    statistics = Statistics.of(images(), extractor, source=source, keep=keep)
    mark = f" [{identity}{decoder or decoder_sha256(autoencoder)}]"  # it may have been fetched
    with contextlib.suppress(ValueError):  # a full disk, or a read-only home directory
        dataclasses.replace(statistics, source=source + mark).save(file)
    return statistics


def open_images(path: Path) -> Iterator[np.ndarray]:
    """Images of a folder, zip or npz, or of prepared data, in batches. Raises ValueError for anything else."""
    if is_prepared(path):
        return decoded_images(open_data(path))
    return iter_images(path)


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


def fitting_data(
    origin: str | Path, loaded: LoadedModel, data: str | None, who: str, *, captions: bool = True
) -> Dataset:
    """Prepared data of one shape: `data`, or what a model was trained on.

    ValueError, which calls the model `who`, unless they have its shape, conditions and scale. `captions`: those of a model of
    text are used, so they must be encoded as its own.
    """
    data = data or training_data(origin, loaded, remedy="give --data DIR")
    dataset, model = open_of_one_shape(data, text_encoder=loaded.config.data.text_encoder), loaded.model
    manifest, unused = dataset.manifest, model.conditions.kind == "text" and not captions
    if manifest.shape != tuple(model.shape) or not (unused or manifest.conditions.fits(model.conditions)):
        ours, theirs = (
            c if c.kind == "text" else plural(c.num_classes, "class") for c in (model.conditions, manifest.conditions)
        )
        raise ValueError(
            f"the data are latents {manifest.shape} with {theirs}; {who} was trained on {model.shape} with {ours}; give that "
            "data with --data"
        )
    check_scale(who, loaded.autoencoder, manifest.autoencoder)
    return dataset


def cache() -> Path:
    """The folder of cached statistics, in XDG_CACHE_HOME, by default ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "selftrans", "statistics")


def _identity_of_files(path: Path, extractor: Extractor) -> str:
    """A hash of the extractor's weights and of the paths, sizes and modification times of the images."""
    lines = [extractor.sha256, str(path.resolve())]
    held = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".json")
    for file in [path] if path.is_file() else held:
        about = file.stat()
        lines.append(f"{file.relative_to(path) if file != path else ''}|{about.st_size}|{about.st_mtime_ns}")
    return _hash(lines)


def _identity_of_data(dataset: Dataset, extractor: Extractor, dtype: torch.dtype) -> str:
    """A hash of all that statistics of prepared data depend on, but for the autoencoder's weights: those of the extractor, the
    device and the `dtype` in which it decodes, and the manifests, which have its name and the sha256 of every shard. Stored
    features play no part."""
    lines = [extractor.sha256, default_device().type, str(dtype)]
    manifests = (dataclasses.replace(part.manifest, features=None) for part in dataset.of_one_shape)
    return _hash([*lines, *(manifest.to_json() for manifest in manifests)])


def decoder_sha256(name: str) -> str:
    """A hash of the files of an autoencoder, without its being loaded; empty where this machine has none."""
    files = stored_files(name)
    return _hash([f"{file.name} {sha256_file(file)}" for file in files]) if files else ""


def _hash(lines: list[str]) -> str:
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


def counted(batches: Iterator[np.ndarray], total: int | None, what: str) -> Iterator[np.ndarray]:
    """Yield the same batches, with a progress bar that says what is measured: `samples`, `reference`."""
    with progress_bar(desc=f"measuring the {what}", unit="img", total=total) as bar:
        for images in batches:
            yield images
            bar.update(len(images))
