"""Feature extractors: images => the features that metrics compare. `NAMES` lists those that have one.

Shape legend: n images, F features, K classes. Images are pictures, uint8 (n, H, W, C), or arrays that are not pictures,
float32 (n, C, *S).
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
from selftrans.messages import shape_text
from selftrans.storage import sha256_file
from selftrans.suggest import closest, did_you_mean

Device: TypeAlias = torch.device | str
NAMES = ("digits", "inception", "values")

CHUNK, CHUNK_ON_GPU = 64, 512  #: images per call of an extractor
TINY = 16  #: a classifier of images up to this side uses one CPU thread

#: the weights that define FID: Inception of 2015-12-05, converted from TensorFlow
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

SPATIAL_CHANNELS = 7  #: of 192, as ADM's evaluator keeps them
MAX_VALUES = 4096  #: most values per image for the extractor `values`: its covariance has the square of that


class Extractor(Protocol):
    """Maps images to features; `sha256` identifies its weights, so that results of two extractors are never mixed."""

    name: str  #: as printed: "inception", "digits classifier"
    sha256: str
    dim: int  #: F
    pictures: bool  #: takes pictures only; False: arrays, too
    head: bool  #: whether it gives logits

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """'features' (n, F), 'logits' (n, K) if there is a head, and 'spatial' (n, S) if the extractor has them.

        Raises ValueError for images of an unsupported size or number of channels.
        """
        ...


class OtherShape(ValueError):
    """Images of another shape than the extractor takes, or than those before them."""


class FeaturesNotFinite(ValueError):
    """Features of images that are not finite."""


class ClassifierExtractor:
    """The penultimate features and the logits of a `SmallClassifier`."""

    head = True

    def __init__(self, classifier: SmallClassifier, name: str, device: Device = "cpu") -> None:
        self.classifier, self.name, self.device = classifier.to(device).eval(), name, device
        self.sha256, self.dim, self.pictures = weights_sha256(classifier), classifier.dim, not classifier.arrays

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        expected = self.classifier.shape
        if images.shape[1:] != expected or (images.dtype == np.uint8) != self.pictures:
            noun = "images" if self.pictures else "arrays"
            raise OtherShape(
                f"the {self.name} takes {shape_text(expected)} {noun}, these are {shape_text(images.shape[1:])}; "
                "give samples and reference of that size, or use another extractor"
            )
        with cpu_threads(1 if max(self.classifier.size) <= TINY else None):
            features = self.classifier.features(to_input(images, self.device))
        return {"features": features.cpu().numpy(), "logits": self.classifier.head(features).cpu().numpy()}


class InceptionExtractor:
    """The Inception network of FID from torch-fidelity: 2048 pooled features, logits without bias for IS, and the
    spatial features of sFID (2103.03841): the first 7 channels of ADM's `mixed_6/conv:0`, which is the 1x1 branch of
    Mixed_6d here, 17 x 17 x 7 = 2023 values.

    `weights` is the published file, by default in torch's hub cache, where it is downloaded once. Any other file is
    refused: with other weights the distance is not an FID, and torch-fidelity unpickles any file.
    """

    pictures = head = True

    def __init__(self, weights: str | Path | None = None, device: Device = "cpu") -> None:
        network = _inception_class()
        path = _published_weights(Path(weights) if weights is not None else None)
        self.module = network(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
        self.module.to(device).eval()
        self._spatial: list[torch.Tensor] = []  #: of the current forward pass
        branch: Any = self.module.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda _, __, out: self._spatial.append(out[:, :SPATIAL_CHANNELS]))
        self.name, self.sha256, self.dim, self.device = "inception", INCEPTION_SHA256, 2048, device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[-1] != 3:
            raise ValueError(
                f"inception takes images of 3 channels, these are {shape_text(images.shape[1:])}; convert them to RGB, or "
                "use the features of your own classifier (a .safetensors file)"
            )
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).contiguous()
        features, logits = self.module(x)
        spatial = self._spatial.pop().permute(0, 2, 3, 1).flatten(start_dim=1)  # row, column, channel, as in TensorFlow
        named = {"features": features, "logits": logits, "spatial": spatial}
        return {name: value.float().cpu().numpy() for name, value in named.items()}


class ValuesExtractor:
    """The values themselves, flattened, as float64 features. There are no weights: `sha256` is of the shape.

    Raises ValueError for a `shape` (of one image) with more than MAX_VALUES values.
    """

    pictures, head, name = False, False, "values"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dim = tuple(shape), math.prod(shape)
        if not 1 <= self.dim <= MAX_VALUES:
            raise ValueError(
                f"images of {shape_text(self.shape)} are {self.dim:,} values, the features `values` support at most "
                f"{MAX_VALUES:,}; use the features of a classifier (--features FILE)"
            )
        self.sha256 = hashlib.sha256(f"values {shape_text(self.shape)}".encode()).hexdigest()

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.shape[1:] != self.shape:
            raise OtherShape(
                f"images of {shape_text(images.shape[1:])} cannot be compared with images of {shape_text(self.shape)}; give "
                "samples and reference of one shape"
            )
        return {"features": images.reshape(len(images), -1).astype(np.float64)}


def _inception_class() -> Callable[..., torch.nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        other = isinstance(error, RuntimeError)  # torchvision raises it when torch is another build
        build = ", with torchvision from the index that torch came from (download.pytorch.org/whl/...)" if other else ""
        raise ValueError(
            f"inception features need torch-fidelity ({error}): pip install 'selftrans[eval]'{build}, and give the weights "
            f"with --features path/to/{INCEPTION_FILE} if they cannot be downloaded from {INCEPTION_URL}"
        ) from None
    return FeatureExtractorInceptionV3


def _published_weights(path: Path | None) -> Path:
    """A file with the hash of the published Inception: `path`, or one downloaded to torch's hub cache."""
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
    sha256 = sha256_file(path)
    if sha256 != INCEPTION_SHA256:
        raise ValueError(
            f"{path} is not the published inception (sha256 {sha256[:8]}, not {INCEPTION_SHA256[:8]}); {supply}"
        )
    return path


