"""torch.compile for backbones, part by part: one compilation for all blocks of a model; kept between processes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from selftrans.models import fused_gelu, fused_norm
from selftrans.types import Backbone

#: most compilations of a block in one process: students, teachers, samplers, batch sizes; of prepared buckets 99 shapes each
VERSIONS = 512
CACHE = "TORCHINDUCTOR_CACHE_DIR"  #: torch's variable: where compiled code lies
KEEP_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"  #: torch's setting, newer than 2.6


def compile_model(model: Backbone, *, dynamic: bool | None = False) -> None:
    """`torch.compile` in place: each block of a model, with one compilation per shape for all of them, and the parts that are
    `compiled_alone`. ValueError where SELFTRANS_EPILOGUES lacks its library."""
    import torch._dynamo as dynamo
    import torch._functorch.config as functorch

    fused_gelu.check()
    keep_compiled()
    # all blocks share one code object, and beyond 8 versions of one dynamo would run the rest uncompiled, with a mere warning
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo.config, limit, max(VERSIONS, getattr(dynamo.config, limit)))
    # it would split each block, so that gradients are sent sooner; blocks are small enough
    dynamo.config.optimize_ddp = False
    # without this setting blocks with `fused_norm` are not cached, and each process compiles them again
    if fused_norm.FUSED_NORMS and hasattr(functorch, KEEP_FUNCTIONS):
        setattr(functorch, KEEP_FUNCTIONS, True)
    for part in [*model.repeated(), *model.compiled_alone()]:
        part.compile(dynamic=dynamic)


def keep_compiled() -> str | None:
    """Let torch keep compiled code in the user's cache, so that later stages, processes and runs find it; returns where.

    torch's default is in the system's temporary folder, which is emptied. torch executes and unpickles the files in the cache,
    so only this user may write to it, and it is never in a run's folder, which may come from another user. A folder that
    TORCHINDUCTOR_CACHE_DIR names stays. None where the folder cannot be made or is not private: then torch uses its default.
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
