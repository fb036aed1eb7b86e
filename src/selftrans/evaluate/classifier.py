"""A small classifier, whose features measure distances where Inception is unsuitable: tiny or grey pictures, sounds, videos.

Shape legend: N images, S one to three spatial dimensions, C channels, K classes, F features.
images are pictures uint8 (N, H, W, C), which the network itself takes as float (N, C, H, W) in [-1, 1], or arrays float32
(N, C, *S) of any range.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from selftrans.messages import first_line, plural, printable
from selftrans.storage import atomic_write

FORMAT = "selftrans.classifier/1"
LAYERS = ("resolution", "channels", "num_classes", "width", "dim")  #: the constructor's arguments, as in the header
RATE, HELD_OUT = 2e-3, 0.2  #: peak learning rate; share of the images that is held out
ON_DEVICE = 2 << 30  #: bytes of images that are kept where the classifier is trained, without copies at each step
ARRAYS = "arrays"  #: the last one, in the header of classifiers of arrays
CONVS, NORMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  #: by dimensions


@dataclass(frozen=True)
class Training:
    """How a classifier was trained; stored in its file."""

    accuracy: float  #: on the held-out images, in [0, 1]
    held_out: int  #: number of held-out images
    seed: int
    epochs: int
    trained_on: str  #: sha256 of the images and labels, held-out ones included


class SmallClassifier(nn.Module):
    """Convolutions that halve the image until its sides are at most 4, then two linear layers.

    Args:
        resolution: S of the images; a number is the side of a square.
        channels: C of the images.
        num_classes: K, the number of logits.
        width: channels after the first convolution; each halving doubles them, up to four times.
        dim: F, the length of the penultimate features.
        arrays: the images are arrays, whose channels are normalised first.
    """

    def __init__(
        self,
        resolution: int | Sequence[int],
        channels: int,
        num_classes: int,
        *,
        width: int = 32,
        dim: int = 64,
        arrays: bool = False,
    ) -> None:
        super().__init__()
        self.size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.channels, self.num_classes, self.width, self.dim, self.arrays = channels, num_classes, width, dim, arrays
        self.training_record: Training | None = None
        self.mean: Tensor
        self.deviation: Tensor
        size, inner, dims = self.size, width, len(self.size)
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
        layers = [*_conv(channels, width, dims)]
        while max(size) > 4:
            outer, halved = min(2 * inner, 4 * width), tuple(2 if side > 4 else 1 for side in size)
            layers += [*_conv(inner, outer, dims), *_conv(outer, outer, dims), pool(halved, ceil_mode=True)]
            size, inner = tuple(math.ceil(side / by) for side, by in zip(size, halved, strict=True)), outer
        self.trunk = nn.Sequential(*layers, nn.Flatten(start_dim=1), nn.Linear(inner * math.prod(size), dim), nn.ReLU())
        self.head = nn.Linear(dim, num_classes)
        if arrays:  # of the training data, channel by channel
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("deviation", torch.ones(channels))

    @property
    def resolution(self) -> int | tuple[int, ...]:
        """S of the images; a number is the side of a square."""
        return self.size[0] if len(self.size) == 2 and self.size[0] == self.size[1] else self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image: (H, W, C) of a picture, (C, *S) of an array."""
        return (self.channels, *self.size) if self.arrays else (*self.size, self.channels)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations (N, F) of `to_input(images)`, (N, C, *S)."""
        if self.arrays:
            column = (-1, *[1] * len(self.size))
            x = (x - self.mean.view(column)) / self.deviation.view(column)
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of `to_input(images)`, (N, C, *S)."""
        return self.head(self.features(x))

    def save(self, path: str | Path) -> None:
        """Write weights, architecture and training record to one safetensors file, atomically."""
        from safetensors.torch import save

        architecture = {name: getattr(self, name) for name in (*LAYERS, *([ARRAYS] if self.arrays else []))}
        header = {
            "format": FORMAT,
            "architecture": json.dumps(architecture),
            "training": json.dumps(asdict(self.training_record) if self.training_record else None),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        content = save(tensors, metadata=header)
        with atomic_write(Path(path)) as file:
            file.write(content)

    @classmethod
    def load(cls, path: str | Path) -> SmallClassifier:
        """Load a file written by `save`, in eval mode; ValueError for any other file."""
        path = Path(path)
        header, tensors = _read(path)
        try:
            record = json.loads(header["training"])
            architecture = _architecture(json.loads(header["architecture"]))
            training = Training(**record) if record else None
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"the header of classifier {path} is damaged ({first_line(error)}); train the classifier again"
            ) from None
        try:
            with torch.device("meta"):  # the file may be untrusted: compare sizes before allocating memory
                model = cls(**architecture)
        except (RuntimeError, TypeError) as error:  # sizes over 64 bits
            raise ValueError(f"classifier {path} has an impossible size ({architecture}); train it again") from error
        expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        stored = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        wrong = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
        if wrong:
            names = printable(", ".join(wrong))
            raise ValueError(f"classifier {path} does not match its own header at {names}; train it again")
        broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
        if broken:
            raise ValueError(
                f"classifier {path} holds values that are not finite in {printable(', '.join(broken))}; train it again"
            )
        model.load_state_dict(tensors, assign=True)
        model.training_record = training
        return model.eval()


def _conv(inner: int, outer: int, dims: int) -> tuple[nn.Module, ...]:
    return CONVS[dims - 1](inner, outer, kernel_size=3, padding=1, bias=False), NORMS[dims - 1](outer), nn.ReLU()


