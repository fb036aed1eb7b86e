"""CIFAR-10 in minutes of one GPU: every method from scratch, in one process, the most informative comparisons first.

    python benchmarks/evidence_gpu.py cifar10-train.zip --out results/gpu --minutes 8 --encoder results/cifar-encoder

First learning rate and label table are chosen for vanilla training, on short runs (`RATES`, `STDS`). With the best of them each
arm of `ARMS` is trained and measured, in this order: all with seed 0, then all with seed 1, and so on. A student of stage 2 has
the initial weights, data and noise of vanilla with the same seed, so differences are of pairs.

All arms share the process: the data lie on the device, blocks are compiled once, and the averaged weights are measured during
training, without reading a checkpoint. Results are written after every measurement (OUT/evidence_gpu.json); repeat the command
to continue it, on another machine, too: only that file is needed, and an arm that was interrupted elsewhere begins again. Run
folders are in OUT/runs (or --work DIR); those of finished arms are removed but for stage 1, which teaches the arms after it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from given_settings import add_set

from selftrans.checkpoints import format as checkpoint
from selftrans.config import RunConfig
from selftrans.data.dataset import Dataset
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare
from selftrans.encoders.autoencoder import Autoencoder, load_autoencoder
from selftrans.experiments.comparison.comparison_settings import for_method
from selftrans.experiments.comparison.measurement import Measurement, measure_samples, probe
from selftrans.experiments.comparison.summary import spread
from selftrans.experiments.train_classifier import classifier_from_data
from selftrans.flow import PATHS
from selftrans.recipes import recipe
from selftrans.sampling.images import Sampler
from selftrans.storage import write_json
from selftrans.train.interrupted import EXIT_RESUME, Interrupted
from selftrans.train.preview import Attempt
from selftrans.train.processes import accelerator_of
from selftrans.train.run import planned
from selftrans.train.signals import StopSignal
from selftrans.train.teachers import teacher_of, training_cost
from selftrans.train.trainer import Trainer

RATES, STDS = (1e-3, 5e-4, 2e-3), (0.5, 0.02)  #: learning rates and deviations of the label table that are tried
LONGER = 1.5  #: steps of `vanilla-longer`, relative to the others: about the compute of two stages
SHORT, HALF, GUIDED = 0.2, 0.4, 0.6  #: lengths of stage 1 and the end of guidance, relative to the student's steps
BASELINE, STAGE1, TRIAL = "vanilla", "structure", "tune-"


def guided(scale: float, stage1: float = HALF, **more: Any) -> dict[str, Any]:
    """Both stages; `more` are settings of stage 2."""
    stage2 = {f"stage2.{name}": value for name, value in more.items()}
    return {"stage2.scale": scale, "stage1.steps~": stage1, "stage2.until_step~": GUIDED} | stage2


#: name -> dotted overrides; settings whose name ends in "~" are fractions of the student's steps
ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {"method": "vanilla"},
    "structure": {"method": "structure"},
    "w2": guided(2.0),
    "vanilla-longer": {"method": "vanilla", "train.steps~": LONGER},
    "repa": {"method": "repa"},
    "w5": guided(5.0),
    "w5-small": guided(5.0, teacher_width=192, teacher_depth=8, teacher_block=6),  # of half the student's width
    "w2-short": guided(2.0, SHORT),
    "w5-label-removed": guided(5.0, label_part="remove"),
    "sra": {"method": "sra"},
    "layersync": {"method": "layersync"},
    "internal": {"method": "internal_guidance"},
    "w30": guided(30.0),  # as published for ImageNet
    "dispersive": {"method": "dispersive", "dispersive.weight": 0.05},  # a tenth: the published weight harms
}


@dataclass(frozen=True)
class Job:
    """One run: an arm, or a trial of the tuning."""

    name: str
    seed: int
    steps: int  #: of vanilla; an arm may differ
    overrides: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{self.name}-seed{self.seed}"


@dataclass
class Lease:
    """What is shared by all runs of this process, and the results so far."""

    config: RunConfig
    data: Dataset
    measurement: Measurement
    autoencoder: Autoencoder
    out: Path
    work: Path
    every: float  #: interval of measurements, relative to the steps
    stop: Deadline
    results: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        write_json(self.out / "evidence_gpu.json", self.results)


class Deadline(StopSignal):
    """Stops a run at its next step when the time of the lease is over."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end or self.received is not None

    def asked(self, accelerator: Accelerator) -> bool:
        return self.over or super().asked(accelerator)


