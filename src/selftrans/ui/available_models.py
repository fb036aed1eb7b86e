"""Which models of a run the page offers: its stages with their checkpoints, what they are conditioned on, their teacher."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selftrans.messages import printable
from selftrans.methods.spec import Stage
from selftrans.ui.contained import number, part, plain
from selftrans.ui.run_plan import scale_of
from selftrans.ui.run_state import STEP, RunState

MOST_CLASSES = 1000  #: classes whose names are sent to the page


def available_models(state: RunState, known: Sequence[RunState]) -> dict[str, Any]:
    """What can be sampled and drawn, as json types. `known`: the runs that may hold its teacher."""
    run = state.read()
    data, _ = state.files.read(state.place / "data.json")
    classes, sample = part(data, "classes", list), part(run.config, "sample", dict)
    stages = [{"name": name, "checkpoints": found} for name in run.stages if (found := state.checkpoints(name))]
    plan, last = run.plan, run.plan.stages[-1] if run.plan.stages else None
    return {
        "stages": stages,
        "conditions": str(part(data, "conditions", dict).get("kind", "none")),
        "classes": [printable(name, 60) for name in classes[:MOST_CLASSES]],
        "rows": number((data or {}).get("count")),
        "sample": {
            name: plain(sample.get(name))
            for name in ("steps", "sampler", "guidance_scale", "guidance_interval", "time_shift", "seed", "prompts")
        },
        "teacher": _teacher(state, last, known),
        "scale": scale_of(plan.config, last) if plan.config and last else None,
    }


def _teacher(state: RunState, last: Stage | None, known: Sequence[RunState]) -> dict[str, Any] | None:
    """The checkpoint that taught the last stage, if it is in one of the runs."""
    spec = last.teacher if last else None
    if spec is None:
        return None
    holder, step = (state, None) if spec.given is None else _holder(spec.given, known)
    if holder is None:
        return None
    held = holder.checkpoints(spec.stage)
    chosen = step if step in held else held[-1] if held else None
    if chosen is None:
        return None
    return {
        "run": holder.found.id,
        "name": holder.found.name,
        "stage": spec.stage,
        "step": chosen,
        "weights": spec.weights,
    }


def _holder(given: str, known: Sequence[RunState]) -> tuple[RunState | None, int | None]:
    """The run that holds a given teacher, and the step of its checkpoint if it is named."""
    path = Path(os.path.realpath(given)) if "\0" not in given else Path()
    holder = next((each for each in known if path.is_relative_to(each.place.path)), None)
    steps = [int(match[1]) for name in path.parts if (match := re.fullmatch(STEP, name))]
    return holder, steps[-1] if steps else None
