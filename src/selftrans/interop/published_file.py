"""A published checkpoint file ⇒ its tensors and options, without executing code from it.

Layouts: see `models.sit_published`. The file is untrusted: its object types, its sizes and the memory it would take are
checked before use.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from selftrans.messages import first_line, listed, printable
from selftrans.models.registry import REGISTRY as MODELS
from selftrans.models.spec import Named, PublishedFile

WRAPPERS = {"module", "_orig_mod"}  #: parts of a name that DataParallel and torch.compile add
#: types that a file may hold besides tensors and plain containers
HARMLESS: list[Any] = [argparse.Namespace]
#: top-level entries whose tensors are not weights
HELPERS = re.compile(r"(opt|optim|optimi[sz]ers?|(lr_)?schedulers?|(grad_?)?scaler|rng)(_|$)", re.IGNORECASE)
MOST = 20  #: entries of a file that a message lists
#: header entries of files that `selftrans export` wrote in a published layout: its name, and what decodes the latents
LAYOUT, AUTOENCODER = "layout", "autoencoder"


def read(path: Path) -> PublishedFile:
    """Read `path`. ValueError, without executing anything, when it has none of the layouts or holds other types."""
    content, entries = load_content(path)
    layout = entries.get(LAYOUT) if any(entries.get(LAYOUT) in spec.layouts for spec in MODELS.every()) else None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict, or one with model and ema")
    named = {kind: content[key] for kind, key in (("raw", "model"), ("ema", "ema")) if key in content}
    if not named and isinstance(content.get("state_dict"), Mapping):
        named = {"ema": content["state_dict"]}
    unused = _unused(path, content, bool(named))
    weights = {kind: _tensors(path, tensors) for kind, tensors in (named or {"ema": content}).items()}
    optimizer, args, stored = (content.get(key) if named else None for key in ("opt", "args", "steps"))
    if named and args is None:
        args = content.get("config")  # the name in LightningDiT's files
    steps = _count(stored)
    if stored is not None and steps is None:
        unused.append("steps")
    autoencoder = entries.get(AUTOENCODER) if layout else None
    return PublishedFile(path, weights, optimizer, _options(args), steps, layout, unused, autoencoder)


def load_content(path: Path) -> tuple[Any, dict[str, str]]:
    """What a .pt or .safetensors file holds, and the entries of its header, if it has one. ValueError as `read`."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a published checkpoint, .pt or .safetensors")
    with open(path, "rb") as file:
        packed = file.read(4) == b"PK\x03\x04"
    return (_archive(path), {}) if packed else _safetensors(path)


def _unused(path: Path, content: Mapping[Any, Any], nested: bool) -> list[str]:
    """Names of the unread entries of a file whose weights are `nested` in one entry. ValueError if any of them are weights."""
    models = ({"model", "ema"} & content.keys() or {"state_dict"}) if nested else set()
    others = [key for key in content if key not in models | {"opt", "args", "steps"}]
    lost = [printable(key, 80) for key in others if _weights(key, content[key])]
    if lost:
        raise ValueError(
            f"{path} holds weights under {listed(lost, MOST)}, which would be lost; expected a plain state dict, one under "
            "state_dict, or model and ema (with opt, args, steps): save the weights in one of these layouts"
        )
    options = {"config"} if isinstance(content.get("config"), dict) and "args" not in content else set()
    return [printable(key, 80) for key in others if key not in options] if nested else []


def _weights(key: object, entry: Any) -> bool:
    """Whether a top-level entry is a network's state dict: tensors by name, and not the state of an optimiser or the like."""
    if not isinstance(entry, Mapping) or (isinstance(key, str) and HELPERS.match(key)):
        return False
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.dim() for value in entry.values())


def _count(steps: Any) -> int | None:
    """A number of steps, stored as an int or a tensor; None for anything else."""
    if isinstance(steps, Tensor):
        scalar = steps.dim() == 0 and steps.layout == torch.strided and steps.device.type == "cpu"
        steps = steps.item() if scalar else None
    return steps if isinstance(steps, int) and steps >= 0 else None


