"""What products in eight bits do to the loss: the digits recipe's model, trained in fp32, bf16 and bf16 with train.fp8.

    python benchmarks/fp8_loss.py --out fp8 --steps 200 --seeds 0 1 2

All of them have the same initial weights, data and noise. Without a GPU the products are emulated (torchao): the same rounding,
slower. Prints the mean flow loss of the last quarter of the steps, and the difference to bf16, and writes fp8_loss.json; also
the relative error of one block's output and weight gradients at the sizes of SiT-S/2 (random weights).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

from selftrans.methods.objective import Objective
from selftrans.models.sit import SiT
from selftrans.recipes import recipe
from selftrans.storage import write_json
from selftrans.train import fp8
from selftrans.types import Batch, Conditions

ARMS = ("fp32", "bf16", "tensorwise", "rowwise")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    return (images - images.mean()) / images.std(), torch.tensor(raw.target)


def losses(arm: str, seed: int, steps: int, batch: int, device: torch.device) -> list[float]:
    """Flow loss of each step."""
    config = recipe("digits")
    torch.manual_seed(seed)
    student = config.build_model((1, 8, 8), Conditions("labels", 10))
    objective = Objective(student, drop=config.train.drop).to(device)
    fp8.convert(student, arm if arm in ("tensorwise", "rowwise") else "none", device, batch)
    images, labels = (x.to(device) for x in digits())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=config.train.lr, weight_decay=0.0)
    found = []
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(images), (batch,)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=arm != "fp32"):
            loss, report = objective(Batch(images[rows], labels[rows]), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.train.clip)
        optimizer.step()
        found.append(report["flow"])
    return torch.stack(found).tolist()


def errors(scaling: str, device: torch.device) -> dict[str, float]:
    """Relative errors of velocity and gradient of two blocks as wide as SiT-S/2's, against fp32."""
    torch.manual_seed(0)
    plain = SiT((4, 16, 16), 10, width=384, depth=2, heads=6, patch=2, qk_norm=True).to(device)
    for parameter in plain.parameters():  # the published initialisation starts with zero gates: no product would count
        torch.nn.init.normal_(parameter, std=0.05)
    x, t, y = (v.to(device) for v in (torch.randn(4, 4, 16, 16), torch.rand(4), torch.arange(4)))
    out: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for arm in ("fp32", "bf16", scaling):
        model = copy.deepcopy(plain)
        fp8.convert(model, scaling if arm == scaling else "none", device, len(x))
        with torch.autocast(device.type, torch.bfloat16, enabled=arm != "fp32"):
            feature = model(x, t, y, taps=(2,)).feats[2]
        feature.float().square().mean().backward()
        first = [w for name, w in model.named_parameters() if name.endswith("fc1.weight")]
        out[arm] = feature.float().detach(), torch.cat([w.grad.flatten() for w in first if w.grad is not None])
    exact = out["fp32"]
    return {
        f"{arm}/{what}": ((out[arm][i] - exact[i]).norm() / exact[i].norm()).item()
        for arm in ("bf16", scaling)
        for i, what in enumerate(("feature", "gradient"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=ARMS, help="bf16 is compared with, and always run"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="train.fp8 is emulated")
    arms = [arm for arm in ARMS if arm in {"bf16", *options.arms}]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tail = max(1, options.steps // 4)
    found: dict[str, Any] = {"steps": options.steps, "batch": options.batch, "device": device.type, "runs": {}}
    found["errors"] = {scaling: errors(scaling, device) for scaling in ARMS[2:]}
    for scaling, values in found["errors"].items():
        print(scaling, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    for seed in options.seeds:
        for arm in arms:
            started = time.perf_counter()
            curve = losses(arm, seed, options.steps, options.batch, device)
            found["runs"][f"{arm}-seed{seed}"] = curve
            mean = statistics.mean(curve[-tail:])
            print(f"{arm:<12}seed {seed}  {mean:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
            write_json(options.out / "fp8_loss.json", found)
    ends = {arm: [statistics.mean(found["runs"][f"{arm}-seed{s}"][-tail:]) for s in options.seeds] for arm in arms}
    for arm, values in ends.items():
        gaps = [a - b for a, b in zip(values, ends["bf16"], strict=True)]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        print(f"{arm:<12}{statistics.mean(values):.4f}  minus bf16 {statistics.mean(gaps):+.4f} ± {spread:.4f}")
    found["ends"] = ends
    write_json(options.out / "fp8_loss.json", found)


if __name__ == "__main__":
    main()
