"""Feature extractors: images in, the features that distances are measured in out. `EXTRACTORS` lists them by name.

Shape legend: n images, F features, K classes. Images are pictures, uint8 (n, H, W, C), or arrays of numbers that are no
pictures, float32 (n, C, *S).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from selftrans.evaluate.classifier import SmallClassifier, cpu_threads, digits_classifier, to_input, weights_sha256
from selftrans.storage import sha256_file
from selftrans.suggest import closest, did_you_mean

Device: TypeAlias = torch.device | str

TINY = 16  #: images up to this side go through a classifier on one CPU thread

#: the one file of weights that makes a Fréchet distance an FID: Inception of 2015-12-05, converted from TensorFlow
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

SPATIAL_CHANNELS = 7  #: of 192, as ADM's evaluator keeps them
MAX_VALUES = 4096  #: numbers per image of the extractor `values`: its covariance has the square of that


class Extractor(Protocol):
    """What turns images into features; `sha256` identifies its weights, so that numbers of two extractors never mix."""

    name: str  #: as printed: "inception", "digits classifier"
    sha256: str
    dim: int  #: F
    pictures: bool  #: takes pictures alone; False: arrays, too

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """'features' (n, F); 'logits' (n, K) where there is a head; 'spatial' (n, S) where they are offered.

        Raises ValueError for images of a size or channel count that it was not made for.
        """
        ...


class ClassifierExtractor:
    """The penultimate features and the logits of a `SmallClassifier`."""

    pictures = True

    def __init__(self, classifier: SmallClassifier, name: str, device: Device = "cpu") -> None:
        self.classifier, self.name, self.device = classifier.to(device).eval(), name, device
        self.sha256, self.dim = weights_sha256(classifier), classifier.dim

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        expected = (self.classifier.resolution, self.classifier.resolution, self.classifier.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"the {self.name} takes {_size(expected)} images, these are {_size(images.shape[1:])}; "
                "give samples and reference of that size, or another extractor"
            )
        with cpu_threads(1 if self.classifier.resolution <= TINY else None):
            features = self.classifier.features(to_input(images, self.device))
        return {"features": features.cpu().numpy(), "logits": self.classifier.head(features).cpu().numpy()}


class InceptionExtractor:
    """The Inception network of FID through torch-fidelity: 2048 pooled features, logits without bias for IS, and the
    spatial features of sFID (2103.03841): the first 7 channels of ADM's `mixed_6/conv:0`, which is the 1x1 branch of
    Mixed_6d here, 17 x 17 x 7 = 2023 numbers.

    `weights` is the published file, by default in torch's hub cache, where it is downloaded once. Any other file is
    refused: with other weights the distance is no FID, and torch-fidelity unpickles whatever it is given.
    """

    pictures = True

    def __init__(self, weights: str | Path | None = None, device: Device = "cpu") -> None:
        network = _inception_class()
        path = _published_weights(Path(weights) if weights is not None else None)
        self.module = network(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
        self.module.to(device).eval()
        self._spatial: list[torch.Tensor] = []  #: of the pass that is under way
        branch: Any = self.module.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda _, __, out: self._spatial.append(out[:, :SPATIAL_CHANNELS]))
        self.name, self.sha256, self.dim, self.device = "inception", INCEPTION_SHA256, 2048, device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[-1] != 3:
            raise ValueError(
                f"inception takes images of 3 channels, these are {_size(images.shape[1:])}; convert them to RGB, or "
                "measure in the features of a classifier of your own (a .safetensors file)"
            )
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).contiguous()
        features, logits = self.module(x)
        spatial = self._spatial.pop().permute(0, 2, 3, 1).flatten(start_dim=1)  # row, column, channel, as TensorFlow's
        named = {"features": features, "logits": logits, "spatial": spatial}
        return {name: value.float().cpu().numpy() for name, value in named.items()}


class ValuesExtractor:
    """The numbers themselves, flattened, as features in float64. There are no weights; the shape is what identifies it.

    Raises ValueError for a `shape`, of one image, of more than MAX_VALUES numbers.
    """

    pictures, name = False, "values"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dim = tuple(shape), math.prod(shape)
        if not 1 <= self.dim <= MAX_VALUES:
            raise ValueError(
                f"images of {_size(self.shape)} are {self.dim:,} numbers, and the features `values` are at most "
                f"{MAX_VALUES:,}; measure in the features of a classifier (--features FILE)"
            )
        self.sha256 = hashlib.sha256(f"values {_size(self.shape)}".encode()).hexdigest()

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"the images are {_size(images.shape[1:])}, the reference is {_size(self.shape)}; give both of one shape"
            )
        return {"features": images.reshape(len(images), -1).astype(np.float64)}


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _inception_class() -> Callable[..., torch.nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        other = isinstance(error, RuntimeError)  # torchvision raises it with another build of torch
        build = ", with torchvision from the index that torch came from (download.pytorch.org/whl/...)" if other else ""
        raise ValueError(
            f"inception features need torch-fidelity ({error}): pip install 'selftrans[eval]'{build}, and give the weights "
            f"with --features path/to/{INCEPTION_FILE} where they cannot be downloaded from {INCEPTION_URL}"
        ) from None
    return FeatureExtractorInceptionV3


def _published_weights(path: Path | None) -> Path:
    """A file that is, by its hash, the published Inception: `path`, or one downloaded to torch's hub cache."""
    supply = f"download {INCEPTION_URL} and give it with --features path/to/{INCEPTION_FILE}"
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
            except (OSError, RuntimeError) as error:  # no network; wrong hash
                raise ValueError(f"the weights of inception cannot be downloaded ({error}); {supply}") from None
    if not path.is_file():
        raise ValueError(f"no inception weights at {path}; {supply}")
    found = sha256_file(path)
    if found != INCEPTION_SHA256:
        raise ValueError(
            f"{path} is not the published inception (sha256 {found[:8]}, not {INCEPTION_SHA256[:8]}); {supply}"
        )
    return path