def _options(args: Any) -> dict[str, Any]:
    """The stored options of the training command, those of plain types; of a configuration also those of its sections."""
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    nested = (section for section in options.values() if isinstance(section, dict))
    options = {**options, **{k: v for section in nested for k, v in section.items()}}
    return {k: v for k, v in options.items() if isinstance(k, str) and isinstance(v, str | int | float | list | tuple)}


def _archive(path: Path) -> Any:
    """The content of a zip written by torch.save: memory-mapped tensors, plain containers, and `HARMLESS` types."""
    storages: list[tuple[int, int]] = []  # (address, bytes)

    def placed(storage: Any, _: str) -> Any:
        storages.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                raise ValueError("its records are compressed, which torch.save does not do")  # a zip bomb
            if sum(r.file_size for r in records) > path.stat().st_size:
                raise ValueError("its records overlap")
            if (damaged := archive.testzip()) is not None:  # torch does not check
                raise ValueError(f"its record {printable(damaged, 80)} has a wrong checksum")
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location=placed, weights_only=True, mmap=True)
        data = [r for r in records if re.search(r"/data/\d+$", r.filename) and r.file_size]
        sizes = [r.file_size for r in sorted(data, key=lambda r: r.header_offset)]
        claimed = [size for _, size in sorted(set(storages)) if size]
        if sizes != claimed:  # with mmap, torch trusts the sizes in the pickle
            raise ValueError("its records have other sizes than its index claims")
        return content
    except Exception as error:  # a malicious file can raise any type: report it in one line
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} was refused, without running anything in it: it holds {refused[1]}, and only tensors, plain "
                "containers and argparse.Namespace are read; save only its state dict, preferably as safetensors"
            ) from error
        raise ValueError(
            f"{path} is damaged or not a torch checkpoint ({first_line(error)}); fetch it again"
        ) from error


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content and header of a safetensors file; names that begin with `model.` and `ema.` are two state dicts."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is neither a torch checkpoint (a zip) nor safetensors, or is truncated ({first_line(error)}); "
            "fetch it again"
        ) from error
    if "selftrans" in metadata:
        raise ValueError(f"{path} is already a selftrans weights file; use it directly in place of a run")
    if {name.partition(".")[0] for name in tensors} - {"model", "ema"}:
        return dict(tensors), metadata
    content: dict[str, Any] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        content.setdefault(kind, {})[rest] = tensor
    return content, metadata


def _tensors(path: Path, named: Any) -> Named:
    """A state dict with plain names, in its order. ValueError for anything but strided floating-point tensors on the CPU."""
    if not isinstance(named, Mapping) or not named:
        raise ValueError(f"{path} holds no state dict where one was expected")
    size = 0
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: entry {printable(name, 80)} is a {type(tensor).__name__}; expected a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise ValueError(f"{path}: entry {printable(name, 80)} is not a plain floating-point tensor")
        size += tensor.numel() * tensor.element_size()
    if size > path.stat().st_size:  # overlapping or expanded views: small on disk, large once written
        raise ValueError(f"{path}: its tensors claim {size:,} bytes, more than the file has; fetch it again")
    plain = {".".join(p for p in name.split(".") if p not in WRAPPERS): t for name, t in _unshared(named).items()}
    first = 1 + max((int(n.split(".")[1]) for n in plain if re.match(r"blocks\.\d{1,6}\.", n)), default=-1)
    plain = {_modern(name, first): tensor for name, tensor in plain.items()}
    if len(plain) != len(named):
        raise ValueError(f"{path}: some names occur twice, with and without {' or '.join(sorted(WRAPPERS))}")
    return plain


def _unshared(named: Mapping[str, Tensor]) -> Named:
    """The same tensors without shared storage, which safetensors cannot write."""
    seen: set[int] = set()
    out = {}
    for name, tensor in named.items():
        where = tensor.untyped_storage().data_ptr()
        out[name] = tensor.detach().clone() if where in seen else tensor.detach()
        seen.add(where)
    return out


def _modern(name: str, first: int) -> str:
    """The current name of a tensor: early REPA files name the blocks after the projectors `decoder_blocks`, from 0."""
    old = re.match(r"decoder_blocks\.(\d{1,6})\.", name)
    return f"blocks.{first + int(old[1])}.{name[old.end() :]}" if old else name
