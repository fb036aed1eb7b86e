"""Distances of finished runs when their velocity is changed at sampling, as Contrastive Flow Matching changes it in training.

    python benchmarks/scaled_velocity.py results/times/vanilla-seed0 --features digits --factors 0 0.05 --out scaled.json

Training with `--train.contrastive c` tends to (v - c v_mean) / (1 - c), where v is what flow matching learns and v_mean the
mean velocity of all data (docs/method.md). Here a model that was trained without it gets this velocity at sampling, with each
factor c: "contrastive" is the whole of it, "scaled" is v / (1 - c) alone. So the gain of training can be compared with that of
larger steps of the sampler. For a model that was trained with c, the factor -c / (1 - c) brings v back.
"least squares" is the number by which the velocities would have to be multiplied to be nearest to the true ones.

RUN is a finished run, such as ablations.py makes; its data, sampler and seed are used. Velocities are those of the linear path.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selftrans.checkpoints.load import LoadedModel, load_model
from selftrans.data.decoded import data_latents
from selftrans.experiments.comparison.compared_runs import checkpoints_of
from selftrans.experiments.comparison.measurement import Measurement, measure_samples
from selftrans.methods.objective import Objective
from selftrans.sampling.images import Sampler
from selftrans.storage import write_json
from selftrans.types import Backbone, Batch, Output

KINDS = ("contrastive", "scaled")


def changed(v: Tensor, factor: float, mean: Tensor | None) -> Tensor:
    """(v - c mean) / (1 - c) for velocities v (N, C, *S) and the mean velocity (1, C, *S); None: of zero."""
    return (v if mean is None else v - factor * mean) / (1 - factor)


def least_squares(model: Backbone, z0: Tensor, labels: Tensor) -> float:
    """k for which k v is nearest to the true velocities of latents z0 (N, C, *S), each at one time; fixed times and noise."""
    objective = Objective(model.eval(), times="systematic", drop=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parts = [objective.draw(Batch(z, y)) for z, y in zip(z0.split(500), labels.split(500), strict=True)]
    product = square = 0.0
    for d in parts:
        v = model(d.zt, d.t, d.cond).v
        assert v is not None
        product, square = product + float((v * d.v).sum()), square + float(v.square().sum())
    return product / square


def measured(loaded: LoadedModel, factor: float, mean: Tensor | None, measurement: Measurement) -> dict[str, Any]:
    """Distance and accuracy of a model whose velocity is `changed`."""

    def change(model: Any, inputs: Any, output: Output) -> Output:
        return output if output.v is None else output._replace(v=changed(output.v, factor, mean))

    with loaded.model.register_forward_hook(change):
        sampler = Sampler.of(loaded, measurement.sample, device="cpu", conditioning=measurement.conditioning)
        return measure_samples(list(sampler.sample()), measurement)


@torch.no_grad()
def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", nargs="+", type=int, help="of the checkpoints; default: all")
    parser.add_argument("--features", required=True, help="extractor, by name or file")
    parser.add_argument("--reference", type=Path, help="folder that keeps the statistics of the training data")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    found: list[dict[str, Any]] = []
    data = None
    for run in options.runs:
        for step, folder in checkpoints_of(run):
            if options.steps and step not in options.steps:
                continue
            loaded = load_model(folder)
            if data != loaded.config.data:
                data = loaded.config.data
                measurement = Measurement.of(
                    loaded.config,
                    options.features,
                    weights=None,
                    images=options.images,
                    block=1,
                    kept=options.reference,
                )
                z0, labels = data_latents(measurement.dataset, len(measurement.dataset))
                means = {"contrastive": -z0.mean(dim=0, keepdim=True), "scaled": None}  # noise has mean zero
            fit = {"least squares": least_squares(loaded.model, z0, labels)}
            for factor in options.factors:
                for kind in options.kinds if factor else KINDS[:1]:
                    point = measured(loaded, factor, means[kind], measurement)
                    found.append({"run": str(run), "step": step, "kind": kind, "factor": factor} | point | fit)
                    print(*(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in found[-1].items()), flush=True)
                    write_json(options.out, {"images": options.images, "points": found})


if __name__ == "__main__":
    main()
