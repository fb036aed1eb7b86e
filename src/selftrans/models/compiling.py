"""torch.compile for backbones, part by part: one compilation for all blocks of a model; kept between processes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from selftrans.models import fused_norm
from selftrans.types import Backbone

VERSIONS = 64  #: compilations of a block in one process: students, teachers, samplers, batch sizes
CACHE = "TORCHINDUCTOR_CACHE_DIR"  #: torch's variable: where compiled code lies
KEEP_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"  #: torch's setting, newer than 2.6


def compile_model(model: Backbone, *, dynamic: bool | None = False) -> None:
    """`torch.compile` in place: each block of a model, all of which share a compilation for each shape, and what is
    `compiled_alone`."""
    import torch._dynamo as dynamo
    import torch._functorch.config as functorch

    keep_compiled()
    # blocks are one piece of code to dynamo: beyond its eight versions of one, it would go on uncompiled and say little
    dynamo.config.recompile_limit = max(VERSIONS, dynamo.config.recompile_limit)
    dynamo.config.optimize_ddp = False  # it cuts a block in pieces to send gradients sooner: blocks are sent one by one
    # without it, `fused_norm` is traced anew in each process
    if fused_norm.FUSED_NORMS and hasattr(functorch, KEEP_FUNCTIONS):
        setattr(functorch, KEEP_FUNCTIONS, True)
    for part in [*model.repeated(), *model.compiled_alone()]:
        part.compile(dynamic=dynamic)


def keep_compiled() -> str | None:
    """Let torch keep compiled code in the user's cache, so that later stages, processes and runs find it; returns where.

    torch's own default is a folder in the system's temporary one, which is emptied. What lies there is executed and
    unpickled by torch, so it is never in a run's folder, which may come from elsewhere, and belongs to this user alone. A
    folder that is given by TORCHINDUCTOR_CACHE_DIR stays. None where no such folder can be made: torch's default then.
    """
    if CACHE not in os.environ:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = home / "selftrans" / "compiled"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
        except (OSError, RuntimeError):  # RuntimeError: no home directory
            return None
        private = not stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and not (private and found.st_uid == os.getuid())):
            return None
        os.environ[CACHE] = str(folder)
    return os.environ[CACHE]
