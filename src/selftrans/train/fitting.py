"""Which of the given weights fit a new model: tensors of the same name and shape, and rows of classes of the same name."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftrans.config import RunConfig
from selftrans.data.manifest import Manifest
from selftrans.messages import plural, printable, shape_text
from selftrans.models.spec import Named, count_and_names
from selftrans.train.given_weights import Given
from selftrans.types import Backbone, Conditions


class Fitted(NamedTuple):
    """The weights that a run starts from."""

    tensors: Named  #: a complete state dict of the new model
    record: dict[str, Any]  #: what was kept and what is new, for run.json


def fit(config: RunConfig, manifest: Manifest, given: Given, student: Backbone) -> Fitted:
    """The given weights in the place of those of a freshly initialised `student`, where they fit.

    A tensor of the same name and shape is kept. Of a table with a row for each class, the rows of classes with equal names
    are kept, and the rows after the classes (the null label). Without class names (published files), an equal number of classes
    is taken for the same classes. Constants of the model are new for latents of another shape, and for text, where the null
    condition comes from the data. ValueError where nothing fits.
    """
    fresh, rows = student.state_dict(), _rows(given, manifest)
    tables = label_tables(config, manifest.shape, manifest.conditions)
    other = given.shape != tuple(manifest.shape) or manifest.conditions.kind == "text"
    constants = {name for name, _ in student.named_buffers()} & fresh.keys() if other else set()
    tensors: Named = {}
    new, partly = [], []
    for name, own in fresh.items():
        theirs = given.tensors.get(name)
        if name in constants:
            tensors[name] = own
        elif theirs is not None and name in tables and theirs.shape[1:] == own.shape[1:]:
            tensors[name] = _with_rows(own, theirs, rows, manifest.num_classes, given.conditions.num_classes)
            partly += [name] if len(rows) < manifest.num_classes else []
        elif theirs is not None and theirs.shape == own.shape:
            tensors[name] = theirs.to(own.dtype)
        else:
            tensors[name] = own
            new.append(name)
    if len(new) + len(constants) >= len(fresh):
        raise ValueError(f"{given.about['path']} holds no tensor that fits this model; start without --init")
    chosen = {f.name: getattr(given.model, f.name) for f in dataclasses.fields(given.model)}
    usual = type(given.model)()
    record = given.about | {
        "model": {k: v for k, v in chosen.items() if k == "name" or v != getattr(usual, k)},
        "kept": len(fresh) - len(new) - len(partly),
        "tensors": len(fresh),
        "new": new,
        "classes": {"before": given.conditions.num_classes, "now": manifest.num_classes, "kept": len(rows)},
        "new_rows": partly,
        "left_out": [name for name in given.tensors if name not in fresh],
        "latents": {"before": list(given.shape), "now": list(manifest.shape)},
        "conditions": {"before": str(given.conditions), "now": str(manifest.conditions)},
    }
    return Fitted({name: tensor.detach().clone() for name, tensor in tensors.items()}, record)


def label_tables(config: RunConfig, shape: tuple[int, ...], conditions: Conditions) -> set[str]:
    """Names of the tensors with one row for each class, found by comparing the shapes for one class more."""
    if conditions.kind == "text":
        return set()
    more = dataclasses.replace(conditions, kind="labels", num_classes=conditions.num_classes + 1)
    with torch.device("meta"):
        small, large = (config.build_model(shape, c).state_dict() for c in (conditions, more))
    grown = {name: (tensor.shape, large[name].shape) for name, tensor in small.items() if name in large}
    return {name for name, (a, b) in grown.items() if a and b and b[0] == a[0] + 1 and a[1:] == b[1:]}


def _rows(given: Given, manifest: Manifest) -> dict[int, int]:
    """Class of the data -> class of the given weights, for classes that both have."""
    count = given.conditions.num_classes
    if given.classes is None:
        return {k: k for k in range(count)} if count == manifest.num_classes else {}
    theirs = {name: k for k, name in enumerate(given.classes[:count])}
    return {k: theirs[name] for k, name in enumerate(manifest.classes[: manifest.num_classes]) if name in theirs}


def _with_rows(own: Tensor, theirs: Tensor, rows: dict[int, int], now: int, before: int) -> Tensor:
    """A fresh table `own` with the rows of kept classes, and those after the classes, from `theirs`."""
    table = own.detach().clone()
    for k, other in rows.items():
        table[k] = theirs[other].to(own.dtype)
    extra = min(len(own) - now, len(theirs) - before)  # the null row
    if extra > 0:
        table[now : now + extra] = theirs[before : before + extra].to(own.dtype)
    return table


def describe(record: dict[str, Any]) -> str:
    """One line: what a run starts from, what was kept, and what is new."""
    about = f"{record['weights']} weights"
    about += f" of {printable(record['stage'])}" if record.get("stage") else ""
    about += f", step {record['step']}" if record.get("step") is not None else ""
    model = [str(v) if k == "name" else f"{k} {v}" for k, v in record["model"].items()]
    about += f"; model {printable(', '.join(model))}"
    about += f"; time and sign: {printable(record['convention'])}" if record.get("convention") else ""
    classes, parts = record["classes"], [f"kept {record['kept']} of {record['tensors']} tensors"]
    if record["new_rows"]:
        before, now, kept = (classes[key] for key in ("before", "now", "kept"))
        rows = f"{kept} of them kept by name, {now - kept} new, the null row kept"
        parts.append(f"{count_and_names(record['new_rows'])}: {before} -> {plural(now, 'class')}, {rows}")
    parts += [f"new: {count_and_names(record['new'])}"] if record["new"] else []
    parts += [f"left out: {count_and_names(record['left_out'])}"] if record["left_out"] else []
    latents = [shape_text(record["latents"][when]) for when in ("before", "now")]
    text = record["conditions"]
    parts += (
        [f"{printable(text['before'])} -> {text['now']}"]
        if text["now"] != text["before"] and not classes["now"]
        else []
    )
    parts += [f"latents {latents[0]} -> {latents[1]}"] if latents[0] != latents[1] else []
    return f"starts from {printable(record['path'])} ({about}): {'; '.join(parts)}"
