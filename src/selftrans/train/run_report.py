"""What a run says of its stages and its cost: lines for the terminal, and run.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selftrans.checkpoints.adapted import INIT
from selftrans.config import RunConfig
from selftrans.messages import escaped, plural, three_digits
from selftrans.methods.spec import Stage
from selftrans.train.capture_rules import description
from selftrans.train.held_out_loss import HELD_OUT, TRAINED
from selftrans.train.initial_weights import InitialWeights
from selftrans.train.memory_use import memory_line
from selftrans.train.teachers import training_cost
from selftrans.train.trainer import Trainer


def opening_line(trainer: Trainer, number: int, of: int) -> str:
    """What stage `number` of `of` begins with: its steps, size, guidance and folder; with given weights also its memory."""
    objective, stage = trainer.objective, trainer.stage
    parameters = sum(p.numel() for p in objective.student.parameters())
    guided = ", ".join(
        f"{g.name} guidance at block {', '.join(map(str, g.taps))}"
        + (f" until step {g.until_step}" if g.until_step and g.until_step < stage.steps else "")
        for g in objective.guidances
    )
    start = f"continues at step {trainer.step} of {stage.steps}" if trainer.step else plural(stage.steps, "step")
    own, trained = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (objective.student, objective)
    )
    heads = ", with heads" if trained > own else ""
    size = f"{three_digits(parameters / 1e6)} M parameters"
    size += f" ({three_digits(trained / 1e6)} M trained{heads})" if trained != parameters else ""
    what = f"{start}, {size}, {guided or 'no guidance'}"
    if trainer.held_out:
        what += f", {plural(trainer.held_out.samples, 'sample')} held out"
    memory = f"\n{memory_line(trainer.memory)}" if trainer.initial else ""
    return f"[{number}/{of}] {stage.name}: {what} -> {escaped(trainer.directory)}{memory}"


def stage_report(trainer: Trainer) -> dict[str, Any]:
    """The entry of run.json about a stage that is trained."""
    return {
        "stage": trainer.stage.name,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 2),
        "tflops": trainer.total_flops() / 1e12,
        "memory": trainer.memory,
        **({"held_out": {"samples": trainer.held_out.samples, **trainer.held_out.found}} if trainer.held_out else {}),
    } | ({"steps_run": how} if (how := description(trainer)) else {})


def run_report(
    config: RunConfig, plan: Sequence[Stage], spent: list[dict[str, Any]], initial: InitialWeights | None
) -> dict[str, Any]:
    """What run.json holds of a run that is done; `spent` are the reports of its stages.

    Total compute includes earlier stages and a given teacher's training.
    """
    costs = (training_cost(stage.teacher) for stage in plan if stage.teacher)
    given = next((cost for cost in costs if cost), None)
    # the training cost of an imported teacher is unknown, and then so is the sum
    teacher_tflops, teacher_seconds = (given[key] if given else 0.0 for key in ("tflops", "seconds"))
    known = teacher_tflops is not None and teacher_seconds is not None
    return {
        "method": config.method,
        "order": [stage.name for stage in plan],
        "student_steps": spent[-1]["steps"],
        "student_tflops": spent[-1]["tflops"],
        "total_tflops": sum(stage["tflops"] for stage in spent) + teacher_tflops if known else None,
        "total_seconds": round(sum(stage["seconds"] for stage in spent) + teacher_seconds, 2) if known else None,
        "stages": spent,
        "teacher": given,
    } | ({INIT: initial.record} if initial else {})


def held_out_line(report: dict[str, Any]) -> str | None:
    """The loss of held-out samples at the end of a run that is done, and that of others; None where none are held out."""
    found = report["stages"][-1].get("held_out", {})
    if not {HELD_OUT, TRAINED} <= found.keys():
        return None
    held, trained = (f"{found[name]:.4g}" for name in (HELD_OUT, TRAINED))
    return f"flow loss of the average: {held} on the held-out samples ({found['samples']:,}), {trained} on others"


def totals(report: dict[str, Any]) -> str:
    """Steps and compute of a run that is done; compute once, where the only stage is all that was trained."""
    done, own = f"done: {plural(report['student_steps'], 'student step')}", f"{report['student_tflops']:.3g} TFLOPs"
    if report["total_tflops"] is None:
        return f"{done}, {own}; what the teacher's training took is unknown"  # it was imported
    total = f"{report['total_tflops']:.3g} TFLOPs, {report['total_seconds']:.0f} s"
    if len(report["order"]) == 1 and report["teacher"] is None:
        return f"{done}, {total}"
    return f"{done}, {own}; with all stages and the teacher's training {total}"
