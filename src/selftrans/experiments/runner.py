"""Methods side by side: the same model, data, seeds, sampler and metric for each; resumable.

Every run is an ordinary run directory `OUT/<method>-seed<k>`, its checkpoints are the points of its curve, and each
point is measured once and kept in `measured.json` beside them. Shape legend: n images, (R, R, C) uint8 image.
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
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate.extractors import Extractor, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.probes import collect, linear_probe
from selftrans.evaluate.statistics import Statistics
from selftrans.experiments.analyse_run import data_latents, shard_images
from selftrans.flow import PATHS
from selftrans.methods.registry import stages
from selftrans.methods.spec import Stage
from selftrans.sampling.samplers import EVALUATIONS, sample_images
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

    shared: RunConfig  #: what all variants have in common: data, steps, batch, sampler, the probed shallow block
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
        """All the work, in training steps."""
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
class Ruler:
    """What one process measures with."""

    extractor: Extractor
    reference: Statistics
    shards: Dataset
    sample: SampleConfig  #: how many images, and how
    block: int  #: the shallow block that is probed (1-based)

    @classmethod
    def of(cls, comparison: Comparison) -> Ruler:
        """Measure against the data themselves."""
        path = comparison.shared.data.path
        assert path is not None
        shards = Dataset.open(path)
        extractor = load_extractor(comparison.features, weights=comparison.weights)
        reference = Statistics.of(shard_images(shards), extractor, source="training data", keep=False)
        sample = dataclasses.replace(comparison.shared.sample, num=comparison.images, batch_size=500)
        return cls(extractor, reference, shards, sample, comparison.block)

    @property
    def marks(self) -> dict[str, Any]:
        """What makes two measured points comparable, as json has it."""
        return {
            "sampler": json.loads(json.dumps(self.sample.settings())),
            "images": self.sample.num,
            "extractor_sha256": self.extractor.sha256,
            "block": self.block,
        }


#: called with how many steps' worth of work has been done
Tell = Callable[[int], object]


class StepBar:
    """Stands in for a run's own bar: passes its steps on to the bar of the whole."""

    def __init__(self, tell: Tell, initial: int) -> None:
        self.tell = tell
        tell(initial)

    def update(self, steps: int = 1) -> None:
        self.tell(steps)

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """The bar of the whole shows no losses."""

    def close(self) -> None:
        """The bar of the whole stays open."""


def measuring_cost(config: RunConfig, images: int) -> int:
    """What measuring one checkpoint costs, in training steps (a step is three forward passes of its batch)."""
    passes = config.sample.steps * EVALUATIONS[config.sample.sampler] * images / config.train.batch_size
    return max(1, round(passes / 3))


