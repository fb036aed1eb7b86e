"""Toy runs for the tests of training and its commands: three narrow blocks on tiny pictures, a second or two each.

The shared runs are trained once and used by all tests; copy one before you change it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from selftrans.config import RunConfig
from selftrans.data.prepare import prepare
from selftrans.evaluate import classifier, extractors
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.registry import METHODS
from selftrans.recipes import recipe
from selftrans.train import flops as compute
from selftrans.train.log import read_log
from selftrans.train.run import train
from selftrans.types import Conditions
from tests.support.shared import once

#: dotted override -> value: every mechanism of training is used within a few steps
TOY: dict[str, Any] = {
    "model.width": 32,
    "model.depth": 3,
    "model.heads": 2,
    "stage1.steps": 4,
    "stage1.head_width": 16,
    "stage2.head_width": 16,
    "stage2.until_step": 5,
    "train.steps": 8,
    "train.batch_size": 8,
    "train.accumulate": 2,
    "train.lr": 1e-3,
    "train.warmup": 3,
    "train.checkpoint_every": 3,
    "train.preview_every": 0,
    "log.every": 2,
    "log.tensorboard": False,
    "log.preview_images": 4,
    "log.preview_steps": 2,
}


#: the autoencoder of the prepared digits, which are standardised
PIXELS = "pixel(shift=-0.389382,scale=1.33019)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skip what makes toy runs slow. Import it into a test module."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quicken(monkeypatch)
    yield
    torch.set_num_threads(before)


def quicken(patch: pytest.MonkeyPatch | None = None) -> None:
    """The same for the rest of this process, which a test has started."""
    patch = patch or pytest.MonkeyPatch()
    torch.set_num_threads(1)  # on such small tensors two threads are slower than one
    # accelerate runs the garbage collector after every stage, which takes longer than the stage
    patch.setattr("accelerate.utils.memory.gc", types.SimpleNamespace(collect=lambda: 0))
    patch.setattr(compute, "forward_flops", counted)
    patch.setattr(compute, "training_flops", counted_in_training)
    patch.setattr(extractors, "digits_classifier", small_digits_classifier)


KNOWN: dict[Any, int] = {}
COUNT, COUNT_IN_TRAINING = compute.forward_flops, compute.training_flops


def small_digits_classifier(cache: str | Path | None = None) -> classifier.SmallClassifier:
    """`digits_classifier`, narrow and after one epoch: every folder of a comparison has its own. test_classifier.py trains
    the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "train_classifier", functools.partial(classifier.train_classifier, epochs=1, width=4))
        return classifier.digits_classifier(cache)


def counted(backbone: Any, cond: Any, taps: tuple[int, ...] = (), *, stop: bool = False) -> int:
    """`forward_flops`, cached by model: the count takes longer than all other preparation of a toy run."""
    what = (repr(backbone), backbone.shape, taps, stop)
    if what not in KNOWN:
        KNOWN[what] = COUNT(backbone, cond, taps, stop=stop)
    return KNOWN[what]


def counted_in_training(backbone: Any, cond: Any) -> int:
    """`training_flops`, cached likewise."""
    what = (repr(backbone), backbone.shape, "training")
    if what not in KNOWN:
        KNOWN[what] = COUNT_IN_TRAINING(backbone, cond)
    return KNOWN[what]


def count_operations() -> None:
    """Count the operations of a toy run of both stages on the digits beforehand; no tensor is computed."""
    config, conditions = override(recipe("digits"), TOY).restricted(), Conditions("labels", 10)
    for stage in METHODS[config.method].stages(config):
        with torch.device("meta"):
            student, teacher = (config.build_model((1, 8, 8), conditions) for _ in range(2))
            given = Frozen(teacher, stage.teacher.block(teacher.depth), in_place=True) if stage.teacher else None
            compute.step_flops(Objective(student, stage.guide(student, given)), conditions.example(), 1)


