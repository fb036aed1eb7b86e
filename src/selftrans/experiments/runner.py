"""Variants trained in worker processes and measured alike: the same data, seeds, sampler and metric; resumable.

Every run is an ordinary run directory `OUT/<method>-seed<k>`. Its checkpoints are the points of its curve; each point is
measured once and kept in the run's `measured.json`.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, load_model
from selftrans.config import RunConfig, SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents, decoded_images
from selftrans.device import default_device
from selftrans.evaluate.extractors import Extractor, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.probes import collect, linear_probe
from selftrans.evaluate.statistics import Statistics
from selftrans.flow import PATHS
from selftrans.methods.registry import stages
from selftrans.methods.spec import Stage
from selftrans.plugins import trust_named
from selftrans.sampling.images import Sampler
from selftrans.sampling.samplers import EVALUATIONS
from selftrans.sections import Section, fields_of
from selftrans.storage import write_json
from selftrans.train.log import progress_bar
from selftrans.train.run import train

POINTS = 5  #: measurements along a run
PROBE_T = 0.4  #: noise level of the linear probe, the paper's
PROBED_BLOCK = 2  #: the block that stage 1 guides in every published setting

Result: TypeAlias = tuple[dict[str, Any], list[dict[str, Any]]]  #: run.json, and the measured points
Job: TypeAlias = tuple[str, int]  #: name of a variant, seed
Results: TypeAlias = dict[Job, Result]


@dataclass(frozen=True)
class Comparison:
    """What is compared, and with what it is measured."""

    shared: RunConfig  #: what all variants share: data, steps, batch, sampler, the probed shallow block
    variants: dict[str, RunConfig]  #: by name; `method` is part of each
    seeds: tuple[int, ...]
    out: Path  #: holds everything
    images: int  #: samples for each distance
    features: str  #: extractor, by name or file
    weights: str | None = None  #: where a named extractor is kept
    block: int = PROBED_BLOCK  #: the shallow block whose features are probed (1-based)

    @property
    def jobs(self) -> list[Job]:
        return [(name, seed) for seed in self.seeds for name in self.variants]

    @property
    def total(self) -> int:
        """Cost of the comparison, in training steps."""
        steps = self.shared.train.steps
        return len(self.jobs) * (steps + points(steps) * measuring_cost(self.shared, self.images))

    def run(self, job: Job) -> Path:
        return self.out / f"{job[0]}-seed{job[1]}"

    def teacher(self, job: Job) -> Job | None:
        """The job whose stage 1 can teach this one: a run of stage 1 alone under the same stage-1 settings and seed."""
        name, seed = job
        wanted = _own_teacher(self.variants[name])
        if wanted is None:
            return None
        same = (n for n, c in self.variants.items() if n != name and _trains(c, wanted, self.variants[name]))
        return next(((n, seed) for n in same), None)


def _own_teacher(config: RunConfig) -> Stage | None:
    """The stage that a run would train first to teach its last one; None where there is none, or a teacher is given."""
    plan = stages(config)
    wanted = next((s.teacher for s in plan if s.teacher), None)
    return None if wanted is None or wanted.given else next((s for s in plan if s.name == wanted.stage), None)


def _trains(other: RunConfig, wanted: Stage, taught: RunConfig) -> bool:
    """Whether another run consists of this stage alone, and passes a checkpoint of it that is the same bit for bit."""
    plan = stages(other)
    if [stage.name for stage in plan] != [wanted.name] or plan[0].stream != wanted.stream:
        return False
    total = other.train.steps
    held = wanted.steps == total or wanted.steps % interval(total) == 0 < total - wanted.steps
    same = all(_acting(other.section(kind)) == _acting(taught.section(kind)) for kind in wanted.sections)
    return held and same and (other.model, other.train) == (taught.model, taught.train)


def _acting(section: Section) -> dict[str, Any]:
    """Settings that a step depends on: all but the lengths of stages."""
    return {name: value for name, value, _, length in fields_of(section) if not length}


@dataclass(frozen=True)
class Measurement:
    """How a process measures checkpoints."""

    extractor: Extractor
    reference: Statistics
    shards: Dataset
    sample: SampleConfig  #: how many images, and how
    block: int  #: the shallow block that is probed (1-based)

    @classmethod
    def of(cls, comparison: Comparison) -> Measurement:
        """Distances to the training data, on the device at hand."""
        path = comparison.shared.data.path
        assert path is not None
        shards, device = Dataset.open(path), default_device()
        # `values` keeps the shape of the latents: an autoencoder of arrays that are no pictures changes none
        extractor = load_extractor(
            comparison.features, weights=comparison.weights, device=device, shape=shards.manifest.shape
        )
        images = decoded_images(shards, device=device)
        reference = Statistics.of(images, extractor, source="training data", keep=False)
        sample = dataclasses.replace(comparison.shared.sample, num=comparison.images, batch_size=500)
        return cls(extractor, reference, shards, sample, comparison.block)

    @property
    def identity(self) -> dict[str, Any]:
        """What two measured points must share to be comparable, as json has it."""
        return {
            "sampler": json.loads(json.dumps(self.sample.settings())),
            "images": self.sample.num,
            "extractor_sha256": self.extractor.sha256,
            "block": self.block,
        }


#: called with the number of training steps done, or their equivalent in measuring
Progress = Callable[[int], object]


class StepBar:
    """Takes the place of a run's progress bar, and passes its steps on to the bar of the comparison."""

    def __init__(self, progress: Progress, initial: int) -> None:
        self.progress = progress
        progress(initial)

    def update(self, steps: int = 1) -> None:
        self.progress(steps)

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """The comparison's bar shows no losses."""

    def close(self) -> None:
        """The comparison's bar stays open."""


