"""What each image is conditioned on: labels, prompts, or the stored captions of a data set.

The condition of image k depends on the settings, the seed and k alone. Shape legend: N images, P prompts, L tokens of E
channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selftrans.data.dataset import Dataset
from selftrans.encoders.text import TextEncoder, encoder_of
from selftrans.messages import first_line, listed, one_line, printable
from selftrans.sample_config import Labels, SampleConfig
from selftrans.sampling.streams import CAPTION_STREAM, LABEL_STREAM, image_stream
from selftrans.types import Cond, Conditions

GROUP = 64  #: prompts encoded at a time
KEPT = 1024  #: prompts whose tokens are kept in memory (77 x 768 each: 240 MB); of more, the last used groups
MAX_PROMPTS = 16 << 20  #: largest file of prompts, in bytes
NO_PROMPTS = 'no prompts are given; write --prompts "..." or --prompts FILE'


class Conditioning(Protocol):
    """The conditions of images 0, 1, ..."""

    described: dict[str, Any]  #: what the conditions depend on, as json types
    null: Cond | None  #: one row of the null condition, for models that do not know theirs; None: the model has its own

    def of(self, indices: np.ndarray) -> tuple[Cond, np.ndarray]:
        """Condition of each image (N, ...), on the CPU or a device, and its label (N,) int64."""
        ...

    def texts(self, indices: np.ndarray) -> list[str] | None:
        """The prompt of each image; None if the conditions are no text."""
        ...


class LabelConditioning:
    """Labels, see `conditions_for`; also for models without conditions, whose labels are all 0."""

    null: Cond | None = None

    def __init__(
        self, conditions: Conditions, mode: Labels = "balanced", seed: int = 0, present: tuple[int, ...] = ()
    ) -> None:
        """`present`: the classes that the data have; empty: all. Warns about labels of classes without data."""
        self.conditions, self.mode, self.seed, self.present = conditions, mode, seed, present
        self.described: dict[str, Any] = {"labels": mode}
        if not present:
            return
        if isinstance(mode, str):
            self.described["present"] = list(present)
            return
        absent = sorted({*mode} - {*present, conditions.num_classes})
        if absent:
            warnings.warn(
                f"the data have no samples of the classes {listed(absent, 12)}; they have {listed(present, 12)}",
                stacklevel=4,
            )

    def of(self, indices: np.ndarray) -> tuple[Cond, np.ndarray]:
        labels = conditions_for(indices, self.conditions, self.mode, self.seed, self.present)
        return labels, labels.numpy()

    def texts(self, indices: np.ndarray) -> list[str] | None:
        return None


class PromptConditioning:
    """Prompts that repeat: image k has prompt k % P, and this number as its label.

    They are encoded in fixed groups, so that the tokens of a prompt do not depend on a batch. Where all of them are kept, the
    encoder is not. Raises ValueError without a prompt; warns about prompts that the encoder reads in part only.
    """

    def __init__(self, prompts: Sequence[str], encoder: TextEncoder) -> None:
        if not prompts:
            raise ValueError(NO_PROMPTS)
        self.prompts = tuple(prompts)
        for said in encoder.lost(self.prompts).said(len(prompts), "prompt", encoder):
            warnings.warn(said, stacklevel=4)
        self.described: dict[str, Any] = {"prompts": list(self.prompts), "text_encoder_sha256": encoder.sha256}
        self.null: Cond | None = encoder.encode([""])
        self._encoder: TextEncoder | None = encoder
        self._groups: dict[int, dict[str, Tensor]] = {}  #: number of a group => tokens and mask of its prompts
        if len(self.prompts) <= KEPT:
            for k in range(-(-len(self.prompts) // GROUP)):
                self._encode(k)
            self._encoder = None

    def of(self, indices: np.ndarray) -> tuple[Cond, np.ndarray]:
        which = np.asarray(indices, dtype=np.int64) % len(self.prompts)
        rows = [{name: x[k % GROUP] for name, x in self._encode(k // GROUP).items()} for k in which.tolist()]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, which

    def texts(self, indices: np.ndarray) -> list[str] | None:
        return [self.prompts[k % len(self.prompts)] for k in np.asarray(indices).tolist()]

    def _encode(self, group: int) -> dict[str, Tensor]:
        if group not in self._groups:
            assert self._encoder is not None
            while len(self._groups) >= KEPT // GROUP:
                self._groups.pop(next(iter(self._groups)))
            cond = self._encoder.encode(self.prompts[group * GROUP : (group + 1) * GROUP])
            assert isinstance(cond, dict)
            self._groups[group] = {name: tensor.cpu() for name, tensor in cond.items()}
        return self._groups[group]


class CaptionConditioning:
    """Captions stored with prepared data, one of each row; no encoder is needed, unless ids are stored: see `_chosen`.

    The label of an image is the row of its caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        rows: np.ndarray | None = None,
    ) -> None:
        """`device`: where stored ids are encoded. `rows` (P,): image k has the first caption of row k % P of these."""
        self.dataset, self.seed, self.device, self._rows = dataset, seed, device, rows
        self.null = dataset.null()
        self._stored = [name for name in dataset.names if name not in ("moments", "features")]
        self._order = shuffled(len(dataset))
        text = dataset.manifest.text
        self.encodes = text is not None and text.stored == "ids"  #: whether the text encoder is needed
        self.described: dict[str, Any] = {
            "captions": dataset.origin,
            "text_encoder_sha256": dataset.manifest.conditions.sha256,
        }

    def of(self, indices: np.ndarray) -> tuple[Cond, np.ndarray]:
        rows, which, _ = self._chosen(indices)
        return self.dataset.condition(self.dataset.read(rows, self._stored, which), self.device), rows

    def texts(self, indices: np.ndarray) -> list[str] | None:
        return self._chosen(indices)[2]

    def _chosen(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Row (N,) of each image, number (N,) of its caption among those of the row, and the caption.

        The rows follow a fixed shuffle: n images have n different rows as long as there are as many, and image k of every
        pass one of the row's captions at random.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if self._rows is not None:
            rows = self._rows[indices % len(self._rows)]
            return rows, np.zeros_like(rows), [of_row[0] for of_row in self.dataset.captions(rows)]
        rows = self._order[indices % len(self._order)]
        held = self.dataset.captions(rows)
        which = [
            int(image_stream(self.seed, int(k), CAPTION_STREAM).integers(len(captions)))
            for k, captions in zip(indices, held, strict=True)
        ]
        texts = [captions[i] for captions, i in zip(held, which, strict=True)]
        return rows, np.asarray(which, dtype=np.int64), texts


def shuffled(count: int) -> np.ndarray:
    """(count,) int64: the fixed order in which images take rows of a data set (their captions, their shapes)."""
    return np.random.default_rng(0).permutation(count)


def conditioning_of(
    conditions: Conditions,
    settings: SampleConfig,
    *,
    present: tuple[int, ...] = (),
    text_encoder: str | None = None,
    device: torch.device | str = "cpu",
) -> Conditioning:
    """The conditions of a model's images as `settings` ask for them; of labels, those of the classes `present` (empty: all).

    `text_encoder`: hub id or folder of the encoder, if it is not where it was when the data were prepared; its sha256 must
    be the same. Raises ValueError for labels or prompts that do not fit the model, and for another encoder.
    """
    if conditions.kind != "text":
        if settings.prompts is not None:
            raise ValueError(f"prompts are for models of text, this one is of {conditions}; leave them out")
        if text_encoder is not None:
            raise ValueError(f"a text encoder is for models of text, this one is of {conditions}; leave it out")
        return LabelConditioning(conditions, settings.labels, settings.seed, present)
    if settings.labels != "balanced":
        raise ValueError(
            f"labels are for models of classes, this one is of {conditions}; leave them out, and give prompts"
        )
    if not settings.prompts:
        raise ValueError(NO_PROMPTS)
    return PromptConditioning(settings.prompts, encoder_of(conditions, text_encoder, device=device))


def captions_of(
    dataset: Dataset, conditions: Conditions, seed: int = 0, *, device: torch.device | str = "cpu"
) -> CaptionConditioning:
    """The stored captions of `dataset` for a model of text. ValueError if the data have none, or another encoder's."""
    own = dataset.manifest.conditions
    if not own.fits(conditions):
        raise ValueError(
            f"{dataset.path} has {own}, the model was trained on {conditions}; prepare its captions with the text encoder of "
            "the model, or give --prompts"
        )
    return CaptionConditioning(dataset, seed, device)


def read_prompts(words: Sequence[str]) -> tuple[str, ...]:
    """Prompts from the words of a command line: a word that is the path of a file stands for its lines.

    They are cleaned as captions are: no control characters, one line. Blank lines are left out.
    Raises ValueError for a file that is missing, empty, too large or not text.
    """
    prompts: list[str] = []
    for word in words:
        prompts += _lines(word) if _names_file(word) else [one_line(word)]
    if not prompts:
        raise ValueError(NO_PROMPTS)
    return tuple(prompts)


def _names_file(word: str) -> bool:
    try:
        return Path(word).is_file() or (word.endswith(".txt") and len(word.split()) == 1)
    except (OSError, ValueError):  # too long for a path
        return False


def _lines(name: str) -> list[str]:
    path, wanted = Path(name), "give a text file with one prompt per line"
    try:
        if path.stat().st_size > MAX_PROMPTS:
            raise ValueError(f"{printable(path)} is larger than {MAX_PROMPTS >> 20} MB; {wanted}")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{printable(path)} does not exist; {wanted}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{printable(path)} cannot be read ({first_line(error)}); {wanted}") from error
    lines = [line for line in map(one_line, text.splitlines()) if line]
    if not lines:
        raise ValueError(f"{printable(path)} has no prompts; {wanted}")
    return lines


def conditions_for(
    indices: Sequence[int] | np.ndarray,
    conditions: Conditions,
    mode: Labels = "balanced",
    seed: int = 0,
    present: Sequence[int] = (),
) -> Tensor:
    """Label of each image (N,) int64, from its index and the seed, for the kinds none and labels.

    `balanced` cycles through the classes `present` (empty: all), `random` draws from these uniformly, a tuple of classes is
    repeated (in it, `num_classes` is the null label); with kind none every label is 0. Raises ValueError for anything else.
    """
    indices, count = np.asarray(indices, dtype=np.int64), conditions.num_classes
    if not isinstance(mode, str):
        wrong = [label for label in mode if not 0 <= label <= count]
        if wrong or not mode:
            raise ValueError(f"labels {list(mode)} do not fit a model of {count} classes; use 0 to {count}")
        labels = np.asarray(mode, dtype=np.int64)[indices % len(mode)]
    elif mode not in ("balanced", "random"):
        raise ValueError(f"labels {mode!r} are unknown; use 'balanced', 'random' or a list of classes")
    elif conditions.kind == "none":
        labels = np.zeros_like(indices)
    else:
        classes = np.asarray(present or range(count), dtype=np.int64)
        draws = [image_stream(seed, int(k), LABEL_STREAM).integers(len(classes)) for k in indices if mode == "random"]
        labels = classes[indices % len(classes) if mode == "balanced" else draws]
    return torch.from_numpy(labels)
