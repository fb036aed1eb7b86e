"""The model card (README.md) of a run on the hub: what it is, how it is used, its numbers and what they depend on.

Texts from files are escaped, so that Markdown or HTML in them has no effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from selftrans.checkpoints.hub import SAMPLES
from selftrans.checkpoints.load import LoadedModel
from selftrans.config import settings_of
from selftrans.interop.pipeline_parts import last_parts
from selftrans.interop.run_facts import made_with
from selftrans.messages import plural, printable

#: entries of a report of `selftrans evaluate` -> heading
NUMBERS = {
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "authenticity": "authenticity",
    "kernel_distance": "kernel distance",
    "accuracy": "accuracy",
    "clip_score": "CLIP score",
}
LARGEST = 1e30  #: of numbers in a card
TASKS = {"text": "text-to-image"}  #: kind of condition -> task of the hub; others: unconditional-image-generation


def card(
    repository: str,
    license: str,
    loaded: LoadedModel,
    *,
    data: dict[str, Any] | None,
    compute: dict[str, Any] | None,
    evaluations: Sequence[dict[str, Any]],
    samples: str | None,
) -> str:
    """The text of README.md. `data` is the run's data.json, `samples` what the sheet of samples depends on; None: unknown."""
    parts = [
        _front(license, loaded),
        f"# {cell(repository.rpartition('/')[2])}",
        _about(loaded, data),
        f"![samples]({SAMPLES})\n\nSamples: {cell(samples, None)}." if samples else "",
        _use(repository, loaded),
        "## Numbers\n\n" + (_numbers(evaluations) if evaluations else "None were measured on these weights."),
        "## Training\n\n" + _compute(compute),
        _settings(loaded),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def cell(text: object, limit: int | None = 160) -> str:
    """Text on one line, in which Markdown and HTML have no effect."""
    return re.sub(r"([\\`*_{}\[\]()#!|<>&~])", r"\\\1", printable(text, limit))


def _front(license: str, loaded: LoadedModel) -> str:
    task = TASKS.get(loaded.model.conditions.kind, "unconditional-image-generation")
    tags = [
        "selftrans",
        "diffusion-transformer",
        "flow-matching",
        re.sub(r"[^A-Za-z0-9-]", "-", loaded.config.model.name),
    ]
    lines = [f"license: {license}", "library_name: selftrans", f"pipeline_tag: {task}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _about(loaded: LoadedModel, data: dict[str, Any] | None) -> str:
    millions = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    kind = "the moving average of the weights" if loaded.weights == "ema" else "the weights themselves"
    source = str((data or {}).get("source", ""))
    known = [cell(last_parts(source))] if source else []
    count = (data or {}).get("count")
    known += [plural(count, "sample")] if _is_number(count) and isinstance(count, int) else []
    conditions = loaded.model.conditions
    return (
        f"{cell(loaded.config.model.name)} with {millions:.3g} M parameters on latents of "
        f"{' x '.join(map(str, loaded.model.shape))} (autoencoder: {cell(last_parts(loaded.autoencoder))}), with "
        f"{cell(_conditions(conditions))}. Trained by the method {cell(loaded.config.method)}, stage {cell(loaded.stage)}, for "
        f"{plural(loaded.step, 'step')}{' on ' + ', '.join(known) if known else ''}; this is {kind}. Its path is "
        f"{loaded.config.train.path}: t = 0 is data, t = 1 is noise."
    )


def _count(report: dict[str, Any], key: str, noun: str) -> str:
    """`500 samples`; `None samples` where a report has no number."""
    count = report.get(key)
    return plural(count, noun) if _is_number(count) and isinstance(count, int) else f"{cell(count, 20)} {noun}s"


def _conditions(conditions: Any) -> str:
    if conditions.kind != "text":
        return str(conditions)
    return f"text of {conditions.tokens} tokens by {last_parts(conditions.encoder) or 'an unnamed encoder'}"


def _use(repository: str, loaded: LoadedModel) -> str:
    kind = loaded.model.conditions.kind
    call = {"text": 'prompt="..."', "labels": "class_labels=[0, 1]"}.get(kind, "num_images=4")
    return f"""## Use

```bash
selftrans sample hf://{repository} --out samples{' --prompts "..."' if kind == "text" else ""}
```

```python
import selftrans
from selftrans.interop import SiTPipeline

images = SiTPipeline.from_pretrained("{repository}")({call}).images
model = selftrans.load("hf://{repository}")  # the torch module alone
```"""


def _numbers(evaluations: Sequence[dict[str, Any]]) -> str:
    lines = []
    for report in evaluations:
        made, found = report["made"], []
        for key, name in {report["metric"]: str(report.get("label", report["metric"])), **NUMBERS}.items():
            value = report.get(key)
            if _is_number(value):
                spread = report.get(f"{key}_std")
                found.append((name, f"{value:.4g}" + (f" ± {spread:.2g}" if _is_number(spread) else "")))
        depends = (
            f"{_count(report, 'num_images', 'sample')} against {cell(last_parts(str(report.get('reference'))))} "
            f"({_count(report, 'reference_images', 'image')}), features of {cell(last_parts(str(report.get('extractor'))))} "
            f"(sha256 {cell(str(report.get('extractor_sha256'))[:12])}), {cell(made_with(made), None)}, precision "
            f"{cell(made.get('precision'))}, labels {cell(made.get('labels'))}"
        )
        rows = "\n".join(f"| {cell(name)} | {cell(value)} |" for name, value in found)
        lines.append(f"| measured | value |\n|---|---|\n{rows}\n\nThese depend on: {depends}.")
    return "\n\n".join(lines)


def _compute(compute: dict[str, Any] | None) -> str:
    if compute is None:
        return "What the training took is not recorded for these weights."
    lines = ["| stage | steps | seconds | TFLOPs |", "|---|---|---|---|"]
    for stage in compute["stages"]:
        spent = " | ".join(_number(stage.get(key)) for key in ("steps", "seconds", "tflops"))
        lines.append(f"| {cell(stage.get('stage'))} | {spent} |")
    total = f"{_number(compute['total_tflops'])} TFLOPs, {_number(compute['total_seconds'])} s"
    return "\n".join([*lines, "", f"In total, teachers included: {total}."])


def _is_number(value: Any) -> bool:
    """Whether a value of a file is a number that was measured: files may be damaged, and hold anything else."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def _number(value: Any) -> str:
    if not _is_number(value):
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _settings(loaded: LoadedModel) -> str:
    lines = [
        f"{name} = {printable(json.dumps(value, default=str))}"
        for name, value, _ in settings_of(loaded.config)
        if value is not None
    ]
    text = "\n".join(lines).replace("`", "'")
    return f"<details><summary>All settings</summary>\n\n```\n{text}\n```\n\n</details>"
