"""`selftrans classifier`: prepared data with classes ⇒ a small classifier, whose features `evaluate` can use.

FILE.safetensors, FILE.json     the classifier, what it was trained on      FILE.training/    checkpoints, until it is finished
"""

from __future__ import annotations

import dataclasses
import functools
import glob
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
from selftrans.messages import escaped, plural
from selftrans.progress import progress_bar
from selftrans.storage import check_writable, lock_file, recorded, remove_stale_temporaries, write_json
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
    signal, with a checkpoint written. Raises ValueError for data with less than two classes, and where `out` or its training
    is of other data or settings, or something else.
    """
    dataset = Dataset.open(data)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, by which evaluate recognises a classifier")
    if dataset.manifest.num_classes < 2:
        raise ValueError(
            f"{data} has {plural(dataset.manifest.num_classes, 'class')}; a classifier needs at least two: prepare pictures in "
            "one folder for each class, or measure without a classifier of yours (evaluate --features inception or values)"
        )
    settings = {"epochs": epochs, "seed": seed, SHARDS: dataset.manifest.shards_sha256()}
    description, folder = _finished(out, settings), out.with_suffix(".training")
    if description is None:
        check_writable(out, size=1 << 20)  # the network has about half of it
        if folder.is_symlink() or (folder.exists() and not (folder / ".lock").exists()):
            raise ValueError(f"{folder} exists and holds something else; choose another --out, or remove it")
        with lock_file(folder / ".lock"):
            remove_stale_temporaries(out.parent, *map(glob.escape, (out.name, out.with_suffix(".json").name)))
            # until it has the lock, another process may finish a classifier
            description = _finished(out, settings) or _train(dataset, out, folder, settings)
    _remove_training(folder, settings)
    return (
        f"{escaped(out)}: accuracy {description['accuracy']:.3f} on {plural(description['held_out'], 'held-out image')}"
    )


def _train(dataset: Dataset, out: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train the classifier on from the newest checkpoint in `folder`, and write its files; returns its json."""
    found, device = checkpoint.newest(folder), default_device()
    if found is not None and found.state["settings"] != settings:
        raise ValueError(
            f"{folder} is an unfinished training with other data, --epochs or --seed; give those, or remove it"
        )
    images = np.concatenate(list(decoded_images(dataset, device=device)), axis=0)
    classes = dataset.manifest.classes
    steps = functools.partial(_steps, folder, settings, found)
    seed, epochs = settings["seed"], settings["epochs"]
    model = train_classifier(images, dataset.labels, len(classes), seed=seed, epochs=epochs, device=device, steps=steps)
    assert model.training_record is not None
    description = dataclasses.asdict(model.training_record) | settings
    description |= {"data": dataset.origin, "classes": list(classes)}
    write_json(out.with_suffix(".json"), description)
    model.save(out)  # last: with it the classifier is finished
    return description


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The json of the finished classifier at `out`; None where there is none. ValueError for one of other settings or data,
    and for other files, which stay as they are."""
    about = out.with_suffix(".json")
    if not out.exists() and (not about.exists() or data_of_classifier(out)):
        return None

    def of(held: dict[str, Any]) -> dict[str, Any]:
        record = SmallClassifier.load(out).training_record
        return held if record and dataclasses.asdict(record).items() <= held.items() else {}

    held: dict[str, Any] = recorded(about, of, {})
    if not held:
        raise ValueError(
            f"{out} and {about.name} are damaged, or something else; choose another --out, or remove what is there of both"
        )
    different = [name for name, now in settings.items() if held.get(name) != now]
    if different:
        changed = ["other data" if name == SHARDS else f"--{name} {held.get(name)}" for name in different]
        raise ValueError(f"{out} is a finished classifier of {' and '.join(changed)}; give those, or another --out")
    return held


def _remove_training(folder: Path, settings: dict[str, Any]) -> None:
    """Remove the checkpoints of the finished classifier, also those that a process left which was killed before it did so."""
    if folder.is_symlink() or not (folder / ".lock").exists():
        return
    found = checkpoint.newest(folder)
    if found is None or found.state["settings"] == settings:
        shutil.rmtree(folder, ignore_errors=True)


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