class Points:
    """Measures the average at intervals; takes the place of the trainer's previews."""

    def __init__(self, lease: Lease, record: dict[str, Any], spent: float) -> None:
        self.lease, self.record, self.spent = lease, record, spent  #: TFLOPs of earlier stages and of the teacher
        self.trainer: Any = None

    def save(self, model: Any, path: Path, *, again: bool = False, attempt: Attempt = lambda make: make()) -> None:
        points, step = self.record["points"], self.trainer.step
        if points and points[-1]["step"] >= step:
            return
        measured, lease = attempt(lambda: lease_measures(model, self.lease)), self.lease
        own = self.trainer.total_flops() / 1e12
        points.append({"step": step, "tflops": own + self.spent, "seconds": self.trainer.seconds, **measured})
        lease.write()
        print(f"{path.parents[2].name} step {step}: distance {measured['distance']:.3f}", flush=True)


def lease_measures(model: Any, lease: Lease) -> dict[str, Any]:
    """Distance, accuracy of the labels and shallow probe of a model as it is, in eval mode."""
    m, path, device = lease.measurement, PATHS[lease.config.train.path], next(model.parameters()).device
    sampler = Sampler(model, lease.autoencoder, m.sample, path, device=device, conditioning=m.conditioning)
    found = measure_samples(list(sampler.sample()), m)
    probed = probe(model, m, path) if model.conditions.num_classes > 1 else None
    return {"distance": found["distance"], "accuracy": found["accuracy"], "probe": probed}


def configured(lease: Lease, job: Job) -> RunConfig:
    """The settings of a job; a teacher of the student's size is the stage-1 arm of the same seed, if that trained as long."""
    dotted = {
        name.removesuffix("~"): max(1, round(value * job.steps)) if name.endswith("~") else value
        for name, value in {"train.steps": job.steps, **job.overrides}.items()
    }
    steps = dotted["train.steps"]
    every = steps if job.name.startswith(TRIAL) else max(1, round(lease.every * job.steps))
    kept = {"train.checkpoint_every": every if job.name == STAGE1 else steps, "train.keep": 0}
    config = lease.config.override({"train.seed": job.seed, "train.preview_every": every, **kept, **dotted})
    taught = lease.work / f"{STAGE1}-seed{job.seed}" / "stage1" / "checkpoints"
    teacher = dict(checkpoint.steps(taught)).get(dotted.get("stage1.steps", -1))
    if teacher is not None and "stage2.teacher_width" not in dotted:
        config = config.override({"stage2.teacher": str(teacher)})
    return for_method(config).check()


def run_job(lease: Lease, accelerator: Accelerator, job: Job) -> bool:
    """Train and measure one job, or continue it; False where the time ran out first."""
    folder, record = lease.work / job.key, lease.results["runs"].setdefault(job.key, {"points": [], "done": False})
    if not folder.exists():  # begun on another machine
        record["points"] = []
    config, plan, _ = planned(configured(lease, job), lease.data, folder, ())
    spent = 0.0
    try:
        for stage in plan:
            teacher = teacher_of(config, stage, str(folder), lease.data, accelerator.device)
            given = training_cost(stage.teacher) if stage.teacher else None
            points = Points(lease, record, spent + (given["tflops"] if given else 0.0)) if stage is plan[-1] else None
            (folder / stage.name).mkdir(parents=True, exist_ok=True)
            parts: dict[str, Any] = {"teacher": teacher, "preview": points, "stop": lease.stop}
            parts["order"] = [each.name for each in plan]
            trainer = Trainer(accelerator, config, stage, folder / stage.name, lease.data, **parts)
            if points:
                points.trainer = trainer
            trainer.run()
            spent += trainer.total_flops() / 1e12
            del trainer, teacher, parts
            release_memory()
    except Interrupted:
        lease.write()
        return False
    record |= {"done": True, "steps": config.train.steps, "method": config.method}
    lease.write()
    if job.name != STAGE1:
        shutil.rmtree(folder)
    return True


