"""Does the prompt control the sample? The recipe digits_t2i, trained with several methods, and asked in sentences.

    python benchmarks/text_control.py --out results/digits_t2i --seeds 0 1 2
    python benchmarks/text_control.py --out results/repa --methods repa --encoder results/encoder --set repa.weight=1.0

Trains every method with every seed (the run of stage 1 alone teaches stage 2), samples prompts in the wordings of training and
in reserved ones, and writes control.json: digit accuracy, and the correlation of each attribute asked for with the attribute
measured, with 95 % intervals of a bootstrap over images. Also samples.png. Repeat the command to continue; several processes
may each make some of the seeds first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from given_settings import add_set
from matplotlib.figure import Figure
from prompt_control import WORDINGS, Measured, PromptControl, Scans, pooled, summary
from tqdm import tqdm

from selftrans.checkpoints.load import load_model
from selftrans.config import RunConfig
from selftrans.data.sources.digit_attributes import ATTRIBUTES
from selftrans.encoders.text import encoder_of
from selftrans.evaluate.extractors import load_extractor
from selftrans.evaluate.plots import pca_grid, save
from selftrans.experiments.comparison.compared_runs import Comparison, checkpoints_of
from selftrans.experiments.comparison.comparison_settings import check_measuring, for_method, override, shared_settings
from selftrans.experiments.comparison.worker import train_one
from selftrans.recipes import recipe
from selftrans.sampling.conditioning import PromptConditioning
from selftrans.sampling.images import Sampler
from selftrans.storage import write_json

METHODS = ("vanilla", "structure", "self_transcendence")  #: of the recipe; a teacher before the run that it teaches
OTHERS = ("repa", "sra", "layersync")  #: with --methods
#: prompts of the picture, in pairs with the same noise; the last pair is in words that are never trained on
SHOWN = (
    "a thin three",
    "a thick three",
    "a seven, leaning left",
    "a seven, leaning right",
    "a small eight",
    "a large eight",
    "a zero, on the left",
    "a zero, on the right",
    "a handwritten 4, near the top",
    "a handwritten 4, near the bottom",
    "draw a slender numeral seven, tilted to the left",
    "draw a bold numeral seven, tilted to the right",
)
COLUMNS = 12  #: samples of each
POINTS = (1, 4)  #: of the five checkpoints of a run, those that are measured: after 2/5 and all of its steps


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS + OTHERS)
    parser.add_argument("--encoder", help="vision model of transformers for REPA, such as benchmarks/encoder.py makes")
    add_set(parser, "every method")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--along", type=float, default=2.0, help="scale at which checkpoints along a run are measured")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(words)
    if "repa" in options.methods and not options.encoder:
        parser.error("repa needs --encoder, a vision model such as benchmarks/encoder.py makes")
    return options


def settings_of(options: argparse.Namespace) -> RunConfig:
    """The recipe with the options' settings, and heads of the other methods as wide as its own."""
    config = override(recipe("digits_t2i"), steps=options.steps)
    config = config.override({"repa.head_width": 128, "sra.head_width": 128, "repa.encoder": options.encoder})
    return config.override(dict(options.set))


def main() -> None:
    options = options_of()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = settings_of(options)
    config, features, weights = shared_settings(config, options.out)
    check_measuring(config, features, weights)
    variants = {name: for_method(config, name).check() for name in METHODS + OTHERS if name in options.methods}
    chosen = Comparison(config, variants, tuple(options.seeds), options.out, options.images, features, weights)
    scans = Scans(load_extractor("digits", weights=weights))
    control = PromptControl(scans, options.out / "measured", images=options.images)
    for job in chosen.jobs:
        with tqdm(total=config.train.steps, desc=f"{job[0]} seed {job[1]}", unit="step") as bar:
            train_one(chosen, job, bar.update)
        measure(control, chosen.run(job), options.scales, options.along)
    report = {
        "scans": summary(scans.bound()),
        "final": final(control, chosen, options.scales),
        "along": along(control, chosen, options.along),
        "cost": {chosen.run(job).name: json.loads((chosen.run(job) / "run.json").read_text()) for job in chosen.jobs},
        "seeds": options.seeds,
        "steps": config.train.steps,
        "extractor_sha256": scans.extractor.sha256,
    }
    write_json(options.out / "control.json", report)
    last = chosen.jobs[-1]
    save(picture(chosen.run(last), options.along), options.out / "samples.png")
    print(as_text(report))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's last stage that are measured, oldest first."""
    held = checkpoints_of(run)
    return [held[k][1] for k in POINTS if k < len(held)]


