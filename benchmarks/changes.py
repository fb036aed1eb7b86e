"""Time saved by each design choice of the training step: plain version and ours, interleaved in one process.

    python benchmarks/changes.py [--model SiT-S/2] [--batch-size 10] [--rounds 9] [--out DIR]

Prints the medians in milliseconds and the median of the ratio within a round, and writes them to DIR/changes.json.
`selftrans bench` measures the complete step.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selftrans import flow
from selftrans.device import load_average
from selftrans.experiments.bench import settings
from selftrans.experiments.bench.machine import Clock, describe
from selftrans.experiments.bench.plain_step import update_ema
from selftrans.experiments.bench.rounds import in_turn, randomise
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage2, default_teacher_block
from selftrans.models.sit import SiTConfig
from selftrans.storage import write_json
from selftrans.train.ema import EMA
from selftrans.train.optim import build_optimizer
from selftrans.types import Batch, Conditions

SHAPE, CLASSES = (4, 32, 32), 1000
Way = Callable[[], Any]  #: runs one version of a part of the step


def ways(model: SiTConfig, batch_size: int, device: torch.device) -> dict[str, tuple[Way, Way]]:
    """Design choice -> (the plain version, ours)."""
    config = settings(model, batch_size, "fp32")
    student, teacher = (config.build_model(SHAPE, Conditions("labels", CLASSES)).to(device) for _ in range(2))
    for one in (student, teacher):
        randomise(one)
    frozen = Frozen(teacher, default_teacher_block(teacher.depth))
    batch = Batch(torch.randn(batch_size, *SHAPE, device=device), torch.randint(CLASSES, (batch_size,), device=device))
    d = flow.draw(batch, student.null(batch.cond))

    def guided(mode: Any) -> Way:
        stage2 = dataclasses.replace(config.section(Stage2), range_mode=mode)
        objective = Objective(student, [SelfGuidance(student, frozen, stage2)]).to(device)

        def step() -> None:
            objective.losses(d, 0)[0].backward()
            objective.zero_grad()

        return step

    def vanilla() -> None:
        Objective(student).losses(d, 0)[0].backward()
        student.zero_grad()

    def one_pass() -> Any:
        return frozen(d.zt, d.t, d.cond, d.null)

    def two_passes() -> Any:
        return frozen(d.zt, d.t, d.cond), frozen(d.zt, d.t, d.null)

    def optimiser(fused: bool) -> Way:
        trained = copy.deepcopy(student)
        for parameter in trained.parameters():
            parameter.grad = torch.randn_like(parameter)
        return build_optimizer(trained, config.train).step if fused else torch.optim.AdamW(trained.parameters()).step

    plain_average, average = copy.deepcopy(student), EMA(student, 0.9999)
    return {
        "guidance on the full batch / on the selected samples (forward and backward)": (
            guided("scale"),
            guided("select"),
        ),
        "the latter / no guidance at all": (guided("select"), vanilla),
        "teacher: two passes / both halves in one batch": (two_passes, one_pass),
        "AdamW: as torch builds it / fused": (optimiser(False), optimiser(True)),
        "moving average: tensor by tensor / foreach": (
            lambda: update_ema(plain_average, student, 0.9999),
            lambda: average.update(10**6),
        ),
    }


def measure(chosen: dict[str, tuple[Way, Way]], clock: Clock, rounds: int) -> list[dict[str, Any]]:
    """Time each pair in interleaved rounds; a row of medians for each pair."""
    table = []
    for name, (plain, ours) in chosen.items():
        took = in_turn({"plain": plain, "ours": ours}, clock, rounds)
        ratios = [a / b for a, b in zip(took["plain"], took["ours"], strict=True)]
        medians = {f"{way}_ms": 1e3 * statistics.median(each) for way, each in took.items()}
        table.append({"change": name, **medians, "ratio": statistics.median(ratios)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe(device, "fp32")
    chosen = ways(SiTConfig(name=options.model), options.batch_size, device)
    table = measure(chosen, Clock(device), options.rounds)
    report = {
        "machine": machine | {"load_after": load_average()},
        "model": options.model,
        "batch": options.batch_size,
        "rounds": options.rounds,
        "table": table,
    }
    write_json(options.out / "changes.json", report)
    for row in table:
        print(f"{row['change']:<80}{row['plain_ms']:>10.1f} ms{row['ours_ms']:>10.1f} ms{row['ratio']:>8.3f}")


if __name__ == "__main__":
    main()
