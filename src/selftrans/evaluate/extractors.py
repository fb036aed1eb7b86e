"""Feature extractors: images in, the features that distances are measured in out. `EXTRACTORS` lists them by name.

Shape legend: N or n images, R side of a square image, C channels, F features, K classes. Images are uint8 (n, R, R, C).
"""

from __future__ import annotations

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


class Extractor(Protocol):
    """What turns images into features; `sha256` identifies its weights, so that numbers of two extractors never mix."""

    name: str  #: as printed: "inception", "digits classifier"
    sha256: str
    dim: int  #: F

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """'features' (n, F); 'logits' (n, K) where there is a head; 'spatial' (n, S) where they are offered.

        Raises ValueError for images of a size or channel count that it was not made for.
        """
        ...


class ClassifierExtractor:
    """The penultimate features and the logits of a `SmallClassifier`."""

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


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _inception_class() -> Callable[..., torch.nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        other = isinstance(error, RuntimeError)  # so torchvision fails beside another build of torch
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


def digits_extractor(weights: str | Path | None = None, device: Device = "cpu") -> Extractor:
    """The classifier of scikit-learn's digits, trained in seconds, or read from (and kept in) the file `weights`."""
    return ClassifierExtractor(digits_classifier(weights), "digits classifier", device)


EXTRACTORS: dict[str, Callable[[str | Path | None, Device], Extractor]] = {
    "digits": digits_extractor,
    "inception": InceptionExtractor,
}


def load_extractor(name: str | Path, *, weights: str | Path | None = None, device: Device = "cpu") -> Extractor:
    """The extractor of a name in `EXTRACTORS`, of a classifier's .safetensors file, or of Inception's .pth file.

    `weights` is the file of a named extractor: Inception's weights, or where the digit classifier is kept between runs.
    Raises ValueError for unknown names (the nearest is suggested) and for missing or unfit files.
    """
    text, suffix = str(name), Path(name).suffix
    if text in EXTRACTORS:
        return EXTRACTORS[text](weights, device)
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
    anything but uint8 (n, R, R, C), and for features that are not finite or not of the extractor's length.
    """
    done = 0
    for images in rebatch(batches, chunk):
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
            whole = len(joined) // chunk * chunk
            for start in range(0, whole, chunk):
                yield joined[start : start + chunk]
            waiting = [joined[whole:]]
    rest = np.concatenate(waiting) if waiting else np.empty(0)
    if len(rest):
        yield rest


def _check(images: Any, before: list[np.ndarray]) -> None:
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1] != images.shape[2]
    ):
        what = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"a batch of images is {what}; give uint8 arrays (n, R, R, C)")
    if before and images.shape[1:] != before[-1].shape[1:]:
        sizes = f"{_size(before[-1].shape[1:])} and {_size(images.shape[1:])}"
        raise ValueError(f"the images are of two sizes, {sizes}; bring them to one")
