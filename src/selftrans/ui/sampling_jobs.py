"""Jobs that sample: the playground, and runs next to each other at equal steps from the same noise and conditions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from selftrans.checkpoints.load import LoadedModel
from selftrans.evaluate.plots import as_pictures, image_grid, rendered
from selftrans.messages import one_line, printable
from selftrans.plain_json import from_plain, to_plain
from selftrans.sample_config import SampleConfig
from selftrans.sampling.images import Sampler
from selftrans.sampling.run_settings import overridden
from selftrans.sampling.samplers import EVALUATIONS
from selftrans.train.preview import captions
from selftrans.ui.contained import part
from selftrans.ui.jobs import Job
from selftrans.ui.models_of_runs import ModelCache, Source, counted_passes, source_of, take
from selftrans.ui.run_state import RunState

MOST, MOST_STEPS = 64, 1000  #: pictures and time steps of one request
MOST_POINTS = 64  #: checkpoints that are sampled for one request
#: settings that a request may choose; the others are those of the run
CHOSEN = ("num", "steps", "sampler", "guidance_scale", "guidance_interval", "time_shift", "seed", "labels", "prompts")
#: settings of sampling that a preview depends on
PREVIEWED = (
    *("seed", "labels", "prompts", "guidance_scale", "guidance_interval", "guidance_channels", "time_shift"),
    *("velocity_scale", "early_guidance", "early_interval"),
)
Run = Callable[[str], RunState]  #: id -> the run; LookupError where there is none
Work = Callable[[Job], None]  #: what a job does in its thread


def settings_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen settings of a request, checked. ValueError for one that is unknown or out of range."""
    plain = to_plain(SampleConfig())
    wrong = [name for name in raw if name not in CHOSEN]
    if wrong:
        raise ValueError(f"the setting {printable(wrong[0])} cannot be chosen here; use {', '.join(CHOSEN)}")
    found: SampleConfig = from_plain(SampleConfig, plain | dict(raw), "sample")
    found.check()
    if found.num > MOST or found.steps > MOST_STEPS:
        raise ValueError(
            f"the page samples at most {MOST} pictures in {MOST_STEPS:,} steps; `selftrans sample` has no limit"
        )
    chosen = {name: getattr(found, name) for name in raw}
    if chosen.get("prompts") is not None:
        chosen["prompts"] = tuple(filter(None, map(one_line, found.prompts or ()))) or None
    return chosen


def playground(raw: Mapping[str, Any], run: Run, models: ModelCache) -> tuple[dict[str, Any], Work]:
    """(the request as the page shows it, the work) for sampling one model."""
    source = source_of(raw.get("model"), run, "model")
    chosen = settings_of(take(raw, "settings", dict, {}))
    about = {"model": dataclasses.asdict(source.wanted), "name": source.text, "settings": chosen}
    return about, _sampling([source], chosen, models)


def side_by_side(raw: Mapping[str, Any], run: Run, models: ModelCache) -> tuple[dict[str, Any], Work]:
    """(the request as the page shows it, the work) for sampling several runs at the same steps, from the same noise."""
    wanted, steps = take(raw, "models", list, []), take(raw, "steps", tuple[int, ...], ())
    if not 1 <= len(steps) * len(wanted) <= MOST_POINTS:
        raise ValueError(f"choose 1 to {MOST_POINTS} checkpoints in all")
    chosen = settings_of(take(raw, "settings", dict, {}))
    # all runs at a step before the next step, so that the page can show them together at once
    sources = [
        source_of(dict(each, step=step) if isinstance(each, dict) else each, run, "models")
        for step in sorted(set(steps), reverse=True)
        for each in wanted
    ]
    about = {"models": [dataclasses.asdict(each.wanted) for each in sources], "settings": chosen}
    return about, _sampling(sources, chosen, models)


