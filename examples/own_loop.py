"""Your own training loop: Self-Transcendence on handwritten digits with plain PyTorch, then samples.

Run it with `python examples/own_loop.py`; it takes less than a minute on two CPU cores. Recipes and commands
(`selftrans train digits`) do the same with checkpoints, averaged weights and previews.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from selftrans import Batch, Frozen, Objective, SelfGuidance, SiT, Stage1, Stage2, StructureGuidance, guided, ode

SIZES = {"width": 64, "depth": 6, "heads": 2, "patch": 2}


def fit(name: str, objective: Objective, latents: torch.Tensor, labels: torch.Tensor, steps: int) -> list[float]:
    """Train the student and the heads of an objective; returns the flow losses."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(latents), (64,))
        loss, report = objective(Batch(latents[rows], labels[rows]), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(report["flow"]))
        if step % 25 == 0:
            print(f"{name}  step {step:3d}  " + "  ".join(f"{key} {float(value):.3f}" for key, value in report.items()))
    return losses


def main(steps: int = 200) -> tuple[list[float], torch.Tensor]:
    """Both stages; returns the student's flow losses and ten samples (10, 1, 8, 8), one of each digit."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    latents = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # in [-1, 1]
    labels = torch.tensor(digits)

    teacher = SiT((1, 8, 8), 10, **SIZES)
    fit("stage 1", Objective(teacher, [StructureGuidance(teacher, Stage1(head_width=128))]), latents, labels, steps)
    student = SiT((1, 8, 8), 10, **SIZES)
    guidance = SelfGuidance(student, Frozen(teacher, block=4), Stage2(scale=5, head_width=128))
    losses = fit("stage 2", Objective(student, [guidance]), latents, labels, steps)

    velocity = guided(student.eval(), torch.arange(10), scale=1.5)
    with torch.inference_mode():
        samples = ode(velocity, torch.randn(10, 1, 8, 8), steps=12, method="heun")
    print(f"ten samples, values from {samples.min():.2f} to {samples.max():.2f} (data: -1 to 1)")
    return losses, samples


if __name__ == "__main__":
    main()
