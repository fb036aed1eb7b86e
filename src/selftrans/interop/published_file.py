"""A stranger's checkpoint file ⇒ its tensors and options, without running anything in it.

Layouts: see `models.sit_published`. Nothing is believed of a file before it is checked: what it holds beside tensors, how
large it is, and what it would unfold into.
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

from selftrans.models.spec import Named, PublishedFile
from selftrans.storage import first_line, printable

WRAPPERS = {"module", "_orig_mod"}  #: parts of a name that DataParallel and torch.compile put in
#: what a file may hold besides tensors and plain containers
HARMLESS: list[Any] = [argparse.Namespace]
#: top-level entries with tensors in them that are no weights
HELPERS = re.compile(r"(opt|optim|optimi[sz]ers?|(lr_)?schedulers?|(grad_?)?scaler|rng)(_|$)", re.IGNORECASE)
MOST = 20  #: entries of a file that are listed
LAYOUT = "layout"  #: header entry of the files that `selftrans export` writes in a published layout


def read(path: Path) -> PublishedFile:
    """What `path` holds. ValueError, with nothing executed, when it is none of the layouts above or holds anything else."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a published checkpoint, .pt or .safetensors")
    with open(path, "rb") as file:
        packed = file.read(4) == b"PK\x03\x04"
    content, layout = (_archive(path), None) if packed else _safetensors(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict, or one with model and ema")
    named = {ours: content[theirs] for ours, theirs in (("raw", "model"), ("ema", "ema")) if theirs in content}
    if not named and isinstance(content.get("state_dict"), Mapping):
        named = {"ema": content["state_dict"]}
    unused = _unused(path, content, bool(named))
    weights = {kind: _tensors(path, tensors) for kind, tensors in (named or {"ema": content}).items()}
    optimizer, args, given = (content.get(key) if named else None for key in ("opt", "args", "steps"))
    steps = _count(given)
    if given is not None and steps is None:
        unused.append("steps")
    return PublishedFile(path, weights, optimizer, _options(args), steps, layout, unused)


def _unused(path: Path, content: Mapping[Any, Any], apart: bool) -> list[str]:
    """Names of the entries that nothing reads, of a file that keeps its weights `apart`. ValueError: weights are among them."""
    models = ({"model", "ema"} & content.keys() or {"state_dict"}) if apart else set()
    others = [key for key in content if key not in models | {"opt", "args", "steps"}]
    lost = [printable(key, 80) for key in others if _weights(key, content[key])]
    if lost:
        raise ValueError(
            f"{path} holds weights under {listed(lost)}, which would be lost; expected a plain state dict, one under "
            "state_dict, or model and ema (with opt, args, steps): save the weights wanted as one of these"
        )
    return [printable(key, 80) for key in others] if apart else []


def _weights(key: object, entry: Any) -> bool:
    """Whether a top-level entry is a state dict of a network: tensors by name, and no state of an optimiser or its helpers."""
    if not isinstance(entry, Mapping) or (isinstance(key, str) and HELPERS.match(key)):
        return False
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.dim() for value in entry.values())


def _count(steps: Any) -> int | None:
    """A number of steps, also one kept as a tensor."""
    if isinstance(steps, Tensor):
        whole = steps.dim() == 0 and steps.layout == torch.strided and steps.device.type == "cpu"
        steps = steps.item() if whole else None
    return steps if isinstance(steps, int) and steps >= 0 else None


def _options(args: Any) -> dict[str, Any]:
    """The options of a command, those of plain kinds."""
    given = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    return {k: v for k, v in given.items() if isinstance(k, str) and isinstance(v, str | int | float | list | tuple)}