def trials(lease: Lease, steps: int) -> list[Job]:
    every = lease.results["settings"]["grid"]
    named = {f"{TRIAL}lr={lr:g}-std={std:g}": {"train.lr": lr, "model.label_std": std} for lr, std in every}
    return [Job(name, 0, steps, {"method": "vanilla"} | dotted) for name, dotted in named.items()]


def run_all(lease: Lease, accelerator: Accelerator, options: argparse.Namespace) -> list[str]:
    """Run the jobs that are not done, until the time is over; returns the keys of those that are left."""
    runs, tuning = lease.results["runs"], trials(lease, options.tune_steps)
    left = _run(lease, accelerator, tuning)
    if not left:
        best = min(tuning, key=lambda job: runs[job.key]["points"][-1]["distance"])
        lease.results["chosen"] = {k: v for k, v in best.overrides.items() if k != "method"}
    chosen = lease.results.get("chosen", {})
    names = [name for name in options.arms if name != "repa" or options.encoder or lease.data.manifest.features]
    jobs = [Job(name, seed, options.steps, chosen | ARMS[name]) for seed in options.seeds for name in names]
    return left + ([job.key for job in jobs] if left else _run(lease, accelerator, jobs))


def _run(lease: Lease, accelerator: Accelerator, jobs: Sequence[Job]) -> list[str]:
    runs = lease.results["runs"]
    todo = [job for job in jobs if not runs.get(job.key, {}).get("done")]
    while todo and not lease.stop.over and run_job(lease, accelerator, todo[0]):
        todo.pop(0)
    return [job.key for job in todo]


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arm by arm: mean and deviation over seeds at the last step, and paired differences to vanilla of the same steps.

    `at_compute` compares with the baseline's longest run of the same seed at equal total compute: log distance, linear in
    TFLOPs between two of its points; left out where it did not train as long.
    """
    done = {key: run for key, run in results["runs"].items() if run["done"] and not key.startswith(TRIAL)}
    names, rows = dict.fromkeys(key.rpartition("-seed")[0] for key in done), []
    for name in names:
        seeds = [int(key.rpartition("-seed")[2]) for key in done if key.rpartition("-seed")[0] == name]
        last = [done[f"{name}-seed{seed}"]["points"][-1] for seed in seeds]
        base = {s: done[f"{BASELINE}-seed{s}"]["points"] for s in seeds if f"{BASELINE}-seed{s}" in done}
        longest = {s: done.get(f"{BASELINE}-longer-seed{s}", {"points": base[s]})["points"] for s in base}
        paired = [(p, base[s][-1], longest[s]) for s, p in zip(seeds, last, strict=True) if s in base]
        at_steps = [p["distance"] - b["distance"] for p, b, _ in paired if p["step"] == b["step"]]
        equal = [p["distance"] - at(points, p["tflops"]) for p, _, points in paired]
        row = {"arm": name, "seeds": seeds, "steps": last[0]["step"], "tflops": last[0]["tflops"]}
        row |= {"distance": mean_and_error([p["distance"] for p in last])}
        row |= {"difference": mean_and_error(at_steps) if name != STAGE1 else None}
        rows.append(row | {"difference_at_compute": mean_and_error([x for x in equal if x == x])})
    return rows


def at(points: Sequence[Mapping[str, float]], tflops: float) -> float:
    """The distance of a run at this compute; NaN outside its points."""
    x, y = [p["tflops"] for p in points], [np.log(p["distance"]) for p in points]
    return float(np.exp(np.interp(tflops, x, y, left=np.nan, right=np.nan)))


def mean_and_error(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, and standard error of the mean where there are several values."""
    found, n = spread(values), len(values)
    return found and {"mean": found["mean"], "error": found["std"] / n**0.5 if n > 1 else None, "n": n}


