"""Out of memory in a training step: one line that names a micro-batch that fits, found by trying smaller ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.messages import plural
from selftrans.train.batches import Loaded, to_batch
from selftrans.train.capture_rules import NotCaptured
from selftrans.train.captured_step import Phase
from selftrans.train.optim import moment_bytes

if TYPE_CHECKING:
    from selftrans.train.trainer import Trainer

T = TypeVar("T")

#: what takes memory besides a step without a graph, in these phases of a captured step
WHILE = {Phase.RECORDING: "it is recorded as a graph", Phase.REPLAYING: "graphs keep that of the step before"}
CPU_MESSAGES = ("can't allocate memory", "not enough memory")  #: of RuntimeError, on a CPU


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in CPU_MESSAGES)


def guarded_step(trainer: Trainer, batches: Iterator[Loaded]) -> None:
    """One training step. MemoryError (one line, with the remedy) where the device has no memory for it; `NotCaptured` where
    graphs of `train.capture auto` hold the memory: a new process continues without them."""
    try:
        trainer.train_step(batches)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # not inside the handler: the frames of the error hold the tensors of the step
    release(trainer)
    message, captured = explanation(trainer, next(batches)), trainer.captured
    if captured is not None and captured.expendable:
        raise NotCaptured(
            message, f"a step of {trainer.stage.name} had no memory while graphs kept that of the step before"
        )
    raise MemoryError(message)


def between_steps(trainer: Trainer, name: str, work: Callable[[], T]) -> T:
    """The result of `work`, which can be repeated. Where it has no memory while graphs of `train.capture auto` keep the memory
    of a step, the graphs are freed for the rest of the run, one line names the reason (`name`), and `work` is called again."""
    captured = trainer.captured
    try:
        return work()
    except RuntimeError as error:
        if captured is None or not captured.expendable or not is_out_of_memory(error):
            raise
    # not inside the handler: the frames of the error hold the tensors of the work
    captured.free(name)
    return work()


def explanation(trainer: Trainer, rows: Loaded) -> str:
    """One line: how large the batch is, and what fits. Call it when nothing refers to the step's tensors any more.

    `rows` is a micro-batch as the stream gives it. Halves of it are tried, forward and backward, in a run of one process.
    """
    train, device, micro = trainer.config.train, trainer.accelerator.device, trainer.stream.micro
    where = f"{device.type} is out of memory in a step of {trainer.stage.name} with {plural(micro, 'sample')} at a time"
    if device.type == "cuda":
        where += f" ({torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB)"
    alone = trainer.accelerator.num_processes == 1
    options = {
        "--train.recompute True": train.recompute is not True,
        "--train.precision bf16": train.precision == "fp32",
    }
    less = " or ".join([option for option, new in options.items() if new] + ["a smaller model"])
    if trainer.captured is not None and (when := WHILE.get(trainer.captured.phase)):
        return f"{where} while {when}; without one it fits: use --train.capture off, or {less}"
    fits = _largest(trainer, rows) if alone else None
    if fits is None and (alone or micro == 1):
        few = "two samples, which train.contrastive needs, do" if train.contrastive else "one sample does"
        return f"{where}, and {few} not fit either: use {less}"
    parts = train.accumulate * (micro // fits if fits else _smallest_factor(micro))
    tried = f"; {fits} at a time fit" if fits else ""
    return (
        f"{where}{tried}: --train.accumulate {parts} computes the same batch of {train.batch_size} in {parts} parts; "
        f"or use {less}{_consent(trainer)}"
    )


def _consent(trainer: Trainer) -> str:
    """What changed settings of this run need besides, as the end of a line. A run that holds no weights needs nothing."""
    run = trainer.directory.parent
    trained = any(checkpoint.steps(folder) for folder in run.glob("*/checkpoints"))
    held = "has checkpoints" if trained else "holds given weights" if trainer.initial else None
    return f"; the run {held}: add --train.allow-changes True" if held and (run / "config.json").exists() else ""


def _largest(trainer: Trainer, rows: Loaded) -> int | None:
    """The largest part of a micro-batch that a step has memory for, by trying; None if it has memory for none.

    Parts are of equal size: 1/2, 1/4, ... of 8 samples, 1/3 and 1/15 of 15; with `train.contrastive` of two samples at least.
    """
    size, least = trainer.stream.micro, 2 if trainer.config.train.contrastive else 1
    while size > 1 and (size := size // _smallest_factor(size)) >= least:
        part = Loaded(rows.rows[:size], {name: tensor[:size] for name, tensor in rows.tensors.items()})
        if _fits(trainer, part):
            return size
    return None


def _smallest_factor(size: int) -> int:
    """The smallest number above 1 that divides `size`, a number above 1."""
    return next(k for k in range(2, size + 1) if size % k == 0)


def _fits(trainer: Trainer, rows: Loaded) -> bool:
    """Whether forward and backward have memory, with the optimiser's moments, which its first step makes."""
    device, held = trainer.accelerator.device, []
    try:
        if not trainer.step:
            trained = [p for p in trainer.objective.parameters() if p.requires_grad]
            size = moment_bytes(trained, trainer.config.train.optimizer)
            held = [torch.empty(size, dtype=torch.uint8, device=device)]
        with trainer.accelerator.autocast():
            loss, _ = trainer.objective(to_batch(rows, trainer.shards, device), trainer.step)
        loss.backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        held.clear()
        release(trainer)
    return True


def release(trainer: Any) -> None:
    """Free the gradients, and memory that torch's allocator keeps for later tensors."""
    trainer.objective.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
