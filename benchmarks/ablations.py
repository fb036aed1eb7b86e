"""The ablations behind the defaults: variants of one recipe over seeds, with one table and one set of curves.

    python benchmarks/ablations.py digits --out results/digits --seeds 0 1 2
    python benchmarks/ablations.py cifar10 --data data/cifar10 --out results/cifar10 --variants vanilla w5 w30

    python benchmarks/ablations.py digits --out results/tuned --seeds 0 --variants vanilla \
        --grid train.lr=1e-3,2e-3 model.label_std=0.02,0.5

    python benchmarks/ablations.py digits --out results/repa --variants repa --encoder results/encoder \
        --grid repa.weight=0.05,0.2,0.5

Each variant changes the recipe by dotted overrides (VARIANTS). --set changes it for all of them; with --grid each of them is
run with every combination of the given settings. Where settings allow it, the stage-1 run of the same seed is the teacher. Run
directories are those of `selftrans compare`, so both may use the same --out. Repeat the command to continue.
Writes ablations.json: means and deviations over seeds at the end, and the distance at every measured step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from given_settings import add_set

from selftrans.cli.main import INTERRUPTED
from selftrans.device import load_average
from selftrans.experiments import html_report
from selftrans.experiments.comparison.compare import check_before
from selftrans.experiments.comparison.compared_runs import Comparison
from selftrans.experiments.comparison.comparison_settings import for_method, override, shared_settings
from selftrans.experiments.comparison.finished_runs import finished_runs
from selftrans.experiments.comparison.runner import train_and_measure
from selftrans.experiments.comparison.stopping import Stopped
from selftrans.experiments.comparison.summary import mean_curve, rows
from selftrans.recipes import recipe
from selftrans.storage import lock_file, write_json

#: name -> dotted overrides of the recipe
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {"method": "vanilla"},
    "structure": {"method": "structure"},
    "self_transcendence": {},
    # w, the strength of guidance on the features
    "w1": {"stage2.scale": 1.0},
    "w2": {"stage2.scale": 2.0},
    "w5": {"stage2.scale": 5.0},
    "w10": {"stage2.scale": 10.0},
    "w30": {"stage2.scale": 30.0},
    # the timestep range
    "scale-mode": {"stage2.range_mode": "scale"},
    "all-times": {"stage2.timestep_range": None},
    "uniform-times": {"train.times": "uniform"},
    "vanilla-uniform": {"method": "vanilla", "train.times": "uniform"},
    # the targets
    "layer": {"stage2.target_norm": "layer"},
    "cosine": {"stage2.target_norm": "cosine"},
    "w30-layer": {"stage2.scale": 30.0, "stage2.target_norm": "layer"},
    "w30-cosine": {"stage2.scale": 30.0, "stage2.target_norm": "cosine"},
    "spatial": {"stage2.target_norm": "spatial"},
    "spatial-all": {"stage2.target_norm": "spatial", "stage2.spatial_gamma": 1.0},
    "w30-spatial": {"stage2.scale": 30.0, "stage2.target_norm": "spatial"},
    # the head, and both changes of iREPA
    "conv": {"stage2.head": "conv"},
    "conv-spatial": {"stage2.head": "conv", "stage2.target_norm": "spatial"},
    "w2-conv-spatial": {"stage2.scale": 2.0, "stage2.head": "conv", "stage2.target_norm": "spatial"},
    # the label's part of the target, and a student without the label
    "label-removed": {"stage2.label_part": "remove"},
    "label-decays": {"stage2.label_part": "decay"},
    "w30-label-removed": {"stage2.scale": 30.0, "stage2.label_part": "remove"},
    "null-quarter": {"stage2.null_rows": 0.25},
    "null-half": {"stage2.null_rows": 0.5},
    "null-all": {"stage2.null_rows": 1.0},
    # the guided blocks, and the teacher's
    "blocks-2-3": {"stage2.student_blocks": (2, 3)},
    "blocks-2-3-matched": {"stage2.student_blocks": (2, 3), "stage2.teacher_blocks": (3, 4)},
    "blocks-4-6": {"stage2.student_blocks": (4, 6)},
    # the range of equal signal-to-noise ratio; for pixels that are not standardised: digits 0.75, CIFAR-10 about 0.5
    "std-0.75": {"stage2.data_std": 0.75},
    "std-0.5": {"stage2.data_std": 0.5},
    # the teacher: its training, its weights
    "stage1-200": {"stage1.steps": 200},
    "stage1-400": {"stage1.steps": 400},
    "structure-latent": {"method": "structure", "stage1.target": "latent"},
    "latent": {"stage1.target": "latent"},
    "ema-teacher": {"stage2.teacher_weights": "ema"},
    # a teacher of half the width (of cifar10 in latents, see docs/results/cifar10-latents.md; other sizes by --set)
    "small-teacher": {
        "stage2.teacher_width": 64,
        "stage2.teacher_depth": 4,
        "stage2.teacher_block": 3,
        "stage2.teacher_lr": 4e-3,
    },
    # the end of guidance
    "ends-300": {"stage2.until_step": 300},
    "never-ends": {"stage2.until_step": None},
    "fades-half": {"stage2.fade": 0.5},
    "fades": {"stage2.fade": 1.0},
    # tokens that skip the middle blocks in training
    "route": {"method": "vanilla", "model.route": 0.5},
    "route-quarter": {"method": "vanilla", "model.route": 0.25},
    "w5-route": {"stage2.scale": 5.0, "model.route": 0.5},
    # Contrastive Flow Matching with its published factor
    "contrastive": {"method": "vanilla", "train.contrastive": 0.05},
    # other methods with their published weights (REPA with --encoder, or with features that the data hold), and at a tenth
    "repa": {"method": "repa"},
    "sra": {"method": "sra"},
    "internal": {"method": "internal_guidance"},
    "layersync": {"method": "layersync"},
    "dispersive": {"method": "dispersive"},
    "repa-tenth": {"method": "repa", "repa.weight": 0.05},
    "sra-tenth": {"method": "sra", "sra.weight": 0.05},
    "layersync-tenth": {"method": "layersync", "layersync.weight": 0.02},
    "dispersive-tenth": {"method": "dispersive", "dispersive.weight": 0.05},
}


def with_grid(variants: dict[str, dict[str, Any]], settings: list[str]) -> dict[str, dict[str, Any]]:
    """Every variant with every combination of `settings`, each of the form section.field=value,value (values are json).

    The name of a combination is also that of its folder, so characters such as slashes become _.
    """
    axes = []
    for setting in settings:
        key, _, values = setting.partition("=")
        axes.append([(key, value) for value in values.split(",")])
    return {
        "-".join(
            [name, *(f"{key.split('.')[-1]}={re.sub('[^a-zA-Z0-9_.+-]+', '_', value)}" for key, value in chosen)]
        ): dotted | {key: json.loads(value) for key, value in chosen}
        for name, dotted in variants.items()
        for chosen in itertools.product(*axes)
    }


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", help="prepared data; not needed for digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="all by default; REPA needs --encoder")
    parser.add_argument("--encoder", help="vision model of transformers for REPA, such as benchmarks/encoder.py makes")
    parser.add_argument(
        "--grid", nargs="+", default=[], metavar="SECTION.FIELD=VALUE,VALUE", help="settings to combine"
    )
    add_set(parser, "every variant")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--every", type=int, help="steps between measurements (the end is measured, too); default: a fifth"
    )
    parser.add_argument("--features", help="extractor; not needed for digits")
    parser.add_argument("--workers", type=int)
    options = parser.parse_args(words)
    if options.every is not None and options.every < 1:
        parser.error(f"--every {options.every}: at least one step lies between measurements")
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = options_of(words)
    try:
        # several of these commands may work in one folder, each on variants of its own, but not next to `selftrans compare`
        with lock_file(options.out / ".lock", shared=True):
            run(options)
    except Stopped as stopped:
        print(f"ablations: {stopped}", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(options: argparse.Namespace) -> None:
    """Train and measure the variants, print the table, and write ablations.json."""
    load = load_average()  # of others: nothing is trained here yet
    config = override(recipe(options.recipe), data=options.data, steps=options.steps)
    config = config.override(dict(options.set))
    if options.encoder:
        config = config.override({"repa.encoder": options.encoder})
    chosen = options.variants or [name for name in VARIANTS if options.encoder or not name.startswith("repa")]
    config, features, weights = shared_settings(config, options.out, features=options.features)
    overrides = with_grid({name: VARIANTS[name] for name in chosen}, options.grid)
    variants = {name: for_method(config.override(dotted)).check() for name, dotted in overrides.items()}
    seeds, every = tuple(options.seeds), options.every
    comparison = Comparison(config, variants, seeds, options.out, options.images, features, weights, every=every)
    finished = finished_runs(comparison)
    check_before(comparison, finished)
    results = train_and_measure(comparison, workers=options.workers, finished=finished, load=load)
    table = rows(results, tuple(variants))
    curves = {name: mean_curve(results, name) for name in variants}
    settings = {
        "recipe": options.recipe,
        "seeds": options.seeds,
        "images": options.images,
        "features": features,
        "encoder": options.encoder,
    }
    write_json(options.out / "ablations.json", settings | {"table": table, "curves": curves, "overrides": overrides})
    metric = next(iter(results.values()))[1][-1]["metric"]
    print(html_report.text_table({"table": table, "metric": metric}))
    for name, (steps, values, deviations) in curves.items():
        points = (f"{step}: {v:.2f} ± {d:.2f}" for step, v, d in zip(steps, values, deviations, strict=True))
        print(f"{name:<18}", "   ".join(points))


if __name__ == "__main__":
    sys.exit(main())