def _sampling(sources: Sequence[Source], chosen: Mapping[str, Any], models: ModelCache) -> Work:
    """The work that samples each of the models."""

    def work(job: Job) -> None:
        shapes: set[tuple[int, ...]] = set()
        for source in sources:
            loaded, settings = _opened(models, source, chosen, job)
            job.total = job.total or passes(settings) * len(sources)
            shapes.add(tuple(loaded.model.shape))
            _sample(loaded, settings, models, source, job)
        if len(shapes) > 1:
            job.notes.append("the runs have latents of different shapes, so their noise differs")

    return work


def passes(settings: SampleConfig) -> int:
    """Passes of the model that sampling takes."""
    return EVALUATIONS[settings.sampler] * settings.steps * -(-settings.num // settings.batch_size)


def _opened(
    models: ModelCache, source: Source, chosen: Mapping[str, Any], job: Job
) -> tuple[LoadedModel, SampleConfig]:
    """The model, and its run's settings with the chosen ones in their place."""
    config = source.state.read().plan.config
    precision = config.sample.precision if config and models.device.type != "cpu" else "fp32"
    loaded = models.load(source, job, cast=precision)
    settings = overridden(loaded, dict(chosen))
    # the weaker model of autoguidance would be another file, which the run names and the page was not given
    if settings.autoguidance is not None:
        job.notes.append("the run's autoguidance is left out: guidance is by the null condition")
    # graphs: passes are counted by a hook, which a replay does not run
    settings = dataclasses.replace(settings, autoguidance=None, precision=precision, capture="off")
    return loaded, dataclasses.replace(settings, batch_size=min(settings.batch_size, settings.num))


def _sample(loaded: LoadedModel, settings: SampleConfig, models: ModelCache, source: Source, job: Job) -> None:
    """Sample and add the pictures to the job as one sheet without gaps."""
    job.doing = f"preparing {source.text}"
    sampler = Sampler.of(loaded, settings, device=models.device)
    job.doing = f"sampling {source.text}"
    with counted_passes(loaded.model, job):
        batches = list(sampler.sample())
    pictures = as_pictures(np.concatenate([batch.images for batch in batches]))
    texts = captions(batches, sampler.conditioning, loaded.classes)
    add_sheet(job, pictures, captions=[printable(t, 300) for t in texts or []], of=dataclasses.asdict(source.wanted))


def add_sheet(job: Job, pictures: np.ndarray, *, columns: int | None = None, **about: Any) -> None:
    """Add uint8 pictures (n, H, W, C) as one png of tiles next to each other, which the page cuts."""
    columns = columns or min(len(pictures), 8)
    png = rendered(image_grid(pictures, columns, gap=0))
    job.add(png, count=len(pictures), columns=columns, tile=list(pictures.shape[1:3]), **about)


def preview_differences(states: Sequence[RunState]) -> list[str]:
    """Why the stored previews of runs are not of the same noise and conditions, one line each; empty if they are."""
    found = [_preview_settings(state) for state in states]
    names = sorted({name for each in found for name in each})
    return [
        f"{name} is {' and '.join(sorted({printable(json.dumps(each.get(name)), 40) for each in found}))}"
        for name in names
        if len({json.dumps(each.get(name)) for each in found}) > 1
    ]


def _preview_settings(state: RunState) -> dict[str, Any]:
    """What the pictures of a run's previews depend on besides its weights."""
    config = state.read().config
    data, _ = state.files.read(state.place / "data.json")
    parts: dict[str, tuple[str, ...]] = {
        "sample": PREVIEWED,
        "log": ("preview_images", "preview_steps"),
        "train": ("path",),
    }
    sample = to_plain(SampleConfig()) | part(config, "sample", dict)
    if sample["autoguidance"] is not None:  # previews leave it out
        sample["guidance_scale"] = 1.0
    given = config | {"sample": sample}
    found = {f"{key}.{name}": part(given, key, dict).get(name) for key, names in parts.items() for name in names}
    return found | {name: (data or {}).get(name) for name in ("shape", "autoencoder", "conditions")}
