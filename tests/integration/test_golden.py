"""Losses of twenty steps of each stage on real digits, compared with stored numbers.

    python -m tests.integration.test_golden --write        writes tests/integration/golden/losses.json again

A refactoring does not change these numbers. A commit that changes them explains in its message what training does
differently and why.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from selftrans import Batch, Frozen, Objective, SelfGuidance, SiT, Stage1, Stage2, StructureGuidance

FILE = Path(__file__).parent / "golden" / "losses.json"
STEPS, BATCH, GUIDED = 20, 32, 15  # stage 2 is guided for the first 15 steps


def build(seed):
    torch.manual_seed(seed)
    return SiT((1, 8, 8), 10, width=32, depth=4, heads=4, patch=2, qk_norm=True)


def digits():
    raw = load_digits()
    return torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(raw.target)


def train(objective, seed):
    """Losses of each step: {"flow": [...], name of each guidance: [...]}."""
    torch.manual_seed(seed)
    images, labels = digits()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    curves = {}
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        loss, report = objective(Batch(images[rows], labels[rows]), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        for name in report:
            curves.setdefault(name, []).append(float(f"{report[name].item():.6g}"))
    return curves


def losses():
    """vanilla, stage 1, and stage 2 under the stage-1 model."""
    vanilla, shallow, student = (build(seed) for seed in (1, 2, 1))
    found = {"vanilla": train(Objective(vanilla), seed=3)}
    found["stage1"] = train(Objective(shallow, [StructureGuidance(shallow, Stage1(head_width=64))]), seed=4)
    config = Stage2(scale=5.0, until_step=GUIDED, head_width=64)
    found["stage2"] = train(Objective(student, [SelfGuidance(student, Frozen(shallow, 3), config)]), seed=3)
    return found


@pytest.fixture(scope="module")
def now():
    return losses()


@pytest.mark.parametrize("stage", ["vanilla", "stage1", "stage2"])
def test_losses_equal_the_golden_numbers(now, stage):
    golden = json.loads(FILE.read_text())[stage]
    assert list(now[stage]) == list(golden)
    for name, curve in golden.items():
        assert now[stage][name] == pytest.approx(curve, rel=2e-4), f"{name}: explain it, then --write"


def test_golden_numbers_are_plausible(now):
    """Properties that hold without a reference: the loss of a new model, its decrease, and the end of guidance."""
    images, _ = digits()
    for stage, curves in now.items():
        guided = {"vanilla": [], "stage1": ["structure"], "stage2": ["self"]}[stage]
        assert set(curves) == {"flow"} | {
            name + end for name in guided for end in ("", "/feature_norm", "/target_norm")
        }
        assert len(curves["flow"]) == STEPS
        initial = 1 + images[:BATCH].square().mean().item()  # a new model predicts v = 0, and E v² = 1 + E z0²
        assert curves["flow"][0] == pytest.approx(initial, rel=0.1)
        assert sum(curves["flow"][-5:]) < sum(curves["flow"][:5])
    assert len(now["stage2"]["self"]) == GUIDED
    assert now["vanilla"]["flow"][0] == now["stage2"]["flow"][0], "the same student, the same draw"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(losses(), indent=1) + "\n")
    print(f"wrote {FILE}; say in the commit message why the numbers changed")
