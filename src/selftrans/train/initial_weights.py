"""The weights that the student of every stage starts from, kept in the run as `init.safetensors`.

They are made once, from what `--init` names. The file is a complete weights file of the run's model, at step 0, so the run no
longer needs what `--init` named. Checkpoints of a run with adapters hold the adapters alone, and refer to it by its sha256.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import ADAPTERS, INIT, START
from selftrans.checkpoints.load import IMPORTED, REPORT, header
from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.manifest import Manifest
from selftrans.models.lora import add_adapters
from selftrans.models.spec import Named
from selftrans.plain_json import recorded
from selftrans.storage import sha256_file
from selftrans.train.batches import derived_seed
from selftrans.train.fitting import fit
from selftrans.train.given_weights import Given, check_weights_fit, read_given, with_model_of
from selftrans.train.recompute import chosen_blocks
from selftrans.types import Backbone


class InitialWeights:
    """Where a run's students start.

    Args:
        path: RUN/init.safetensors. record: what run.json says of it. tensors: the weights, until they are written.
    """

    def __init__(self, path: Path, record: dict[str, Any], tensors: Named | None = None) -> None:
        self.path, self.record, self._tensors = path, record, tensors

    @property
    def trained(self) -> list[str]:
        """Parameters with new values, at least in part. In a run with adapters they are trained in full."""
        return [*self.record["new"], *self.record["new_rows"]]

    @property
    def new(self) -> bool:
        """Whether the weights are not written yet."""
        return self._tensors is not None

    def tensors(self) -> Named:
        """The weights. ValueError where the run's file is missing or damaged."""
        if self._tensors is not None:
            return self._tensors
        if not self.path.is_file() or sha256_file(self.path) != self.record.get("start"):
            raise ValueError(f"{self.path} is missing or damaged; restore it, or choose another --out")
        return load_file(self.path)

    def write(self, config: RunConfig, manifest: Manifest) -> None:
        """Write the weights into the run; every later stage, and the run when it continues, reads them from there."""
        assert self._tensors is not None
        about = header(
            config, INIT, 0, order=[INIT], shape=manifest.shape, conditions=manifest.conditions, classes=manifest.classes,
            autoencoder=manifest.autoencoder,
        )  # fmt: skip
        metadata = {checkpoint.KEY: json.dumps(about | {"weights": self.record["weights"], INIT: self.record})}
        checkpoint.write_tensors(self.path, self._tensors, metadata)
        self.record["start"] = sha256_file(self.path)

    def release(self) -> None:
        """Free the memory of the weights: from now on they are read from the run."""
        self._tensors = None

    def in_header(self, adapters: bool) -> dict[str, Any]:
        """Entries of the headers of the run's weights files about the initial weights."""
        return {INIT: self.record} | ({ADAPTERS: {"base": self.record["start"]}} if adapters else {})


def resolve_init(
    config: RunConfig, before: RunConfig | None, out: Path, typed: Collection[str] = ()
) -> tuple[RunConfig, Given | None]:
    """The settings with the model of the weights that `--init` names, and these weights if the run is new, else None.

    `before`: the settings that `out` was started with. A run that continues does not read them again. `typed`: see
    `with_model_of`.
    """
    config = dataclasses.replace(config, init=config.init.resolved())
    if config.init.path is None or (before is not None and before.init != config.init):
        if config.init.path is not None and (out / f"{IMPORTED}.json").exists():
            raise ValueError(
                f"{out} holds imported weights, from which it starts; leave out --init, or choose another --out"
            )
        return config, None
    if before is not None:
        return with_model_of(config, before.model, typed), None
    given = read_given(config.init)
    return with_model_of(config, given.model, typed), given


def initial_weights(config: RunConfig, dataset: Dataset, out: Path, given: Given | None) -> InitialWeights | None:
    """The weights that every stage starts from; None without `--init`. ValueError where no given tensor fits the model."""
    if config.init.path is None:
        return None
    if given is None:
        return InitialWeights(out / START, _recorded(out))
    check_weights_fit(given, config, dataset.manifest)
    # for the parameters that the given weights do not have
    torch.manual_seed(derived_seed(config.train.seed, 2))
    fitted = fit(config, dataset.manifest, given, _random_student(config, dataset))
    return InitialWeights(out / START, fitted.record, fitted.tensors)


def _recorded(out: Path) -> dict[str, Any]:
    """The run's record of its initial weights: from run.json or, if that is lost, from their file."""
    if (record := recorded(out / REPORT, lambda report: dict(report[INIT]), None)) is not None:
        return record
    try:
        return dict(checkpoint.read_header(out / START)[INIT]) | {"start": sha256_file(out / START)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{out / START} is missing or damaged ({error}); restore it, or choose another --out"
        ) from error


def _random_student(config: RunConfig, dataset: Dataset) -> Backbone:
    student = config.build_model(dataset.manifest.shape, dataset.manifest.conditions)
    if (null := dataset.null()) is not None:  # before the average is made, which copies buffers only once
        student.use_null(null)
    return student


def build_student(config: RunConfig, dataset: Dataset, initial: InitialWeights | None, *, fresh: bool) -> Backbone:
    """The student of a stage, on the CPU: with initial weights where the stage is `fresh`, and with adapters if asked for."""
    student, lora = _random_student(config, dataset), config.lora
    if initial is not None and (fresh or lora.rank):
        student.load_state_dict(initial.tensors(), strict=True)
    if initial is not None and lora.rank:
        add_adapters(student, lora.rank, lora.factor, lora.targets, initial.trained)
    student.recompute = chosen_blocks(config.train.recompute, student.depth)
    return student