def measuring_cost(config: RunConfig, images: int) -> int:
    """What measuring one checkpoint costs, in training steps (a step is three forward passes of its batch)."""
    passes = config.sample.steps * EVALUATIONS[config.sample.sampler] * images / config.train.batch_size
    return max(1, round(passes / 3))


def interval(steps: int) -> int:
    """Steps between two measurements."""
    return max(1, steps // POINTS)


def points(steps: int) -> int:
    """Number of measurements of a run of `steps`: every interval, and the end."""
    return -(-steps // interval(steps))


def compare(comparison: Comparison, *, workers: int | None = None) -> Results:
    """Train and measure every variant with every seed: (name, seed) -> (run.json, measured points, oldest first).

    `workers` processes run at the same time (None: one per core, one on a GPU). Repeating the call continues it.
    """
    jobs = comparison.jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(jobs), workers or (1 if torch.cuda.is_available() else cores))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning slow each other down
    with progress_bar(total=comparison.total, unit="step", desc="training and measuring") as bar:
        done = _in_workers(comparison, workers, max(1, cores // workers), bar)
    return {job: done[job] for job in jobs}


def _teachers_first(comparison: Comparison) -> list[Job]:
    return sorted(comparison.jobs, key=lambda job: comparison.teacher(job) is not None)


def train_and_measure(comparison: Comparison, job: Job, measurement: Measurement, progress: Progress) -> Result:
    """One variant with one seed: trained, then measured at every checkpoint."""
    run = train_one(comparison, job, progress)
    cost = measuring_cost(comparison.shared, comparison.images)
    return json.loads((run / "run.json").read_text()), measure_run(run, measurement, progress, cost)


def _in_workers(comparison: Comparison, workers: int, threads: int, bar: Any) -> Results:
    """Run the jobs in worker processes; a job that needs another's teacher starts after that has finished."""
    context = multiprocessing.get_context("spawn")
    done: Results = {}
    steps_done = context.SimpleQueue()
    shared = (comparison, threads, steps_done, warnings.showwarning)
    with ProcessPoolExecutor(workers, context, _init_worker, shared) as pool:
        waiting, running = _teachers_first(comparison), dict[Future[Result], Job]()
        try:
            while waiting or running:
                for job in [job for job in waiting if comparison.teacher(job) in {None, *done}]:
                    waiting.remove(job)
                    running[pool.submit(_run_job, job)] = job
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not steps_done.empty():
                    bar.update(steps_done.get())
                for future in finished:
                    done[running.pop(future)] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # running jobs write a checkpoint and end; no other job starts
            raise
    return done


def _init_worker(comparison: Comparison, threads: int, steps_done: Any, show_warning: Any) -> None:
    """In a new worker: what its jobs share, and how the parent process shows warnings."""
    warnings.showwarning = show_warning
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    for config in comparison.variants.values():  # this process knows nothing of what the parent was allowed to import
        trust_named(config.method, config.model.name)
    _worker.update(comparison=comparison, measurement=Measurement.of(comparison), progress=steps_done.put)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: else it would train on unnoticed. Runs survive an end at any moment."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_worker: dict[str, Any] = {}  #: of this process, set by `_init_worker`


def _run_job(job: Job) -> Result:
    return train_and_measure(_worker["comparison"], job, _worker["measurement"], _worker["progress"])


def train_one(comparison: Comparison, job: Job, progress: Progress) -> Path:
    """Train one variant with one seed, or continue it, with a checkpoint at every point; returns its run directory."""
    config, run, teacher = comparison.variants[job[0]], comparison.run(job), comparison.teacher(job)
    every = interval(config.train.steps)
    settings = dataclasses.replace(config.train, seed=job[1], checkpoint_every=every, keep=0, preview_every=0)
    config = dataclasses.replace(config, train=settings)
    if teacher is not None:
        wanted, taught = _own_teacher(config), next(s.teacher for s in stages(config) if s.teacher)
        assert wanted is not None
        held = dict(checkpoint.steps(comparison.run(teacher) / wanted.name / "checkpoints"))
        if wanted.steps in held:  # not in a run that was first made shorter, with checkpoints elsewhere
            config = config.override({taught.option: str(held[wanted.steps])})
    train(config, run, bar=lambda **options: StepBar(progress, options["initial"]), quiet=True)
    return run


def measure_run(run: Path, measurement: Measurement, progress: Progress, cost: int) -> list[dict[str, Any]]:
    """Measured points of a run's last stage, oldest first; those measured before are read, not measured again."""
    stage = json.loads((run / "run.json").read_text())["stages"][-1]["stage"]
    path = run / "measured.json"
    known = measured_before(path, measurement)
    entries = []
    held = checkpoint.steps(run / stage / "checkpoints")
    due = [folder for step, folder in held if step % interval(held[-1][0]) == 0 or step == held[-1][0]]
    for folder in due:  # an interruption leaves a checkpoint at another step, which is no point of the curve
        digest = checkpoint.read(folder).state["sha256"][FILES["ema"]]
        entries.append(known.get(digest) or measure_checkpoint(folder, measurement) | {"sha256": digest})
        progress(cost)
        write_json(path, entries)
    return entries


def measured_before(path: Path, measurement: Measurement) -> dict[str, dict[str, Any]]:
    """Points that were measured in the same way, by the hash of their weights; none for a missing or damaged file."""
    same = measurement.identity.items()
    try:
        return {entry["sha256"]: entry for entry in json.loads(path.read_text()) if same <= entry.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def measure_checkpoint(folder: Path, measurement: Measurement) -> dict[str, Any]:
    """Distance, accuracy and shallow probe of a checkpoint's EMA, and what training has cost up to it."""
    loaded, device = load_model(folder, weights="ema"), default_device()
    classes = loaded.model.conditions.num_classes
    path = PATHS[loaded.config.train.path]
    # first: a sampler casts and compiles the model in place
    probed = probe(loaded.model.to(device), measurement, path) if classes > 1 else None
    batches = list(Sampler.of(loaded, measurement.sample, device=device).sample())
    labels = np.concatenate([batch.labels for batch in batches])
    images = (batch.images for batch in batches)
    metrics = ("frechet", "accuracy") if classes > 1 and measurement.extractor.pictures else ("frechet",)
    report = evaluate(images, measurement.reference, measurement.extractor, labels=labels, metrics=metrics)
    spent = checkpoint.read_header(folder / FILES["ema"])
    return {
        "step": loaded.step,
        "seconds": spent["seconds"],
        "tflops": spent["tflops"],
        "metric": report["label"],
        "distance": report[report["metric"]],
        "accuracy": report.get("accuracy"),
        "probe": probed,
    } | measurement.identity


def probe(model: Any, measurement: Measurement, path: Any, most: int = 4000) -> float:
    """Accuracy of a linear classifier on the shallow block's features at t = 0.4, under the null condition."""
    z0, labels = data_latents(measurement.shards, most)
    feats = collect(model, z0, model.null(labels), t=PROBE_T, taps=(measurement.block,), path=path)
    return linear_probe(feats[measurement.block].to(default_device()), labels, kind="ridge")


def samples_of(run: Path, sample: SampleConfig, num: int) -> np.ndarray:
    """Images 0 .. num - 1 of a finished run: the same noise and conditions for every method."""
    settings = dataclasses.replace(sample, num=num, seed=1, batch_size=num)
    return np.concatenate([batch.images for batch in Sampler.of(load_model(run), settings).sample()])
