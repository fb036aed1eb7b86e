"""What is compared: variants, seeds, the settings of each run of them, which is an ordinary run directory, and its checkpoints
that are measured.

A run whose last stage is taught by a stage that another run of the comparison trains alone takes its teacher from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, REPORT
from selftrans.config import RunConfig, settings_of
from selftrans.experiments.comparison.measurement import PROBED_BLOCK
from selftrans.experiments.comparison.schedule import Job
from selftrans.methods.registry import stages
from selftrans.methods.spec import Stage
from selftrans.sampling.samplers import EVALUATIONS
from selftrans.sections import Section, fields_of
from selftrans.train.resume import settings_before
from selftrans.train.run import stages_to_run

POINTS = 5  #: measurements along a run


#: patterns of the files that a comparison writes in its folder; other commands may write there under other names
WRITTEN = ("*.csv", "*.html", "*.json", "*.npz", "*.png", "*.safetensors")


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
    #: steps between measurements up to the steps of `shared`; after those, only the end is measured. None: a fifth
    every: int | None = None

    @property
    def jobs(self) -> list[Job]:
        return [(name, seed) for seed in self.seeds for name in self.variants]

    @property
    def total(self) -> int:
        """Cost of the comparison, in training steps."""
        return sum(map(self.steps, self.jobs)) + self.measurements * self.measuring_cost

    @property
    def measurements(self) -> int:
        """Number of measurements of all runs."""
        return len(self.seeds) * sum(len(self.measured_steps(c.train.steps)) for c in self.variants.values())

    @property
    def measuring_cost(self) -> int:
        """What measuring one checkpoint costs, in training steps (a step is three forward passes of its batch)."""
        sample, batch = self.shared.sample, self.shared.train.batch_size
        return max(1, round(sample.steps * EVALUATIONS[sample.sampler] * self.images / batch / 3))

    def interval(self, steps: int) -> int:
        """Steps between two measurements of a run of `steps`."""
        return self.every or interval(steps)

    def measured_steps(self, steps: int) -> list[int]:
        """Steps at which a run of `steps` is measured: every interval (`every`: up to the steps of `shared`), and the end."""
        every, dense = self.interval(steps), self.shared.train.steps if self.every else steps
        return sorted({*range(every, min(steps, dense) + 1, every), steps})

    def due(self, job: Job) -> list[Path]:
        """The checkpoints of a finished run that are points of its curve, oldest first: those at the `measured_steps`.

        Checkpoints that an interruption left at other steps are not.
        """
        held = checkpoints_of(self.run(job))
        wanted = self.measured_steps(held[-1][0])
        return [folder for step, folder in held if step in wanted]

    def steps(self, job: Job) -> int:
        """Training steps of a run: those of all its stages, or of the last one where another run teaches it."""
        plan = stages_to_run(self.variants[job[0]])
        return sum(stage.steps for stage in (plan[-1:] if self.teacher(job) else plan))

    def run(self, job: Job) -> Path:
        return self.out / f"{job[0]}-seed{job[1]}"

    def teacher(self, job: Job) -> Job | None:
        """The job that can teach this one: a run of the teaching stage alone, with the same settings of it and seed."""
        name, seed = job
        wanted = _own_teacher(self.variants[name])
        if wanted is None:
            return None
        others = {n: c for n, c in self.variants.items() if n != name}
        same = (n for n, c in others.items() if _trains(c, wanted, self.variants[name], self.interval(c.train.steps)))
        return next(((n, seed) for n in same), None)


def interval(steps: int) -> int:
    """Steps between two measurements of a run, where a comparison does not say otherwise."""
    return max(1, steps // POINTS)


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of the last stage of a finished run, oldest first."""
    stage = json.loads((run / REPORT).read_text())["stages"][-1]["stage"]
    return checkpoint.steps(run / stage / "checkpoints")


def seconds_trained(run: Path) -> float:
    """Seconds of training steps until the newest checkpoints of a run."""
    total = 0.0
    for folder in run.glob("*/checkpoints"):
        for _, path in reversed(checkpoint.steps(folder)):
            with contextlib.suppress(ValueError, KeyError):  # damaged: the run continues from an earlier one
                total += float(checkpoint.read_header(path / FILES["ema"])["seconds"])
                break
    return total


def _own_teacher(config: RunConfig) -> Stage | None:
    """The stage that a run would train first to teach its last one; None where there is none, or a teacher is given."""
    plan = stages(config)
    wanted = next((s.teacher for s in plan if s.teacher), None)
    return None if wanted is None or wanted.given else next((s for s in plan if s.name == wanted.stage), None)


def _trains(other: RunConfig, wanted: Stage, taught: RunConfig, every: int) -> bool:
    """Whether another run consists of this stage alone, and has, on its way, the checkpoint that this stage would end with."""
    plan = stages(other)
    if [stage.name for stage in plan] != [wanted.name] or plan[0].stream != wanted.stream:
        return False
    total = other.train.steps
    held = wanted.steps == total or wanted.steps % every == 0 < total - wanted.steps
    same = all(_step_settings(other.section(kind)) == _step_settings(taught.section(kind)) for kind in wanted.sections)
    theirs, ours = other.override(plan[0].settings), taught.override(wanted.settings)
    return held and same and (theirs.model, theirs.train) == (ours.model, ours.train)


def _step_settings(section: Section) -> dict[str, Any]:
    """Settings that a step depends on: all but the lengths of stages."""
    return {name: value for name, value, _, length in fields_of(section) if not length}


def config_of_run(comparison: Comparison, job: Job) -> RunConfig:
    """The settings of one variant with one seed, with a checkpoint at every point of its curve.

    A run that was begun keeps its teacher: its own, or that of a run which is no longer compared. ValueError where the
    settings that it was begun with cannot be read.
    """
    config, run = comparison.variants[job[0]], comparison.run(job)
    every = comparison.interval(config.train.steps)
    settings = dataclasses.replace(config.train, seed=job[1], checkpoint_every=every, keep=0, preview_every=0)
    config = dataclasses.replace(config, train=settings)
    wanted = _own_teacher(config)
    if wanted is None:
        return config
    option = next(stage.teacher.option for stage in stages(config) if stage.teacher)
    begun = any(checkpoint.steps(folder) for folder in run.glob("*/checkpoints"))
    before = settings_before(run) if begun else None
    was = before and {name: value for name, value, _ in settings_of(before)}.get(option)
    if before is not None and was is None:
        return config
    if teacher := comparison.teacher(job):
        held = dict(checkpoint.steps(comparison.run(teacher) / wanted.name / "checkpoints"))
        if wanted.steps in held:  # not in a run that was first made shorter, with checkpoints elsewhere
            return config.override({option: str(held[wanted.steps])})
    if was:
        ours = comparison.out.joinpath(*Path(was).parts[-4:])  # RUN/STAGE/checkpoints/STEP; the folder may have moved
        if str(ours) == str(was) or ours.is_dir():
            return config.override({option: str(ours)})
    return config