def place(name: str) -> Path:
    """A directory that all tests share, removed after the last one (see conftest.py)."""
    return Path(os.environ["HF_HOME"], "toy", name)


def override(config: RunConfig, dotted: dict[str, Any]) -> RunConfig:
    """`config` with some fields replaced."""
    return config.override(dotted)


def toy(dotted: dict[str, Any] | None = None, *, name: str = "digits") -> RunConfig:
    """The recipe `name` at toy size, by default on mirrored digits."""
    dotted = dotted or {}
    named = {key: value for key, value in dotted.items() if key == "model.name"}  # first: a name stands for other sizes
    own = {f"model.{field.name}" for field in dataclasses.fields(override(recipe(name), named).model)}
    small = {key: value for key, value in TOY.items() if key in own or not key.startswith("model.")}
    config = override(recipe(name), named | {"data.path": str(digits())} | small | dotted)
    return config.restricted() if config.method in METHODS else config


def flags(dotted: dict[str, Any] | None = None) -> list[str]:
    """The overrides of a toy run as command-line flags."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in (TOY | (dotted or {})).items()]


def taught_flags() -> list[str]:
    """Flags of a run with a given teacher: overrides of stage 1, which is not trained, would give a warning."""
    return [flag for flag in flags() if not flag.startswith("--stage1")]


@once
def digits() -> Path:
    """The prepared digits, with a mirrored copy of each."""
    prepare("digits", place("digits"), flip=True, progress=False)
    return place("digits")


@once
def plain_digits() -> Path:
    """The same in [-1, 1], as models are imported for."""
    prepare("digits", place("plain-digits"), flip=True, standardise=False, progress=False)
    return place("plain-digits")


@once
def finished() -> Path:
    """A finished run of both stages, trained without interruption."""
    train(toy(), place("finished"), quiet=True)
    return place("finished")


@once
def vanilla() -> Path:
    """A run without guidance."""
    train(toy({"method": "vanilla", "train.steps": 2}), place("vanilla"), quiet=True)
    return place("vanilla")


def copy(run: Path, to: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(run, to))


def pictures(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5, side: int = 8) -> Path:
    """`count` PNGs of noise in each class folder, or in `folder` itself without classes."""
    rng = np.random.default_rng(0)
    for name in classes or (".",):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def prepared(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5, side: int = 8) -> Path:
    """The same pictures, prepared as shards of pixels."""
    prepare(pictures(folder / "pictures", classes, count, side), folder / "data", progress=False)
    return folder / "data"


def checkpoint(run: Path, stage: str = "stage2", step: int | None = None) -> Path:
    """The directory of a checkpoint; by default the newest of the stage."""
    found = sorted((run / stage / "checkpoints").glob("step-*"))
    return found[-1] if step is None else run / stage / "checkpoints" / f"step-{step:08d}"


def tensors(run: Path, stage: str = "stage2", step: int | None = None) -> dict[str, Tensor]:
    """Everything in a checkpoint, as `<file>/<name>`."""
    return {
        f"{file.stem}/{name}": tensor
        for file in checkpoint(run, stage, step).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def log(run: Path, stage: str = "stage2") -> list[dict[str, Any]]:
    """Lines of the log of a stage, without their times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(run / stage / "log.jsonl")]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """AssertionError unless all tensors are equal bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_run(a: Path, b: Path, stages: tuple[str, ...] = ("stage1", "stage2")) -> None:
    """AssertionError unless weights, EMA, heads, optimiser, state and log lines of two runs are equal bit for bit."""
    for stage in stages:
        assert_same(tensors(a, stage), tensors(b, stage))
        assert log(a, stage) == log(b, stage)
        kept = ("step", "window", "scaler", "tflops")
        states = [json.loads((checkpoint(run, stage) / "state.json").read_text()) for run in (a, b)]
        assert [states[0][key] for key in kept] == [states[1][key] for key in kept]


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
