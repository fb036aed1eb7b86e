"""`selftrans classifier`: prepared data with classes ⇒ a small classifier, whose features `evaluate` can use.

FILE.safetensors, FILE.json     the classifier, what it was trained on      FILE.training/    checkpoints, until it is finished
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim.lr_scheduler import OneCycleLR

from selftrans.checkpoints import format as checkpoint
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.device import default_device
from selftrans.evaluate.classifier import SmallClassifier, train_classifier
from selftrans.messages import plural
from selftrans.storage import check_writable, lock_file, recorded, write_json
from selftrans.train.log import progress_bar
from selftrans.train.optim import load_optimizer, optimizer_tensors
from selftrans.train.signals import StopSignal

SHARDS = "shards_sha256"  #: entry of the classifier's json: which data it was trained on
CHECKPOINT_EVERY = 500  #: steps from one checkpoint to the next


def data_of_classifier(file: Path) -> str | None:
    """`Manifest.shards_sha256` of the data that a classifier was trained on, from the json next to it; None if unknown."""
    return recorded(file.with_suffix(".json"), lambda held: str(held[SHARDS]), None)


def classifier_from_data(data: str | Path, out: Path, *, epochs: int, seed: int) -> str:
    """Train a classifier on prepared data, on the default device, and save it; returns a message.

    Repeating the call continues it; a finished classifier of these data and settings stays. `Interrupted` after a stop
    signal, with a checkpoint written. Raises ValueError for data with less than two classes, and where the training of other
    data or settings is unfinished.
    """
    dataset = Dataset.open(data)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, by which evaluate recognises a classifier")
    if dataset.manifest.num_classes < 2:
        raise ValueError(f"{data} has {plural(dataset.manifest.num_classes, 'class')}; a classifier needs at least two")
    settings = {"epochs": epochs, "seed": seed, SHARDS: dataset.manifest.shards_sha256()}
    description = _description(out, settings)
    if description is None:
        check_writable(out, size=1 << 20)  # the network has about half of it
        folder, device = out.with_suffix(".training"), default_device()
        if folder.is_symlink() or (folder.exists() and not (folder / ".lock").exists()):
            raise ValueError(f"{folder} exists and holds something else; choose another --out, or remove it")
        with lock_file(folder / ".lock"):
            found = checkpoint.newest(folder)
            if found is not None and found.state["settings"] != settings:
                raise ValueError(
                    f"{folder} is an unfinished training with other data, --epochs or --seed; give those, or remove it"
                )
            images = np.concatenate(list(decoded_images(dataset, device=device)), axis=0)
            steps = functools.partial(_steps, folder, settings, found)
            classes = dataset.manifest.num_classes
            model = train_classifier(
                images, dataset.labels, classes, seed=seed, epochs=epochs, device=device, steps=steps
            )
            model.save(out)
            assert model.training_record is not None
            description = dataclasses.asdict(model.training_record) | settings
            description |= {"data": str(data), "classes": list(dataset.manifest.classes)}
            write_json(out.with_suffix(".json"), description)
            shutil.rmtree(folder)
    return f"{out}: accuracy {description['accuracy']:.3f} on {plural(description['held_out'], 'held-out image')}"


def _description(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The json of a finished classifier of these settings and data; None where one of both is missing, damaged or of others."""

    def of(held: dict[str, Any]) -> dict[str, Any] | None:
        record = SmallClassifier.load(out).training_record
        return held if record and (dataclasses.asdict(record) | settings).items() <= held.items() else None

    return recorded(out.with_suffix(".json"), of, None)


def _steps(
    folder: Path,
    settings: dict[str, Any],
    found: checkpoint.Checkpoint | None,
    model: SmallClassifier,
    schedule: OneCycleLR,
) -> Iterator[int]:
    """The steps from the checkpoint `found` on, which is loaded; between them, further ones are written to `folder`."""
    optimizer, last = schedule.optimizer, schedule.total_steps
    with StopSignal() as stop:
        first = 0
        if found is not None:
            first = found.step
            model.load_state_dict(found.tensors("classifier"))
            load_optimizer(optimizer, model, found.tensors("optimizer"))
            schedule.load_state_dict({"last_epoch": first - 1, "_step_count": first + 1})
            schedule.step()  # sets the learning rate and the momentum of the next step
        with progress_bar(desc="classifier", unit="step", total=last, initial=first) as bar:
            for step in range(first + 1, last + 1):
                yield step - 1
                bar.update()
                stopping = stop.received is not None and step < last
                if stopping or step % CHECKPOINT_EVERY == 0:
                    tensors = {"classifier": model.state_dict(), "optimizer": optimizer_tensors(optimizer, model)}
                    checkpoint.save(folder, step, tensors, {"settings": settings}, {})
                    checkpoint.prune(folder, step, keep=2)
                if stopping:
                    raise stop.interrupted(step, folder)
