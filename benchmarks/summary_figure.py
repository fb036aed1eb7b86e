"""The figure of docs/results.md, from the numbers in docs/figures: distance over student steps, and over all compute.

    python benchmarks/summary_figure.py --out docs/figures

Writes summary.png: a row for the digits and one for CIFAR-10 in latents, mean and standard deviation over seeds. In the panels
of all compute Self-Transcendence starts with the training of its teacher, stage 1 of the same seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from figures import over_seeds, panels

from selftrans.evaluate.plots import Series, draw_lines, plain_ticks, save

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
STEPS, COMPUTE = "student steps", "TFLOPs in all, the teacher's training included"
Run = dict[str, list[dict[str, float]]]  #: seed -> points with step, distance and the student's tflops


def numbers(name: str) -> dict[str, Any]:
    """The content of docs/figures/<name>.json."""
    found: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def line(run: Run, over: str, teacher: Run | None = None, longer: Run | None = None) -> Series:
    """x, mean and deviation of the distance; `longer` goes on where `run` ends, if x is compute."""
    points, further = list(run.values()), list(longer.values()) if longer else []
    if over == STEPS:
        return over_seeds([point["step"] for point in points[0]], _distances(points))
    before = next(iter(teacher.values()))[-1]["tflops"] if teacher else 0.0
    x, mean, deviation = over_seeds([before + point["tflops"] for point in points[0]], _distances(points))
    if further:
        rest = [[point for point in each if point["tflops"] > x[-1] * (1 + 1e-6)] for each in further]
        more = over_seeds([point["tflops"] for point in rest[0]], _distances(rest))
        x, mean, deviation = ([*a, *b] for a, b in zip((x, mean, deviation), more, strict=True))
    return x, mean, deviation


def _distances(points: list[list[dict[str, float]]]) -> list[list[float]]:
    return [[point["distance"] for point in each] for each in points]


def digits(over: str) -> dict[str, Series]:
    times = numbers("digits-times")
    runs = times["per seed"]
    uniform = {
        seed: [
            {"step": int(step), "distance": value, "tflops": run["total_tflops"] * int(step) / 1000}
            for step, value in run["distance"].items()
        ]
        for seed, run in numbers("digits-six-seeds")["six seeds, published weights"]["vanilla"].items()
    }
    return {
        "vanilla, uniform times": line(uniform, over),
        "vanilla": line(runs["vanilla"], over, longer=times["vanilla, 2,000 steps"]),
        "REPA, weight 1": line(runs["repa"], over),
        "Self-Transcendence, w = 2": line(runs["w2"], over, teacher=runs["structure"]),
    }


def latents(over: str) -> dict[str, Series]:
    found = numbers("cifar10-latents")
    times = found["logit-normal times"]
    runs, longer = times["per seed"], {"0": found["vanilla, 4,000 steps, seed 0"]}
    return {
        "vanilla, uniform times": line(found["per seed"]["vanilla"], over, longer=longer),
        "vanilla": line(runs["vanilla"], over, longer=times["vanilla, 4,000 steps"]),
        "REPA, weight 1": line(runs["repa"], over),
        "Self-Transcendence, weight 2": line(runs["self_transcendence"], over, teacher=runs["structure"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = panels(4, 2, "Fréchet distance (classifier features)", size=(6.0, 4.1), shared=False)
    for row, (title, series) in enumerate((("digits", digits), ("CIFAR-10 in latents", latents))):
        for axis, over in zip(axes[2 * row : 2 * row + 2], (STEPS, COMPUTE), strict=True):
            draw_lines(axis, series(over), logy=True)
            axis.set(xlabel=over, title=title)
            plain_ticks(axis)
            axis.legend(frameon=False, fontsize=8)
    save(figure, options.out / "summary.png")
    print(options.out / "summary.png")


if __name__ == "__main__":
    main()
