"""Does the prompt control the sample? Digits that are asked for in sentences, measured in the images that come out.

A prompt of `digit_captions` names a digit, and levels -1, 0, 1 of attributes. The digit is read from the image by a classifier.
An attribute is measured as in `digit_attributes`, and given in deviations of the real scans of the digit that was asked for,
because the levels are thirds within a digit. The correlation of level and measurement is 0 if a prompt has no effect on an
attribute. Its upper bound is that of the real scans with their own levels: below 1, as a level has only three values.

Shape legend: n images, A attributes in the order of ATTRIBUTES.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from selftrans.checkpoints.load import load_model
from selftrans.data.sources.digit_attributes import ATTRIBUTES, attributes, levels
from selftrans.data.sources.digit_captions import RESERVED, TRAINED, Described, Wording, prompts, sentence
from selftrans.device import default_device
from selftrans.encoders.text import encoder_of
from selftrans.evaluate.classifier import digits
from selftrans.evaluate.extractors import Extractor, extract
from selftrans.evaluate.metrics import frechet_distance
from selftrans.evaluate.statistics import Statistics
from selftrans.plain_json import recorded
from selftrans.sampling.conditioning import PromptConditioning
from selftrans.sampling.images import Sampler
from selftrans.storage import write_json
from selftrans.types import Conditions

WORDINGS: dict[str, Wording] = {"trained": TRAINED, "reserved": RESERVED}
RESAMPLES = 1000  #: of the bootstrap


class Asked(NamedTuple):
    """Prompts: what they ask for, and their texts."""

    what: tuple[Described, ...]
    texts: tuple[str, ...]


class Measured(NamedTuple):
    """What images show, and what was asked for."""

    digit: np.ndarray  #: (n,) int64 asked for
    shown: np.ndarray  #: (n,) int64 by the classifier
    level: np.ndarray  #: (n, A) -1, 0, 1; NaN where the prompt does not mention the attribute
    value: np.ndarray  #: (n, A) in deviations from the mean of the scans of `digit`


class Scans:
    """The real scans: what the samples are compared with."""

    def __init__(self, extractor: Extractor) -> None:
        images, labels = digits()
        self.extractor, self.images, self.labels = extractor, images, np.asarray(labels, dtype=np.int64)
        table = _table(attributes(images))
        of_digit = [table[self.labels == digit] for digit in range(10)]
        self.mean = np.stack([rows.mean(axis=0) for rows in of_digit])  #: (10, A)
        self.deviation = np.stack([rows.std(axis=0) for rows in of_digit])  #: (10, A)
        self.statistics = Statistics.of(images, extractor, source="digits", keep=False)

    def bound(self) -> Measured:
        """The scans themselves, with their own digits and levels: the most that samples could reach."""
        level = _table(levels(attributes(self.images), self.labels)).astype(np.float64)
        return self.measured(self.images, self.labels, level)

    def measured(self, images: np.ndarray, digit: np.ndarray, level: np.ndarray) -> Measured:
        """What images (n, 8, 8, 1) uint8 show, asked for `digit` (n,) and `level` (n, A)."""
        shown = np.concatenate([out["logits"].argmax(axis=-1) for out in extract(images, self.extractor)])
        value = (_table(attributes(images)) - self.mean[digit]) / self.deviation[digit]
        return Measured(digit, shown, level, value)


def asked(wording: Wording, count: int, seed: int = 0) -> Asked:
    """`count` prompts in a wording; the same digits and levels in every wording."""
    what = prompts(count, seed)
    return Asked(tuple(what), tuple(sentence(each, wording, f"asked {seed} {k}") for k, each in enumerate(what)))


def levels_of(what: Sequence[Described]) -> np.ndarray:
    """(n, A) levels asked for, NaN for attributes that are not mentioned."""
    return np.array([[each.levels.get(name, np.nan) for name in ATTRIBUTES] for each in what], dtype=np.float64)


def summary(measured: Measured, *, seed: int = 0) -> dict[str, Any]:
    """Digit accuracy, and of each attribute Pearson's and Spearman's correlation of level and value.

    Each is [value, low, high], the last two the 95 % interval of a bootstrap over images; that of Spearman's resamples the
    ranks. `mentioned` counts the images whose prompt mentions the attribute.
    """
    right = (measured.shown == measured.digit).astype(np.float64)
    n = len(right)
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)
    found: dict[str, Any] = {"images": n, "digit": _with_interval(right.mean(), counts @ right / n)}
    for k, name in enumerate(ATTRIBUTES):
        said = ~np.isnan(measured.level[:, k])
        x, y, times = measured.level[said, k], measured.value[said, k], counts[:, said]
        found[name] = {"mentioned": len(x)}
        for kind, (a, b) in {"pearson": (x, y), "spearman": (rankdata(x), rankdata(y))}.items():
            found[name][kind] = _with_interval(correlation(a, b), correlation(a, b, times))
    return found


def pooled(several: Sequence[Measured]) -> Measured:
    """The images of several runs as one set."""
    return Measured(*(np.concatenate(part) for part in zip(*several, strict=True)))


def correlation(x: np.ndarray, y: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """Pearson's correlation of x (n,) and y (n,); with `times` (B, n), of B samples that hold each pair so many times.

    0 where one of them is constant.
    """
    times = np.ones((1, len(x))) if times is None else times
    x, y = x - x.mean(), y - y.mean()
    n, sx, sy, sxx, syy, sxy = (times @ np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)).T
    scale = np.sqrt(np.maximum((n * sxx - sx**2) * (n * syy - sy**2), 0.0))
    found = np.divide(n * sxy - sx * sy, scale, out=np.zeros_like(scale), where=scale > 1e-12)
    return found if len(found) > 1 else found[0]


class PromptControl:
    """Measures runs of `digits_t2i`. What was measured before is read from `folder` if the weights and settings are the same.

    Args:
        images: number of prompts, one image each. seed: of the noise.
    """

    def __init__(self, scans: Scans, folder: Path, *, images: int, seed: int = 1) -> None:
        self.scans, self.folder, self.images, self.seed = scans, folder, images, seed
        self.asked = {name: asked(wording, images) for name, wording in WORDINGS.items()}
        self._conditioning: dict[str, PromptConditioning] = {}

    def measure(self, source: Path, wording: str, scale: float) -> tuple[Measured, dict[str, Any]]:
        """What the images of a run or checkpoint show, and a record: distance to the scans, step, sampler."""
        loaded = load_model(source)
        settings = dataclasses.replace(
            loaded.config.sample, num=self.images, guidance_scale=scale, seed=self.seed, batch_size=250
        )
        identity = {
            "weights": loaded.source["sha256"],
            "extractor": self.scans.extractor.sha256,
            "wording": wording,
            "prompts": hashlib.sha256("\n".join(self.asked[wording].texts).encode()).hexdigest(),
            **{key: getattr(settings, key) for key in ("num", "guidance_scale", "seed", "sampler", "steps")},
        }
        file = self.folder / f"{identity['weights'][:16]}-{wording}-{scale:g}.json"
        what = self.asked[wording].what
        digit, level = np.array([each.digit for each in what]), levels_of(what)
        before = recorded(file, lambda held: held if held["identity"] == identity else None, None)
        if before is not None:
            shown, value = (np.asarray(before[key]) for key in ("shown", "value"))
            return Measured(digit, shown, level, value), identity | before["record"]
        sampler = Sampler.of(loaded, settings, conditioning=self._prompts(loaded.model.conditions, wording))
        images = np.concatenate([batch.images for batch in sampler.sample()])
        measured = self.scans.measured(images, digit, level)
        distance = frechet_distance(Statistics.of(images, self.scans.extractor, keep=False), self.scans.statistics)
        record = {"step": loaded.step, "stage": loaded.stage, "distance": round(float(distance), 3)}
        arrays = {"shown": measured.shown.tolist(), "value": measured.value.round(4).tolist()}
        write_json(file, {"identity": identity, "record": record, **arrays})
        return measured, identity | record

    def _prompts(self, conditions: Conditions, wording: str) -> PromptConditioning:
        """The prompts of a wording, encoded once."""
        if wording not in self._conditioning:
            encoder = encoder_of(conditions, device=default_device())
            self._conditioning[wording] = PromptConditioning(self.asked[wording].texts, encoder)
        return self._conditioning[wording]


def _table(named: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([named[name] for name in ATTRIBUTES], axis=1)  # (n, A)


def _with_interval(value: Any, resampled: np.ndarray) -> list[float]:
    return [round(float(each), 4) for each in (value, *np.quantile(resampled, [0.025, 0.975]))]
