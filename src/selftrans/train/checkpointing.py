"""The checkpoint of a stage in training: written from a trainer, and loaded into one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import header
from selftrans.config import Train, to_object
from selftrans.messages import plural
from selftrans.models.lora import trained_names
from selftrans.train import fsdp
from selftrans.train.optim import load_optimizer, optimizer_tensors
from selftrans.train.preview import run_prompts

if TYPE_CHECKING:
    from selftrans.train.trainer import Trainer


HELD = ("weights", "average", "optimizer")  #: parts of the memory (`memory_use`) that a checkpoint holds


def bytes_of(memory: Mapping[str, int]) -> int:
    """Bytes of a checkpoint, about; `memory`: see `memory_use`."""
    return sum(memory.get(part, 0) for part in HELD)


def kept_checkpoints(train: Train, steps: int) -> int:
    """How many checkpoints a stage of so many steps has at the end, about."""
    written = steps // train.checkpoint_every + bool(steps % train.checkpoint_every)
    kept = train.keep + train.keep_best + (steps // train.keep_every if train.keep_every else 0)
    return min(kept, written) if train.keep else written


def write(trainer: Trainer, means: dict[str, Any], *, required: bool) -> None:
    """Write the checkpoint of the trainer's step in the first process; every process must call it. `means`: the running means.

    A full disk gives a warning, or an OSError if the checkpoint is `required`, as the run ends here.
    """
    tensors = fsdp.gather_checkpoint(
        trainer.objective, trainer.ema.model, optimizer_tensors(trainer.optimizer, trainer.objective)
    )
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        try:
            _write(trainer, tensors, means)
            prune(trainer)
        except OSError as error:
            if required:
                raise OSError(f"{error}; free disk space, then the same command continues") from error
            warnings.warn(f"{error}; training continues, earlier checkpoints stay valid", stacklevel=2)
    trainer.accelerator.wait_for_everyone()


def prune(trainer: Trainer) -> None:
    """Remove the checkpoints that the settings do not keep; none while updates are skipped."""
    train = trainer.config.train
    if not trainer.nonfinite.in_a_row:
        checkpoint.prune(trainer.checkpoints, trainer.step, train.keep, best=train.keep_best, every=train.keep_every)


def _write(trainer: Trainer, tensors: dict[str, dict[str, Tensor]], means: dict[str, Any]) -> None:
    """In the first process. OSError where it cannot be written."""
    spent = {"seconds": trainer.seconds, "tflops": trainer.total_flops() / 1e12}
    manifest = trainer.shards.manifest
    about = header(
        trainer.config,
        trainer.stage.name,
        trainer.step,
        order=trainer.order,
        shape=manifest.shape,
        conditions=manifest.conditions,
        classes=manifest.classes,
        autoencoder=manifest.autoencoder,
        prompts=run_prompts(trainer.config, trainer.shards),
        present=trainer.shards.present,
    )
    about |= spent | trainer.origin
    if trainer.initial:
        about |= trainer.initial.in_header(adapters=bool(trainer.config.lora.rank))
    if trainer.config.lora.rank:  # the frozen weights are in the run's init.safetensors
        kept = trained_names(trainer.objective.student)
        tensors |= {file: {k: v for k, v in tensors[file].items() if k in kept} for file in ("student", "ema")}
    scaler = trainer.accelerator.scaler
    checkpoint.save(
        trainer.checkpoints,
        trainer.step,
        tensors,
        about
        | means
        | {
            "nonfinite": trainer.nonfinite.state(),
            "scaler": scaler.state_dict() if scaler else None,
            "processes": trainer.accelerator.num_processes,
            "teacher": trainer.teacher.source if trainer.teacher else None,
            "config": to_object(trainer.run_config),  # of the run; the headers of the weights have the stage's
        },
        about,
    )


def load(trainer: Trainer, found: checkpoint.Checkpoint) -> None:
    """Load a checkpoint into the trainer. Order and noise need no state: they follow from the step."""
    trainer.seconds = float(found.state["seconds"])
    student, average = found.tensors("student"), found.tensors("ema")
    if trainer.config.lora.rank:
        kept, model = trained_names(trainer.objective.student), trainer.objective.student
        if set(student) != kept or set(average) != kept:
            raise ValueError("its adapters are not those of the settings")
        frozen = {k: v for k, v in model.state_dict().items() if k not in kept}
        student, average = frozen | student, frozen | average
    fsdp.load(trainer.objective, {f"student.{k}": v for k, v in student.items()} | found.tensors("heads"))
    fsdp.load(trainer.ema.model, average)
    for model in (trainer.objective.student, trainer.ema.model):
        if not model.null_set and (null := trainer.shards.null()) is not None:  # of an imported model of text
            model.use_null(null)
    load_optimizer(trainer.optimizer, trainer.objective, found.tensors("optimizer"))
    trainer.since_log.load(found.state["window"], trainer.accelerator.device)
    trainer.since_checkpoint.load(found.state.get("span", {}), trainer.accelerator.device)
    trainer.nonfinite.load(found.state.get("nonfinite", {}))
    if trainer.accelerator.scaler and found.state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(found.state["scaler"])
    if found.state["processes"] != trainer.accelerator.num_processes and trainer.step < trainer.stage.steps:
        trainer.accelerator.print(
            f"resuming with {plural(trainer.accelerator.num_processes, 'process')} instead of {found.state['processes']}: "
            "nothing is lost, but noise and order within a batch differ from here on"
        )