def prepared(options: argparse.Namespace, device: torch.device) -> tuple[Dataset, str]:
    """The data on the device, and the extractor: a classifier trained on them here, where none is given."""
    source = Path(options.data)
    if not (source / "manifest.json").exists():
        source = options.work / "data"
        prepare(options.data, source, progress=False)
    features = options.features
    if features is None:
        features = str(options.out / "classifier.safetensors")
        if not Path(features).exists():
            print(classifier_from_data(source, Path(features), epochs=8, seed=0), flush=True)
    return OnDevice(Dataset.open(source), device), features


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared data, or what `selftrans prepare` takes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="run folders; OUT/runs by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of this call, everything included")
    parser.add_argument("--steps", type=int, default=1500, help="student steps of an arm")
    parser.add_argument(
        "--tune-steps", type=int, default=300, help="steps of a trial of the tuning, measured at its end"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates of the tuning")
    parser.add_argument(
        "--stds", type=float, nargs="+", default=STDS, help="deviations of the label table of the tuning"
    )
    parser.add_argument("--points", type=int, default=5, help="measurements along an arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--encoder", help="for REPA, as benchmarks/encoder.py makes; None: features that the data hold")
    parser.add_argument("--features", help="extractor: a classifier's file, or a name; trained here by default")
    parser.add_argument("--images", type=int, default=2000, help="samples of a measurement")
    add_set(parser, "every run")
    options = parser.parse_args(arguments)
    options.work = options.work or options.out / "runs"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, started = parsed(arguments), time.monotonic()
    stop = Deadline(60 * options.minutes)
    usual: dict[str, Any] = {"model.name": "SiT-S/4", "train.batch_size": 256, "train.ema": 0.995, "sample.steps": 12}
    usual |= {"log.tensorboard": False, "train.steps": options.steps, "sample.sampler": "heun"}
    if torch.cuda.is_available():
        usual |= {"train.precision": "bf16", "sample.precision": "bf16"}
    given = dict(options.set)
    encoder = {"repa.encoder": options.encoder} if options.encoder else {}
    config = recipe("cifar10").override(usual | given | encoder)
    with stop:
        accelerator = accelerator_of(config, options.out)
        try:
            data, features = prepared(options, accelerator.device)
        except Interrupted as stopped:  # while the classifier was trained
            print(f"evidence_gpu: {stopped}", file=sys.stderr)
            return EXIT_RESUME
        config = config.override({"data.path": str(data.path)})
        measurement = Measurement.of(config, features, weights=None, images=options.images, block=2)
        kept = ("steps", "tune_steps", "points", "encoder", "images")
        settings = {name: getattr(options, name) for name in kept} | {
            "given": given,
            "grid": [[lr, std] for lr in options.rates for std in options.stds],
            "extractor": measurement.extractor.sha256,
        }
        decoder = load_autoencoder(data.manifest.autoencoder, device=accelerator.device, dtype=measurement.decoder)
        lease = Lease(config, data, measurement, decoder, options.out, options.work, 1 / options.points, stop)
        lease.results = earlier_results(options.out / "evidence_gpu.json", settings)
        left = run_all(lease, accelerator, options)
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    lease.results |= {"table": table(lease.results), "left": left}
    lease.results["leases"].append({"device": name, "seconds": round(time.monotonic() - started, 1)})
    lease.write()
    for row in lease.results["table"]:
        found = {"steps": row["difference"], "total compute": row["difference_at_compute"]}
        told = ", ".join(f"{each['mean']:+.3f} at equal {what}" for what, each in found.items() if each)
        print(
            f"{row['arm']:<18} {row['distance']['mean']:8.3f}  {row['tflops']:.3g} TFLOPs  {told and 'to vanilla ' + told}"
        )
    print(f"{len(left)} runs left{': repeat the command to continue' if left else ''}")
    return 0


def earlier_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results of earlier calls, empty for the first. ValueError where they were made with other settings."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        return {"settings": settings, "runs": {}, "leases": []}
    found = json.loads(path.read_text())
    changed = sorted(key for key in settings if found["settings"].get(key) != settings[key])
    if changed:
        raise ValueError(f"{path} holds results of other {', '.join(changed)}; give those, or another --out")
    return dict(found)


if __name__ == "__main__":
    raise SystemExit(main())
