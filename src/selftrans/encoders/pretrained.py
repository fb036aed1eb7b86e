"""What the frozen encoders of `transformers` share: names, loading, hashes. Only safetensors are read and no code is run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selftrans.messages import first_line


def encoder_name(name: str) -> str:
    """The name to store: a local folder by its absolute path, so that it is found from any working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def load_model(load: Any, folder: str, name: str, what: str, unused: tuple[str, ...]) -> tuple[Any, set[str]]:
    """A float32 model by `load.from_pretrained`, and the names of the weights that its checkpoint lacks.

    Args:
        folder: hub id or folder; `name` is how messages call it.
        what: the kind of model that is asked for, in messages.
        unused: parts of the names of weights that may be missing, since the output does not depend on them.
    Raises ValueError when it cannot be loaded, has no safetensors, or lacks other weights.
    """
    # At its first use `with torch.device(...)` makes a list of the functions to which it applies. transformers replaces
    # torch.linspace while it builds a model: if that were the first use, the device would never apply to torch.linspace.
    with torch.device("cpu"):
        torch.empty(0)
    try:
        # weights that are not stored are drawn at random: that must not change the random numbers of a training
        with torch.random.fork_rng(devices=[]), _quiet():
            model, info = load.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # missing, offline, gated, pickled, of an unknown class: all unusable
        raise unusable(name, what, error) from error
    assert isinstance(model, nn.Module)
    absent = set(info["missing_keys"])
    # transformers only warns about these, and initialises them randomly
    gaps = sorted(key for key in absent if not any(part in key for part in unused))
    if gaps:
        raise ValueError(f"encoder {name!r}: its checkpoint lacks {len(gaps)} weights, such as {gaps[0]}")
    return model.float(), absent


def unusable(name: str, what: str, error: Exception) -> ValueError:
    """The error for an encoder that cannot be loaded; `what` as for `load_model`."""
    return ValueError(
        f"encoder {name!r} cannot be loaded ({first_line(error, 200)}); give {what} of transformers, by hub id or "
        "folder, with safetensors weights"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`transformers` without its list of unused weights and without its progress bar of loading; downloads keep theirs.

    Afterwards the previous settings are set again.
    """
    from transformers.utils import logging

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (before or _plain)(factory, args, kwargs | {"disable": True})

    set_hook = getattr(logging, "set_tqdm_hook", lambda _: None)  # releases without it have no such bar
    level, before = logging.get_verbosity(), set_hook(hook)
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        set_hook(before)


def _plain(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **kwargs)


def sha256_of(tensors: dict[str, Tensor], files: dict[str, bytes] | None = None) -> str:
    """sha256 of names, shapes and contents, in the order of the names, and then of names and contents of files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, content in sorted((files or {}).items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
