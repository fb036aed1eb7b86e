"""What the settings of the recipe `digits` were chosen by: variants of stage 2 over seeds, one table.

    python benchmarks/tune_digits.py --out tuning --seeds 0 1 2 --variants w2 w5 w10

Each variant changes the recipe's stage 2 as VARIANTS says; all of them are taught by the same stage-1 run of their seed.
Writes table.json (means and deviations over seeds at the end) and curves.json (distance at every measured step).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from selftrans import report
from selftrans.compare import Comparison, compare, mean_curve, rows
from selftrans.data.encode import prepare_digits
from selftrans.evaluate.features import load_extractor
from selftrans.recipes.digits import digits

VARIANTS: dict[str, dict[str, Any]] = {
    "w1": {"scale": 1.0},
    "w2": {"scale": 2.0},
    "w5": {"scale": 5.0},
    "w10": {"scale": 10.0},
    "w30": {"scale": 30.0},
    "w30-layer": {"scale": 30.0, "target_norm": "layer"},
    "w5-layer": {"scale": 5.0, "target_norm": "layer"},
    "w5-cosine": {"scale": 5.0, "target_norm": "cosine"},
    "w5-weight1": {"scale": 5.0, "weight": 1.0},
    "w5-to-the-end": {"scale": 5.0, "until_step": None},
    "w5-scale-mode": {"scale": 5.0, "range_mode": "scale"},
    "w5-block2": {"scale": 5.0, "student_block": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    prepare_digits(options.out / "data")
    classifier = options.out / "digits-classifier.safetensors"
    load_extractor("digits", weights=classifier)
    base = digits()
    train = dataclasses.replace(base.train, steps=options.steps or base.train.steps)
    base = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, path=str(options.out / "data")),
        stage1=dataclasses.replace(base.stage1, steps=train.steps),
        train=train,
    )
    configs = {name: dataclasses.replace(base, method=name) for name in ("vanilla", "structure")}
    for name in options.variants:
        configs[name] = dataclasses.replace(base, stage2=dataclasses.replace(base.stage2, **VARIANTS[name]))
    chosen = Comparison(configs, tuple(options.seeds), options.out, options.images, "digits", str(classifier))
    results = compare(chosen)
    table = rows(results, tuple(configs))
    curves = {name: mean_curve([m for (n, _), (_, m) in results.items() if n == name]) for name in configs}
    (options.out / "table.json").write_text(json.dumps(table, indent=2))
    (options.out / "curves.json").write_text(json.dumps(curves, indent=2))
    print(report.text_table(table, {name: name for name in configs}, "Fréchet distance (digits classifier features)"))
    for name, (steps, values, deviations) in curves.items():
        points = (f"{step}: {v:.2f} ± {d:.2f}" for step, v, d in zip(steps, values, deviations, strict=True))
        print(f"{name:<14}", "   ".join(points))


if __name__ == "__main__":
    main()