def _archive(path: Path) -> Any:
    """The content of a zip as torch.save writes it: tensors mapped from the disk, plain containers, and `HARMLESS`."""
    storages: list[tuple[int, int]] = []  # where in memory, and bytes

    def placed(storage: Any, _: str) -> Any:
        storages.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records):
                raise ValueError("its records are compressed, which torch.save does not do")  # a bomb unfolds in memory
            if sum(r.file_size for r in records) > path.stat().st_size:
                raise ValueError("its records overlap")
            if (torn := archive.testzip()) is not None:  # torch itself never looks
                raise ValueError(f"its record {printable(torn, 80)} fails its checksum")
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location=placed, weights_only=True, mmap=True)
        data = [r for r in records if re.search(r"/data/\d+$", r.filename) and r.file_size]
        held = [r.file_size for r in sorted(data, key=lambda r: r.header_offset)]
        if held != [size for _, size in sorted(set(storages)) if size]:  # torch believes the pickle, when it maps
            raise ValueError("its records are not of the sizes that its index claims")
        return content
    except Exception as error:  # whatever a hostile file provokes, the user is told in a line
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} was refused, and nothing in it was run: it holds {refused[1]}, and only tensors, plain "
                "containers and argparse.Namespace are read; save its state dict alone, best as safetensors"
            ) from error
        raise ValueError(f"{path} is damaged or no torch checkpoint ({first_line(error)}); fetch it again") from error


def _safetensors(path: Path) -> tuple[dict[str, Any], str | None]:
    """The content of a safetensors file; names that begin with `model.` and `ema.` are two state dicts."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is neither a torch checkpoint (a zip) nor safetensors, or is cut short ({first_line(error)}); "
            "fetch it again"
        ) from error
    if "selftrans" in said:
        raise ValueError(f"{path} is a selftrans weights file already; use it as it is, where a run is asked for")
    layout = said.get(LAYOUT) if said.get(LAYOUT) in ("sit", "repa", "dit") else None
    if {name.partition(".")[0] for name in tensors} - {"model", "ema"}:
        return dict(tensors), layout
    content: dict[str, Any] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        content.setdefault(kind, {})[rest] = tensor
    return content, layout


def _tensors(path: Path, named: Any) -> Named:
    """A state dict with plain names, in its order. ValueError for anything but real tensors of floating-point numbers."""
    if not isinstance(named, Mapping) or not named:
        raise ValueError(f"{path} holds no state dict where one was expected")
    size = 0
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: entry {printable(name, 80)} is a {type(tensor).__name__}; expected a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise ValueError(f"{path}: entry {printable(name, 80)} is no plain tensor of floating-point numbers")
        size += tensor.numel() * tensor.element_size()
    if size > path.stat().st_size:  # views of one another, or stretched: small on disk, large once written
        raise ValueError(f"{path}: its tensors claim {size:,} bytes, more than the file has; fetch it again")
    plain = {".".join(p for p in name.split(".") if p not in WRAPPERS): t for name, t in _apart(named).items()}
    first = 1 + max((int(n.split(".")[1]) for n in plain if re.match(r"blocks\.\d{1,6}\.", n)), default=-1)
    plain = {_modern(name, first): tensor for name, tensor in plain.items()}
    if len(plain) != len(named):
        raise ValueError(f"{path}: some names are there twice, with and without {' or '.join(sorted(WRAPPERS))}")
    return plain


def _apart(named: Mapping[str, Tensor]) -> Named:
    """The same without views of one another, which safetensors does not write."""
    seen: set[int] = set()
    out = {}
    for name, tensor in named.items():
        where = tensor.untyped_storage().data_ptr()
        out[name] = tensor.detach().clone() if where in seen else tensor.detach()
        seen.add(where)
    return out


def _modern(name: str, first: int) -> str:
    """REPA's early files call the blocks behind the projectors `decoder_blocks`, and count them anew."""
    old = re.match(r"decoder_blocks\.(\d{1,6})\.", name)
    return f"blocks.{first + int(old[1])}.{name[old.end() :]}" if old else name


def listed(names: list[str]) -> str:
    """`a, b and 3 more`."""
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
