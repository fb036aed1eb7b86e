"""The training step as two functions of tensors: forward and backward of a micro-batch, and the update.

    micro_step    latents -> objective -> backward; gradients add up
    update_step   clip -> check that it is finite -> AdamW, or no update

Neither waits for the device. `launched_step` calls them; `captured_step.py` records and replays them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from selftrans.methods.guidance import Report
from selftrans.train import fsdp
from selftrans.train.batches import Loaded, seed_step, to_batch
from selftrans.train.nonfinite import check_step
from selftrans.train.optim import learning_rate, set_learning_rate, update
from selftrans.types import Batch

if TYPE_CHECKING:
    from selftrans.train.trainer import Trainer


def launched_step(trainer: Trainer, batches: Iterator[Loaded]) -> None:
    """One step of the trainer without the moving average, its kernels launched one by one."""
    train, step = trainer.config.train, trainer.step
    rank, device = trainer.accelerator.process_index, trainer.accelerator.device
    set_learning_rate(trainer.optimizer, learning_rate(step, train))
    reports: list[Report] = []
    for micro in range(train.accumulate):
        seed_step(train.seed, trainer.stage.stream, step, micro, rank)
        batch = to_batch(next(batches), trainer.shards, device)
        reports.append(micro_step(trainer, batch, step, last=micro == train.accumulate - 1))
    sound, checked = update_step(trainer, [report["loss"] for report in reports])
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.nonfinite.note(step, checked)
    for report in reports:
        trainer.since_log.add(report, sound)
        trainer.since_checkpoint.add({"flow": report["flow"]}, sound)
    trainer.since_log.add({"grad_norm": checked[2]}, sound)


def micro_step(trainer: Trainer, batch: Batch, step: int | Tensor, *, last: bool) -> Report:
    """Forward and backward of one micro-batch; returns its loss and the report, detached, on the device.

    `step`: 0-based, a number or a 0-d tensor on the device. `last`: whether it is the last micro-batch of the step.
    """
    accelerator = trainer.accelerator
    with fsdp.exchange(trainer.wrapped, accelerator, last):
        with accelerator.autocast():
            loss, report = trainer.wrapped(batch, step)
        accelerator.backward(loss / trainer.config.train.accumulate)
    return {"loss": loss.detach(), **report}


def update_step(trainer: Trainer, losses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clip the gradients and update the weights, if losses and gradient are finite. The gradients are not set to zero.

    Returns, on the device, whether losses and gradient are finite (0-d boolean), and the result of `check_step` (3,): 1 where
    the update was skipped, else 0; loss; norm before clipping.
    """
    accelerator, clip = trainer.accelerator, trainer.config.train.clip
    accelerator.unscale_gradients(trainer.optimizer)  # of fp16
    norm = fsdp.gather_full_tensor(accelerator.clip_grad_norm_(trainer.wrapped.parameters(), clip))
    checked = check_step(losses, norm, accelerator)
    sound = checked[0] == 0
    update(trainer.optimizer, sound, accelerator.scaler)
    return sound, checked