def load_extractor(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    device: Device = "cpu",
    shape: tuple[int, ...] | None = None,
) -> Extractor:
    """Load an extractor by its name in `NAMES`, from a classifier's .safetensors file, from Inception's .pth file, or from a
    vision model of `transformers` (a folder, or a hub id with an owner, such as facebook/dinov2-large).

    `weights` is the file of a named extractor: Inception's weights, or the digit classifier, which is read from it, else
    trained in seconds (on the CPU, so that its weights do not depend on the device) and saved to it. `shape` of one image is
    needed for `values`. Raises ValueError for unknown names (with a suggestion) and for missing or invalid files.
    """
    text, suffix, known = str(name), Path(name).suffix, ", ".join(NAMES)
    if text == "digits":
        return ClassifierExtractor(digits_classifier(weights), "digits classifier", device)
    if text == "inception":
        return InceptionExtractor(weights, device)
    if text == "values":
        assert shape is not None
        return ValuesExtractor(shape)
    if suffix == ".safetensors":
        stem = Path(name).stem
        called = stem if stem.endswith("classifier") else f"{stem} classifier"
        return ClassifierExtractor(SmallClassifier.load(text), called, device)
    if suffix == ".pth":
        return InceptionExtractor(text, device)
    if Path(name).is_dir() or len(Path(name).parts) == 2:
        from selftrans.evaluate.vision_features import VisionExtractor

        return VisionExtractor(text, device)
    hint = did_you_mean(closest(text, NAMES))
    raise ValueError(
        f"unknown features {text!r}{hint or ';'} choose from {known}, or give a classifier's .safetensors file or a vision "
        "model of transformers (hub id or folder)"
    )


def extractor_sha256(
    name: str | Path, *, weights: str | Path | None = None, shape: tuple[int, ...] | None = None
) -> str:
    """The `sha256` of `load_extractor(name, weights=weights, shape=shape)`.

    Inception, whose hash is known, is not loaded. A file of the digit classifier is hashed without a check of its data.
    """
    if str(name) == "inception" and weights is None:
        return INCEPTION_SHA256
    if Path(name).suffix == ".pth" and weights is None:
        _published_weights(Path(name))
        return INCEPTION_SHA256
    if str(name) == "digits" and weights is not None and Path(weights).exists():
        return weights_sha256(SmallClassifier.load(weights))
    return load_extractor(name, weights=weights, shape=shape).sha256


def extract(batches: np.ndarray | Iterable[np.ndarray], extractor: Extractor) -> Iterator[dict[str, np.ndarray]]:
    """Features of a stream of image batches, computed for CHUNK images at a time whatever the batch sizes (on a GPU
    CHUNK_ON_GPU, which would otherwise wait for the host).

    So the features are bit-identical for any batch size of the sampler. Raises ValueError for batches
    that the extractor does not support, and for features that are not finite.
    """
    done = 0
    for images in rebatch(batches, CHUNK_ON_GPU if torch.cuda.is_available() else CHUNK):
        if extractor.pictures and images.dtype != np.uint8:
            raise ValueError(
                f"{extractor.name} takes pictures, uint8 (n, H, W, C), but these are arrays of {shape_text(images.shape[1:])} "
                "values; use --features values"
            )
        out = extractor(images)
        bad = ~np.isfinite(out["features"]).all(axis=-1)
        if bad.any():
            raise FeaturesNotFinite(
                f"{extractor.name} returned features that are not finite for image {done + int(bad.argmax())}"
            )
        done += len(images)
        yield out


def rebatch(batches: np.ndarray | Iterable[np.ndarray], chunk: int) -> Iterator[np.ndarray]:
    """Regroup the batches of a stream into chunks of `chunk` images of one shape (the last may be smaller)."""
    waiting: list[np.ndarray] = []
    for images in [batches] if isinstance(batches, np.ndarray) else batches:
        if waiting and images.shape[1:] != waiting[-1].shape[1:]:
            # height and width of pictures may change, as between buckets: an extractor of one size refuses other ones itself
            fixed, before = 3 if images.dtype == np.uint8 else 1, waiting[-1].shape
            if images.shape[fixed:] != before[fixed:]:
                sizes = f"{shape_text(before[1:])} and {shape_text(images.shape[1:])}"
                raise OtherShape(f"the images have two sizes, {sizes}; resize them to one")
            if len(rest := np.concatenate(waiting)):
                yield rest
            waiting = []
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
