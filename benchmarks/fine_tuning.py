"""Fine-tuning against training from scratch: half of the classes to pretrain on, the others to fine-tune on.

    python benchmarks/fine_tuning.py digits --out results/tuned-digits --seeds 0 1 2
    python benchmarks/fine_tuning.py CIFAR10.zip --out results/tuned-cifar10 --patch 4 --batch-size 32 --base-steps 400 \\
        --steps 100 --images 200 --sample-steps 6 --single-stage

A model is trained on the first half of the classes (in alphabetical order), without guidance. Then, on the other half and with
equal steps, seeds, batches and noise: from scratch; all weights from there, at two learning rates; adapters (LoRA); adapters in
both stages, where the base model with the adapters of stage 1 teaches. Distances are those of `selftrans compare`, in the
features of a small classifier of the second half. Repeat the command to continue. Writes fine_tuning.json.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selftrans.data.prepare import prepare
from selftrans.device import load_average
from selftrans.evaluate.classifier import digits
from selftrans.experiments.comparison.compared_runs import Comparison
from selftrans.experiments.comparison.comparison_settings import check_measuring, for_method, shared_settings
from selftrans.experiments.comparison.runner import train_and_measure
from selftrans.experiments.comparison.summary import mean_curve, rows
from selftrans.recipes import recipe
from selftrans.storage import write_json
from selftrans.train.run import train

SCRATCH = "from scratch"
RATE = 0.005  #: of adapters, which take a higher one than all weights (0.001, the recipe's)


def split(source: str, out: Path, side: int | None, most: int) -> list[Path]:
    """Two prepared data sets: the first and the second half of the classes of a zip of class folders, or of the digits."""
    found = []
    for half in (0, 1):
        pictures, data = out / f"pictures-{half}", out / f"data-{half}"
        if not (data / "manifest.json").exists():
            _digits(pictures, half) if source == "digits" else _from_zip(Path(source), pictures, half, most)
            prepare(str(pictures), data, resolution=side)
        found.append(data)
    return found


def _digits(folder: Path, half: int) -> None:
    for k, (scan, label) in enumerate(zip(*digits(), strict=True)):
        if label // 5 == half:
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(scan[..., 0]).save(folder / str(label) / f"{k:04}.png")


def _from_zip(archive: Path, folder: Path, half: int, most: int) -> None:
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.count("/") == 1 and not name.endswith("/"))
        classes = sorted({name.partition("/")[0] for name in names})
        for label in np.array_split(classes, 2)[half]:
            (folder / label).mkdir(parents=True, exist_ok=True)
            for name in [name for name in names if name.startswith(f"{label}/")][:most]:
                (folder / label / Path(name).name).write_bytes(file.read(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a zip of class folders, or digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--side", type=int, help="pictures are resized to this")
    parser.add_argument("--per-class", type=int, default=1000, help="pictures of a class of the zip, at most")
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--sample-steps", type=int, default=12, help="of Heun's method")
    parser.add_argument("--single-stage", action="store_true", help="leave out the run of both stages")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    load = load_average()  # of others: nothing is trained here yet
    first, second = split(options.source, options.out, options.side, options.per_class)
    common: dict[str, Any] = {
        "method": "vanilla",
        "train.batch_size": options.batch_size,
        "log.tensorboard": False,
        "train.ema": 0.99,
        "train.lr": 1e-3,  # what docs/results/fine-tuning.md was measured with, before the recipe's settings were chosen again
        "model.label_std": 0.02,
    }
    common |= {"model.patch": options.patch, "sample.steps": options.sample_steps}
    base, longer = options.out / "base", {"train.steps": options.base_steps, "data.path": str(first)}
    train(for_method(recipe("digits").override(common | longer)).check(), base)
    shared = recipe("digits").override(common | {"train.steps": options.steps, "data.path": str(second)})
    shared, features, weights = shared_settings(shared, options.out)
    check_measuring(shared, features, weights)
    given: dict[str, Any] = {"init.path": str(base)}
    lora = given | {"lora.rank": options.rank, "train.lr": RATE}
    stages = {"stage1.steps": options.steps // 2, "stage2.until_step": options.steps // 2}
    overrides = {
        SCRATCH: {},
        "all weights": given,
        f"all weights, lr {RATE}": given | {"train.lr": RATE},
        f"LoRA, rank {options.rank}": lora,
        f"LoRA, rank {options.rank}, both stages": lora | stages | {"method": "self_transcendence"},
    }
    if options.single_stage:
        del overrides[f"LoRA, rank {options.rank}, both stages"]
    variants = {name: for_method(shared.override(dotted)).check() for name, dotted in overrides.items()}
    chosen = Comparison(shared, variants, tuple(options.seeds), options.out, options.images, features, weights)
    results = train_and_measure(chosen, workers=options.workers, load=load)
    table = rows(results, tuple(variants), SCRATCH)
    curves = {name: mean_curve(results, name) for name in variants}
    sizes = {name: _sizes(chosen.run((name, options.seeds[0]))) for name in variants}
    record = {key: value for key, value in vars(options).items() if key not in ("out", "workers", "source")}
    write_json(options.out / "fine_tuning.json", record | {"table": table, "curves": curves, "sizes": sizes})
    for name, (steps, values, deviations) in curves.items():
        points = (f"{step}: {v:.2f} ± {d:.2f}" for step, v, d in zip(steps, values, deviations, strict=True))
        print(f"{name:<26}", "   ".join(points), sizes[name])


def _sizes(run: Path) -> dict[str, Any]:
    """Bytes of the last checkpoint, and the memory that run.json states for the last stage."""
    report = json.loads((run / "run.json").read_text())
    last = sorted((run / report["order"][-1] / "checkpoints").glob("step-*"))[-1]
    return {"checkpoint": sum(file.stat().st_size for file in last.iterdir()), **report["stages"][-1]["memory"]}


if __name__ == "__main__":
    main()