def interval(steps: int) -> int:
    """Steps between two measurements."""
    return max(1, steps // POINTS)


def points(steps: int) -> int:
    """How many measurements a run of `steps` gets: every interval, and the end."""
    return -(-steps // interval(steps))


def compare(comparison: Comparison, *, workers: int | None = None) -> Results:
    """Train and measure every variant with every seed: (name, seed) -> (run.json, measured points, oldest first).

    `workers` processes work side by side (None: one per core, one on a GPU). Repeating the call continues it.
    """
    jobs, cores = (
        comparison.jobs,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    workers = min(len(jobs), workers or (1 if torch.cuda.is_available() else cores))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve each other
    with progress_bar(total=comparison.total, unit="step", desc="training and measuring") as bar:
        done = _in_workers(comparison, workers, max(1, cores // workers), bar)
    return {job: done[job] for job in jobs}


def _teachers_first(comparison: Comparison) -> list[Job]:
    return sorted(comparison.jobs, key=lambda job: comparison.teacher(job) is not None)


def work(comparison: Comparison, job: Job, ruler: Ruler, tell: Tell) -> Result:
    """One variant with one seed: trained, then measured at every checkpoint."""
    run = train_one(comparison, job, tell)
    cost = measuring_cost(comparison.shared, comparison.images)
    return json.loads((run / "run.json").read_text()), measure_run(run, ruler, tell, cost)


def _in_workers(comparison: Comparison, workers: int, threads: int, bar: Any) -> Results:
    """The jobs in processes of their own; one that wants another's teacher waits for it."""
    context = multiprocessing.get_context("spawn")
    done: Results = {}
    told = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _begin, (comparison, threads, told, warnings.showwarning)) as pool:
        waiting, running = _teachers_first(comparison), dict[Future[Result], Job]()
        try:
            while waiting or running:
                for job in [job for job in waiting if comparison.teacher(job) in {None, *done}]:
                    waiting.remove(job)
                    running[pool.submit(_work, job)] = job
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not told.empty():
                    bar.update(told.get())
                for future in finished:
                    done[running.pop(future)] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has begun writes its checkpoint; nothing else begins
            raise
    return done


def _begin(comparison: Comparison, threads: int, told: Any, show: Any) -> None:
    """In a new worker: what its jobs share, and how its parent shows warnings."""
    warnings.showwarning = show
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(comparison=comparison, ruler=Ruler.of(comparison), tell=told.put)


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on unseen; runs survive an end at any moment."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_worker: dict[str, Any] = {}  #: of this process, filled by `_begin`


def _work(job: Job) -> Result:
    return work(_worker["comparison"], job, _worker["ruler"], _worker["tell"])


def train_one(comparison: Comparison, job: Job, tell: Tell) -> Path:
    """Train one variant with one seed (or continue it), every point a checkpoint; returns its run directory."""
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
    train(config, run, bar=lambda **options: StepBar(tell, options["initial"]), quiet=True)
    return run


def measure_run(run: Path, ruler: Ruler, tell: Tell, cost: int) -> list[dict[str, Any]]:
    """Every checkpoint of a run's last stage measured, oldest first; what was measured before is read, not repeated."""
    stage = json.loads((run / "run.json").read_text())["stages"][-1]["stage"]
    path = run / "measured.json"
    known = measured_before(path, ruler)
    entries = []
    held = checkpoint.steps(run / stage / "checkpoints")
    due = [folder for step, folder in held if step % interval(held[-1][0]) == 0 or step == held[-1][0]]
    for folder in due:  # an interruption leaves a checkpoint of its own, which is no point of the curve
        digest = checkpoint.read(folder).state["sha256"][FILES["ema"]]
        entries.append(known.get(digest) or measure_checkpoint(folder, ruler) | {"sha256": digest})
        tell(cost)
        write_json(path, entries)
    return entries


def measured_before(path: Path, ruler: Ruler) -> dict[str, dict[str, Any]]:
    """Points measured with the same ruler, by the hash of their weights; none where the file is missing or damaged."""
    same = ruler.marks.items()
    try:
        return {entry["sha256"]: entry for entry in json.loads(path.read_text()) if same <= entry.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def measure_checkpoint(folder: Path, ruler: Ruler) -> dict[str, Any]:
    """Distance, accuracy and shallow probe of a checkpoint's EMA, and what it has cost until there."""
    found = load_model(folder, weights="ema")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, classes = found.model.to(device), found.model.conditions.num_classes
    autoencoder = load_autoencoder(found.autoencoder, device=device)
    path = PATHS[found.config.train.path]
    batches = list(sample_images(model, autoencoder, ruler.sample, num_classes=classes, device=device, path=path))
    labels = np.concatenate([labels for _, labels, _ in batches])
    images = (images for _, _, images in batches)
    metrics = ("frechet", "accuracy") if classes > 1 else ("frechet",)
    report = evaluate(images, ruler.reference, ruler.extractor, labels=labels, metrics=metrics)
    spent = checkpoint.read_header(folder / FILES["ema"])
    return {
        "step": found.step,
        "seconds": spent["seconds"],
        "tflops": spent["tflops"],
        "metric": report["label"],
        "distance": report[report["metric"]],
        "accuracy": report.get("accuracy"),
        "probe": probe(found.model, ruler, path) if classes > 1 else None,
    } | ruler.marks


def probe(model: Any, ruler: Ruler, path: Any, most: int = 4000) -> float:
    """Accuracy of a linear classifier on the shallow block's features at t = 0.4, under the null condition."""
    z0, labels = data_latents(ruler.shards, most)
    feats = collect(model, z0, model.null(labels), t=PROBE_T, taps=(ruler.block,), path=path)
    return linear_probe(feats[ruler.block], labels, kind="ridge")


def samples_of(run: Path, sample: SampleConfig, num: int) -> np.ndarray:
    """(num, R, R, C) samples of a finished run: the same noise and labels for every method."""
    found = load_model(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = dataclasses.replace(sample, num=num, seed=1, batch_size=num)
    autoencoder, path = load_autoencoder(found.autoencoder, device=device), PATHS[found.config.train.path]
    model, classes = found.model.to(device), found.model.conditions.num_classes
    batches = sample_images(model, autoencoder, settings, num_classes=classes, device=device, path=path)
    return np.concatenate([images for _, _, images in batches])
