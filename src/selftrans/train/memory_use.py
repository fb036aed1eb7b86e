"""Memory that the weights of a stage take: student, gradients, optimiser, average, and the teacher or external encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from selftrans.encoders.vision import Encoder
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.train.fsdp import local
from selftrans.train.optim import moment_bytes


def memory_use(objective: Objective, average: nn.Module, teacher: Any, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes in one process, by what they are for. Activations are not counted.

    `weights` are those of the student and of the heads; frozen weights that the average shares with the student are counted
    once, there. `teacher`: a `Frozen`, an external encoder, stored features, or None. AdamW keeps two moments of each trained
    parameter; `optimizer` is `train.optimizer`.
    """
    parameters, held = list(objective.parameters()), [*objective.parameters(), *objective.buffers()]
    trained = _bytes(p for p in parameters if p.requires_grad)
    own = {id(tensor) for tensor in held}
    found = {
        "weights": _bytes(held),
        "gradients": trained,
        "optimizer": moment_bytes([p for p in parameters if p.requires_grad], optimizer),
        "average": _bytes(t for t in (*average.parameters(), *average.buffers()) if id(t) not in own),
    }
    if isinstance(teacher, Frozen | Encoder):  # others are features stored with the data
        part = "teacher" if isinstance(teacher, Frozen) else "encoder"
        found[part] = _bytes((*teacher.model.parameters(), *teacher.model.buffers()))
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def memory_line(found: dict[str, int]) -> str:
    """`memory without activations: 12.3 MB (weights 4.1, ...)`."""
    parts = ", ".join(f"{name} {size / 1e6:.3g}" for name, size in found.items())
    return f"memory without activations: {sum(found.values()) / 1e6:.3g} MB ({parts})"