def digits_extractor(weights: str | Path | None, device: Device, shape: tuple[int, ...] | None) -> Extractor:
    """The classifier of scikit-learn's digits, trained in seconds, or read from (and kept in) the file `weights`.

    It is trained on the CPU whatever the device, so that its weights do not depend on that.
    """
    return ClassifierExtractor(digits_classifier(weights), "digits classifier", device)


def inception_extractor(weights: str | Path | None, device: Device, shape: tuple[int, ...] | None) -> Extractor:
    """The Inception of FID; see `InceptionExtractor`."""
    return InceptionExtractor(weights, device)


def values_extractor(weights: str | Path | None, device: Device, shape: tuple[int, ...] | None) -> Extractor:
    """The numbers of images of `shape`; see `ValuesExtractor`."""
    if weights is not None or shape is None:
        raise ValueError(
            "the features `values` have no weights; they are made for images of one shape, which is needed"
        )
    return ValuesExtractor(shape)


#: name -> extractor(weights, device, shape)
EXTRACTORS: dict[str, Callable[[str | Path | None, Device, tuple[int, ...] | None], Extractor]] = {
    "digits": digits_extractor,
    "inception": inception_extractor,
    "values": values_extractor,
}


def load_extractor(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    device: Device = "cpu",
    shape: tuple[int, ...] | None = None,
) -> Extractor:
    """The extractor of a name in `EXTRACTORS`, of a classifier's .safetensors file, or of Inception's .pth file.

    `weights` is the file of a named extractor: Inception's weights, or where the digit classifier is kept between runs.
    `shape` of one image is what `values` needs. Raises ValueError for unknown names (the nearest is suggested) and for
    missing or unfit files.
    """
    text, suffix = str(name), Path(name).suffix
    if text in EXTRACTORS:
        return EXTRACTORS[text](weights, device, shape)
    if weights is not None:
        raise ValueError(
            f"weights {weights} belong to a named extractor ({', '.join(EXTRACTORS)}), but {text} is a file"
        )
    if suffix == ".safetensors":
        return ClassifierExtractor(SmallClassifier.load(text), f"{Path(name).stem} classifier", device)
    if suffix == ".pth":
        return InceptionExtractor(text, device)
    hint, known = did_you_mean(closest(text, EXTRACTORS)), ", ".join(EXTRACTORS)
    raise ValueError(
        f"unknown features {text!r}{hint or ';'} choose from {known}, or give a classifier's .safetensors file"
    )


def extract(
    batches: np.ndarray | Iterable[np.ndarray], extractor: Extractor, *, chunk: int = 64
) -> Iterator[dict[str, np.ndarray]]:
    """Features of a stream of image batches, `chunk` images at a time however the batches were cut.

    Equal chunks give equal features to the last bit, whatever the batch size of the sampler. Raises ValueError for
    batches that the extractor does not take, and for features that are not finite or not of its length.
    """
    done = 0
    for images in rebatch(batches, chunk):
        if extractor.pictures and images.dtype != np.uint8:
            raise ValueError(
                f"{extractor.name} takes pictures, uint8 (n, H, W, C), but these are arrays of {_size(images.shape[1:])} "
                "numbers; measure them with --features values"
            )
        out = extractor(images)
        if out["features"].shape != (len(images), extractor.dim):
            raise ValueError(
                f"{extractor.name} gave {out['features'].shape} for {len(images)} images of {extractor.dim} features"
            )
        bad = ~np.isfinite(out["features"]).all(axis=-1)
        if bad.any():
            raise ValueError(f"{extractor.name} gave features that are not finite for image {done + int(bad.argmax())}")
        done += len(images)
        yield out


def rebatch(batches: np.ndarray | Iterable[np.ndarray], chunk: int) -> Iterator[np.ndarray]:
    """The images of a stream, cut anew into chunks of `chunk` (the last may be smaller), checked on the way."""
    waiting: list[np.ndarray] = []
    for images in [batches] if isinstance(batches, np.ndarray) else batches:
        _check(images, waiting)
        waiting.append(images)
        if sum(map(len, waiting)) >= chunk:
            joined = np.concatenate(waiting)
            full = len(joined) // chunk * chunk
            for start in range(0, full, chunk):
                yield joined[start : start + chunk]
            waiting = [joined[full:]]
    rest = np.concatenate(waiting) if waiting else np.empty(0)
    if len(rest):
        yield rest


def _check(images: Any, before: list[np.ndarray]) -> None:
    """ValueError unless a batch is pictures uint8 (n, H, W, C) or arrays float32 (n, C, *S), alike those before it."""
    array = isinstance(images, np.ndarray)
    pictures = array and images.dtype == np.uint8 and images.ndim == 4
    if not pictures and not (array and images.dtype == np.float32 and 3 <= images.ndim <= 5):
        what = f"{images.dtype} {images.shape}" if array else type(images).__name__
        raise ValueError(f"a batch of images is {what}; give uint8 arrays (n, H, W, C), or float32 (n, C, *S)")
    if before and (images.shape[1:], images.dtype) != (before[-1].shape[1:], before[-1].dtype):
        sizes = f"{_size(before[-1].shape[1:])} and {_size(images.shape[1:])}"
        raise ValueError(f"the images are of two sizes, {sizes}; bring them to one")