def measure(control: PromptControl, run: Path, scales: list[float], along: float) -> None:
    """Sample and measure a run; what was measured before is kept."""
    for wording in WORDINGS:
        for scale in tqdm(scales, f"{run.name}, {wording} wording", unit="scale"):
            control.measure(run, wording, scale)
    for folder in tqdm(checkpoints(run), f"{run.name}, along the run"):
        control.measure(folder, "trained", along)


def final(control: PromptControl, chosen: Comparison, scales: list[float]) -> list[dict[str, Any]]:
    """A row per method, wording and scale: of the images of all seeds together, and of each seed."""
    rows = []
    for wording in WORDINGS:
        for scale in scales:
            for name in chosen.variants:
                found = [control.measure(chosen.run((name, seed)), wording, scale) for seed in chosen.seeds]
                rows.append({"method": name, "wording": wording, "scale": scale} | _of_seeds(found))
    return rows


def along(control: PromptControl, chosen: Comparison, scale: float) -> list[dict[str, Any]]:
    """A row per method and measured checkpoint, in the wording of training."""
    rows = []
    for name in chosen.variants:
        of_seeds = zip(*(checkpoints(chosen.run((name, seed))) for seed in chosen.seeds), strict=True)
        for folders in of_seeds:
            found = [control.measure(folder, "trained", scale) for folder in folders]
            rows.append({"method": name, "step": found[0][1]["step"], "scale": scale} | _of_seeds(found))
    return rows


def _of_seeds(found: list[tuple[Measured, dict[str, Any]]]) -> dict[str, Any]:
    record = {key: found[0][1][key] for key in ("sampler", "steps", "seed")}
    each = [summary(measured) for measured, _ in found]
    return {
        **summary(pooled([measured for measured, _ in found])),
        "distance": [record["distance"] for _, record in found],
        "of_seeds": [{"digit": s["digit"][0]} | {name: s[name]["pearson"][0] for name in ATTRIBUTES} for s in each],
        "sampling": record,
    }


def picture(run: Path, scale: float) -> Figure:
    """Prompts and their samples; a column has the same noise in every row."""
    loaded = load_model(run)
    settings = replace(loaded.config.sample, guidance_scale=scale, num=COLUMNS, seed=1)
    encoder = encoder_of(loaded.model.conditions)
    rows = {}
    for prompt in SHOWN:
        sampler = Sampler.of(loaded, settings, conditioning=PromptConditioning([prompt], encoder))
        rows[prompt] = np.concatenate([batch.images for batch in sampler.sample()])
    return pca_grid(rows, cell=0.5)


def as_text(report: dict[str, Any]) -> str:
    """The table in Markdown: correlations are Pearson's."""
    lines = [
        "| wording | scale | method | digit | " + " | ".join(ATTRIBUTES) + " | distance |",
        "|" + "---|" * (5 + len(ATTRIBUTES)),
    ]
    for row in [{"wording": "scans", "scale": "", "method": "", **report["scans"]}, *report["final"]]:
        numbers = [row["digit"], *(row[name]["pearson"] for name in ATTRIBUTES)]
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in numbers]
        distance = f"{np.mean(row['distance']):.1f}" if "distance" in row else ""
        lines.append("| " + " | ".join([row["wording"], str(row["scale"]), row["method"], *cells, distance]) + " |")
    for row in report["along"]:
        numbers = [row["digit"][0], *(row[name]["pearson"][0] for name in ATTRIBUTES), np.mean(row["distance"])]
        lines.append(f"{row['method']} {row['step']}: " + " ".join(f"{value:.3f}" for value in numbers))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
