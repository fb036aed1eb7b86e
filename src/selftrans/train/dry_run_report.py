"""What `selftrans train --dry-run` found, as a record and as text."""

from __future__ import annotations

from dataclasses import dataclass, field

from selftrans.messages import duration, gigabytes, plural, three_digits
from selftrans.train.run_data import Transfer, transfer_text


@dataclass
class StagePlan:
    """What one stage takes."""

    name: str
    parameters: int  #: of the student
    trained: int  #: of them and of the heads, with gradients
    steps: int
    reached: int  #: steps that the run folder already has
    tflops_per_step: float
    seconds_per_step: float
    seconds_left: float
    memory: dict[str, int]  #: bytes without activations, by what they are for
    #: bytes: of the device in these steps, with `train.recompute` as it is set; on a CPU of the whole process
    peak: int
    #: of a micro-batch in the smallest step: on a slow CPU fewer than in the run, which is then extrapolated
    samples: int
    checkpoint: int  #: bytes
    kept: int  #: checkpoints kept at the end, about
    capture: str = ""  #: on a GPU: whether steps are replayed as CUDA graphs (`train.capture`), and why not


@dataclass
class DryRun:
    """What a run takes, and where it will write."""

    device: str
    memory_total: int | None  #: bytes of the device, if known
    samples: int
    held_out: int  #: of them, never trained on (`data.held_out`)
    batch_size: int
    micro_batch: int  #: samples that a process computes at a time
    disk_needed: int  #: bytes of the checkpoints that are kept, and of one more while it is written
    disk_free: int
    out: str
    written: list[str]
    fetched: Transfer | None = None  #: what a run fetches, for data at a URL
    stages: list[StagePlan] = field(default_factory=list)


def text(found: DryRun) -> str:
    """A dry run's findings, in lines."""
    held_out = f", {found.held_out:,} of them held out" if found.held_out else ""
    lines = [f"dry run: {plural(found.samples, 'sample')}{held_out}, batches of {found.batch_size}, on {found.device}"]
    for stage in found.stages:
        own, trained = three_digits(stage.parameters / 1e6), three_digits(stage.trained / 1e6)
        size = f"{own} M parameters ({trained} M trained, with heads)"
        fixed = ", ".join(f"{name} {gigabytes(part)}" for name, part in stage.memory.items())
        total = found.memory_total
        fits = "" if total is None else f" of {gigabytes(total)}: {'fits' if stage.peak < 0.95 * total else 'tight'}"
        rate = 1 / stage.seconds_per_step
        few = stage.samples
        about = "" if few >= found.micro_batch else f", extrapolated from {few} and {2 * few} samples at a time"
        at = f", {stage.reached} of them done" if stage.reached else ""
        lines += [
            f"{stage.name}: {size}, {plural(stage.steps, 'step')}{at}",
            f"  memory      peak {gigabytes(stage.peak)}{fits}; without activations {fixed}",
            f"  operations  {stage.tflops_per_step:.3g} TFLOPs a step",
            f"  rate        {three_digits(rate)} steps/s, {three_digits(found.batch_size * rate)} samples/s{about}",
            *([f"  steps       {stage.capture}"] if stage.capture else []),
            f"  time left   {duration(stage.seconds_left)}, without previews and checkpoints",
            f"  disk        {plural(stage.kept, 'checkpoint')} of about {gigabytes(stage.checkpoint)}",
        ]
    if found.fetched:
        lines.append(f"data: {transfer_text(found.fetched)}")
    enough = "enough" if found.disk_needed < found.disk_free else "NOT enough"
    lines.append(f"total: {duration(sum(stage.seconds_left for stage in found.stages))}")
    lines.append(f"disk: {gigabytes(found.disk_needed)} needed, {gigabytes(found.disk_free)} free: {enough}")
    return "\n".join(
        [*lines, f"nothing was written; the run will write to {found.out}:", *(f"  {w}" for w in found.written)]
    )
