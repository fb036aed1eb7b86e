"""One run for the page: what it is, how far it has come, what went wrong; from its files alone.

A file that is missing, half written, damaged or of another version costs a line in `notes`, not the run.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import FILES, REPORT
from selftrans.experiments.comparison.measurement import SHARED
from selftrans.messages import first_line, plural, printable
from selftrans.ui.contained import Contained, JsonFiles, number, plain
from selftrans.ui.found_runs import Found
from selftrans.ui.run_log import Columns, Glance, glance, loss_of
from selftrans.ui.run_plan import Plan, plan_of

POINTS = 600  #: of a curve
RECENT = 90.0  #: seconds without a new line after which a run has stopped, unless its lines are further apart
LOCKS = Path("/proc/locks")  #: held locks of files, a line each: number, kind, ..., process, device:device:inode, ...
PICTURE_BYTES = 64 << 20  #: of the largest preview that is shown
STEP = r"step-(\d{1,12})"  #: name of a checkpoint; with .png, of a preview

#: what two measured points must share to belong to one curve, see `measurement.identity_of`
IDENTITY = (*SHARED, "metric")


class Contents(NamedTuple):
    """What the settings and the report of a run say. Both are empty where they are missing or damaged."""

    config: dict[str, Any]  #: config.json
    report: dict[str, Any]  #: run.json
    plan: Plan
    stages: list[str]  #: their names, in order
    notes: list[str]  #: what is wrong, one line each

    def spent(self, stage: str) -> int | None:
        """The steps of a stage when the run was finished; None if run.json does not say."""
        stages = self.report.get("stages")
        for each in stages if isinstance(stages, list) else ():
            if isinstance(each, dict) and each.get("stage") == stage and number(each.get("steps")) is not None:
                return int(each["steps"])
        return None


class RunState:
    """A run and what was read of it. Kept by the page, so that only changed files are read again."""

    def __init__(self, found: Found, files: JsonFiles) -> None:
        self.found, self.place, self.files = found, found.place, files
        self._glances: dict[str, tuple[Any, Glance]] = {}
        self._logs: dict[str, Columns] = {}

    # ---- the list of runs

    def summary(self) -> dict[str, Any]:
        """A line of the list of runs, as json types."""
        try:
            return self._summary()
        except Exception as error:  # whatever is in the folder: one run must not cost the page
            return {"id": self.found.id, "name": self.found.name, "state": "unreadable", "notes": [first_line(error)]}

    def _summary(self) -> dict[str, Any]:
        run = self.read()
        reached = [(name, self.glance(name)) for name in run.stages]
        current = next((i for i in range(len(reached) - 1, -1, -1) if reached[i][1].step is not None), 0)
        name, seen = reached[current] if reached else ("", Glance())
        total = self._length(run, name)
        state = self._state(run, name, seen)
        points = self.measured()
        previews = self.previews(name) if name else []
        return {
            "id": self.found.id,
            "name": self.found.name,
            "state": state,
            "method": run.plan.title or printable(run.config.get("method", "")),
            "model": _model(run.config),
            "recipe": printable(run.config.get("recipe", "")),
            "stage": name,
            "number": current + 1,
            "stages": len(reached),
            "step": seen.step,
            "steps": total,
            "share": _share(current, len(reached), seen.step, total),
            "rate": seen.rate,
            "left": self._left(run, seen, total, run.stages[current + 1 :]) if state == "running" else None,
            "loss": loss_of(seen.values),
            "spark": seen.spark,
            "distance": points[-1]["distance"] if points else None,
            "tflops": number(run.report.get("total_tflops")) if state == "done" else None,
            "skipped": int(seen.values.get("skipped", 0)),
            "starts": self.starts(),
            "preview": [current, previews[-1]] if previews else None,
            "changed": self._changed(name),
            "notes": run.notes,
        }

    def read(self) -> Contents:
        """What its settings and its report say now."""
        config, wrong = self.files.read(self.place / "config.json")
        report, also = self.files.read(self.place / REPORT)
        plan = plan_of(config) if config else Plan()
        notes = [line for line in (wrong, also, plan.problem) if line]
        if config is None and not wrong:
            notes.append("config.json is missing")
        return Contents(config or {}, report or {}, plan, self._stages(report or {}, plan), notes)

    def _stages(self, report: dict[str, Any], plan: Plan) -> list[str]:
        """Names of its stages, in order: as run.json says, else those that have a folder."""
        order = report.get("order")
        named = order if isinstance(order, list) else [each.name for each in plan.stages]
        held = [name for name in self.place.folders() if self._is_stage(name)]
        named = [name for name in named if isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,99}", name)]
        if not isinstance(order, list):
            named = [name for name in named if name in held]
        return list(dict.fromkeys([*named, *held]))

    def _is_stage(self, name: str) -> bool:
        folder = self.place / name
        return (folder / "log.jsonl").stamp() is not None or "checkpoints" in folder.folders()

    def glance(self, stage: str) -> Glance:
        """The end of a stage's log, read again when it has changed."""
        file = self.place / stage / "log.jsonl"
        stamp = file.stamp()
        if stamp is None:
            return Glance()
        known = self._glances.get(stage)
        if known is None or known[0] != stamp:
            known = self._glances[stage] = (stamp, glance(file))
        return known[1]

    def _length(self, run: Contents, stage: str) -> int | None:
        """The steps of a stage: as run.json says, unless the run is being extended since it was written."""
        spent = run.spent(stage)
        return run.plan.steps(stage) if spent is None or self._extended(run, stage) else spent

    def _extended(self, run: Contents, stage: str) -> bool:
        """Whether more steps of a stage are planned or logged than run.json reports."""
        spent = run.spent(stage)
        return spent is not None and max(run.plan.steps(stage) or 0, self.glance(stage).step or 0) > spent

    def _state(self, run: Contents, stage: str, seen: Glance) -> str:
        """done, running, stopped, or begun: without a step that was logged."""
        if self.locked():
            return "running"
        if "stages" in run.report and not any(self._extended(run, name) for name in run.stages):
            return "done"
        changed = self._changed(stage)
        if changed is not None and time.time() - changed < max(RECENT, 4 * (seen.between or 0)):
            return "running"
        return "stopped" if seen.step is not None or not run.stages else "begun"

    def _changed(self, stage: str) -> float | None:
        """When its log or, before there is one, its settings were written last."""
        for file in (self.place / stage / "log.jsonl", self.place / "config.json") if stage else ():
            if stamp := file.stamp():
                return stamp[2] / 1e9
        return None

    def locked(self) -> bool:
        """Whether a process of this machine trains in it. Only looked up: taking the lock could stop a run that starts."""
        try:
            with (self.place / ".lock").open() as file:
                about, owner = os.fstat(file.fileno()), file.read(20).decode("ascii", "replace").strip()
            held = [line.split() for line in LOCKS.read_text().splitlines()]
        except OSError:  # no lock, or a system that does not show who holds it
            return False
        own = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        for _, kind, _, _, process, file_id, *_ in held:
            device, _, inode = file_id.rpartition(":")
            # other file systems have the same numbers; some, of containers, show another device here than in `stat`
            if kind == "FLOCK" and inode == str(about.st_ino) and (device == own or process == owner):
                return True
        return False

    def _left(self, run: Contents, seen: Glance, total: int | None, later: list[str]) -> float | None:
        """Seconds left, at the present rate, of this stage and of the later ones."""
        rest = [run.plan.steps(name) for name in later]
        if not seen.rate or total is None or seen.step is None or None in rest:
            return None
        return (max(0.0, total - seen.step) + sum(filter(None, rest))) / seen.rate

    def starts(self) -> int | None:
        """How often training was started: each start begins a file of TensorBoard's. None if there are none."""
        names = [each.name for each in (self.place / "tensorboard").entries() if each.name.startswith("events.out.")]
        return len(names) or None

    # ---- one run

    def detail(self) -> dict[str, Any]:
        """All that the page of a run shows, as json types."""
        try:
            return self._detail()
        except Exception as error:  # as in `summary`
            found = self.summary()
            return (
                found
                | {"parts": [], "measured": [], "changes": [], "settings": {}}
                | {"notes": [*found["notes"], f"its files cannot be shown ({first_line(error)})"]}
            )

    def _detail(self) -> dict[str, Any]:
        run, found = self.read(), self.summary()
        changes, wrong = self.files.read(self.place / "changes.json", list)
        return found | {
            "path": printable(self.place.path, 1000),
            "parts": [self._stage(run, name) for name in run.stages],
            "measured": self.measured(),
            "changes": plain(changes or []),
            "settings": plain(run.config),
            "report": plain(run.report),
            "notes": found["notes"] + ([wrong] if wrong else []),
        }

    def _stage(self, run: Contents, name: str) -> dict[str, Any]:
        log = self.log(name)
        return {
            "name": name,
            "steps": self._length(run, name),
            "step": log.steps[-1] if log.steps else None,
            "lines": len(log.steps),
            "damaged": log.damaged,
            "replaced": log.replaced,
            "seconds": log.last("seconds"),
            "tflops": log.last("tflops"),
            "curves": log.curves(POINTS),
            "skipped": log.skipped,
            "skips": plain([{k: v for k, v in each.items() if k != "rows"} for each in log.skips]),
            "previews": self.previews(name),
            "checkpoints": self.checkpoints(name),
            "prompts": self._prompts(name),
        }

    def log(self, stage: str) -> Columns:
        """The log of a stage, up to its present end."""
        log = self._logs.setdefault(stage, Columns(self.place / stage / "log.jsonl"))
        log.refresh()
        return log

    def _prompts(self, stage: str) -> list[str]:
        try:
            text = (self.place / stage / "previews" / "prompts.txt").read(1 << 20).decode("utf-8", "replace")
        except OSError:
            return []
        return [printable(line, 500) for line in text.splitlines()[:64]]

    def previews(self, stage: str) -> list[int]:
        """Steps that have a preview."""
        names = (each.name for each in (self.place / stage / "previews").entries())
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(STEP + r"\.png", name)))

    def preview(self, stage: str, step: int) -> Contained:
        """The file of a preview."""
        return self.place / stage / "previews" / f"step-{step:08d}.png"

    def checkpoints(self, stage: str) -> list[int]:
        """Steps that have a checkpoint; its content is not verified here."""
        names = (self.place / stage / "checkpoints").folders()
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(STEP, name)))

    def weights(self, stage: str, step: int, kind: str) -> Path:
        """The weights file of a checkpoint. ValueError where it is missing or reached through a symbolic link."""
        folder = checkpoint.path_of_step(Path("checkpoints"), step).name
        file = self.place / stage / "checkpoints" / folder / FILES[kind]
        if file.stamp() is None or not file.inside() or not os.path.isfile(file.path):
            raise ValueError(f"step {step} of {stage} has no {FILES[kind]}; training may have removed it")
        return file.path

    def measured(self) -> list[dict[str, Any]]:
        """Measured points, oldest first: those of measured.json that have a step and a distance.

        While a run is measured again in another way, the file also has points of that way, first: they are left out until
        all are there.
        """
        found, _ = self.files.read(self.place / "measured.json", list)
        kept = [each for each in found or [] if isinstance(each, dict)]
        kept = [p for p in kept if number(p.get("step")) is not None and number(p.get("distance")) is not None]
        kept = [p for p in kept if all(p.get(key) == kept[-1].get(key) for key in IDENTITY)]
        return [plain(point) for point in sorted(kept, key=lambda point: float(point["step"]))]


def _share(stage: int, stages: int, step: float | None, total: int | None) -> float | None:
    """The share of a run that is done when stage number `stage` (from 0) is at `step` of `total`; None: unknown."""
    return None if not stages or not total or step is None else (stage + min(1.0, step / total)) / stages


def _model(config: dict[str, Any]) -> str:
    """`SiT-S/2, 6 blocks of 64`."""
    model = config.get("model")
    if not isinstance(model, dict):
        return ""
    depth = model.get("depth")
    sizes = f", {plural(depth, 'block')} of {model['width']}" if isinstance(depth, int) and "width" in model else ""
    return printable(f"{model.get('name', '')}{sizes}", 80)