def _architecture(values: Any) -> dict[str, Any]:
    """The constructor's arguments from a header; ValueError unless they are positive integers, but for S and `arrays`."""
    if not isinstance(values, dict) or set(values) - {ARRAYS} != set(LAYERS) or values.get(ARRAYS, True) is not True:
        raise ValueError(f"architecture must name {', '.join(LAYERS)}")
    size = values["resolution"]
    if isinstance(size, list) and not 1 <= len(size) <= 3:
        raise ValueError(f"architecture has {len(size)} sides")
    numbers = [*(size if isinstance(size, list) else [size]), *(values[name] for name in LAYERS[1:])]
    if any(type(value) is not int or not 1 <= value < 1 << 31 for value in numbers):
        raise ValueError("architecture holds something other than positive integers of 31 bits")
    return values


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a classifier file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no classifier file at {path}; give one that `selftrans classifier` wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({first_line(error)}); train the classifier again"
        ) from None
    if header.get("format") != FORMAT:
        stored = printable(header.get("format", "no format"))
        raise ValueError(f"{path} is not a classifier of this package ({stored} in its header, expected {FORMAT})")
    return header, tensors


def to_input(images: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Pictures uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]; arrays (N, C, *S) stay as they are."""
    given = torch.as_tensor(images).to(device)
    return given.permute(0, 3, 1, 2).float().div(127.5).sub(1) if given.dtype == torch.uint8 else given.float()


def weights_sha256(module: nn.Module) -> str:
    """sha256 of names, types, shapes and values of all weights, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def data_sha256(images: np.ndarray, labels: np.ndarray) -> str:
    """sha256 of a labelled data set: shape, pixels, labels."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    digest.update(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
    return digest.hexdigest()


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int = 8,
    width: int = 32,
    dim: int = 64,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    steps: Callable[[SmallClassifier, OneCycleLR], Iterable[int]] | None = None,
) -> SmallClassifier:
    """Train a classifier on images with labels (N,) in 0 .. K - 1; keeps torch's global RNG state.

    AdamW with a one-cycle schedule. A fifth of the images, drawn by `seed`, is held out and gives the accuracy in the
    result's `training_record`. `threads`: number of CPU threads (None: torch's setting). `steps` gives the numbers of the
    steps, and may bring model and schedule to the first of them (None: all). The same arguments give the same weights on the
    same machine. Raises ValueError for less than two images.
    """
    arrays = images.dtype != np.uint8
    if len(images) < 2:
        raise ValueError(f"{plural(len(images), 'image')} of {plural(num_classes, 'class')}; give at least two of each")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out = min(max(1, round(HELD_OUT * len(images))), len(images) - 1)
    pixels, targets = torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(labels).long()
    test, train = order[:held_out], order[held_out:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        channels, size = (images.shape[1], images.shape[2:]) if arrays else (images.shape[3], images.shape[1:3])
        model = SmallClassifier(size, channels, num_classes, width=width, dim=dim, arrays=arrays).to(device)
    if arrays:
        values = pixels[train].double().transpose(0, 1).flatten(start_dim=1)  # (C, values)
        model.mean.copy_(values.mean(dim=1))
        model.deviation.copy_(values.std(dim=1).clamp(min=1e-6))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    batches, drawn = math.ceil(len(train) / batch_size), 0
    schedule = OneCycleLR(optimiser, max_lr=RATE, total_steps=epochs * batches)
    if pixels.nbytes <= ON_DEVICE:
        pixels, targets, train, test = (x.to(device) for x in (pixels, targets, train, test))
    with cpu_threads(threads), torch.enable_grad():
        for step in steps(model, schedule) if steps else range(schedule.total_steps):
            while drawn <= step // batches:  # also the orders of epochs that are not done again
                order, drawn = torch.randperm(len(train), generator=generator).to(train.device), drawn + 1
            rows = train[order[step % batches * batch_size :][:batch_size]]
            loss = F.cross_entropy(model(to_input(pixels[rows], device)), targets[rows].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        accuracy = _accuracy(model.eval(), pixels[test], targets[test], device)
    model.training_record = Training(accuracy, held_out, seed, epochs, data_sha256(images, labels))
    return model


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Limit torch to `count` CPU threads in the block; None changes nothing.

    On tiny images a second thread gains little, and while another process is busy the work becomes twenty times
    slower, because threads wait for each other in a busy loop.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _accuracy(model: SmallClassifier, images: Tensor, labels: Tensor, device: torch.device | str) -> float:
    guesses = [model(to_input(chunk, device)).argmax(dim=-1).cpu() for chunk in images.split(512)]
    return (torch.cat(guesses) == labels.cpu()).float().mean().item()


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's scans of handwritten digits: uint8 (1797, 8, 8, 1) and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8)[..., None], data.target.astype(np.int64)


def digits_classifier(cache: str | Path | None = None) -> SmallClassifier:
    """The classifier of the digits, read from the file `cache` if it exists, else trained (in seconds) and saved there.

    Raises ValueError when the cached file is not a classifier of these digits.
    """
    images, labels = digits()
    if cache is not None and Path(cache).exists():
        model = SmallClassifier.load(cache)
        record = model.training_record
        if record is None or (record.trained_on, record.seed) != (data_sha256(images, labels), 0):
            raise ValueError(f"{cache} is a classifier of other data or another seed; delete it or name another file")
        return model
    model = train_classifier(images, labels, num_classes=10, threads=1)
    if cache is not None:
        model.save(cache)
    return model
