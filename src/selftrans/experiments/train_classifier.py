"""`selftrans classifier`: prepared data with classes ⇒ a small classifier, whose features `evaluate` can use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from selftrans.data.dataset import Dataset
from selftrans.data.decoded import decoded_images
from selftrans.device import default_device
from selftrans.evaluate.classifier import train_classifier
from selftrans.messages import plural
from selftrans.storage import check_writable, recorded, write_json
from selftrans.train.log import progress_bar

SHARDS = "shards_sha256"  #: entry of the classifier's json: which data it was trained on


def data_of_classifier(file: Path) -> str | None:
    """`Manifest.shards_sha256` of the data that a classifier was trained on, from the json next to it; None if unknown."""
    return recorded(file.with_suffix(".json"), lambda held: str(held[SHARDS]), None)


def classifier_from_data(data: str | Path, out: Path, *, epochs: int, seed: int) -> str:
    """Train a classifier on prepared data, on the default device, and save it; returns a message.

    Raises ValueError for data with less than two classes.
    """
    dataset = Dataset.open(data)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, by which evaluate recognises a classifier")
    if dataset.manifest.num_classes < 2:
        raise ValueError(f"{data} has {plural(dataset.manifest.num_classes, 'class')}; a classifier needs at least two")
    check_writable(out, size=1 << 20)  # the network has about half of it
    device = default_device()
    images = np.concatenate(list(decoded_images(dataset, device=device)), axis=0)
    classes = dataset.manifest.num_classes
    model = train_classifier(images, dataset.labels, classes, seed=seed, epochs=epochs, device=device, bar=progress_bar)
    model.save(out)
    record = model.training_record
    assert record is not None
    description = dataclasses.asdict(record) | {
        "data": str(data),
        SHARDS: dataset.manifest.shards_sha256(),
        "classes": list(dataset.manifest.classes),
    }
    write_json(out.with_suffix(".json"), description)
    return f"{out}: accuracy {record.accuracy:.3f} on {plural(record.held_out, 'held-out image')}"
