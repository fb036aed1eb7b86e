"""torch.compile for backbones: block by block, one compilation for all blocks of a model."""

from __future__ import annotations

from selftrans.types import Backbone

VERSIONS = 64  #: compilations of a block in one process: students, teachers, samplers, batch sizes


def compile_model(model: Backbone, *, dynamic: bool | None = False) -> None:
    """`torch.compile` each block of a model in place, if it has any; all of them share one compilation for each shape."""
    import torch._dynamo as dynamo

    # blocks are one piece of code to dynamo: beyond its eight versions of one, it would go on uncompiled and say little
    dynamo.config.recompile_limit = max(VERSIONS, dynamo.config.recompile_limit)
    dynamo.config.optimize_ddp = False  # it cuts a block in pieces to send gradients sooner: blocks are sent one by one
    for block in model.repeated():
        block.compile(dynamic=dynamic)
