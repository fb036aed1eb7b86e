"""bench.json as text."""

from __future__ import annotations

from typing import Any

from selftrans.experiments.html_report import aligned
from selftrans.experiments.step_cost import CAPTURED, PLAIN
from selftrans.messages import plural

COLUMNS = ("images/s", "ms/step", "data", "forward", "backward", "optimiser", "peak GB", "utilisation")


def table(report: dict[str, Any]) -> str:
    """The results as text. Rows named "plain" are those of `plain_step`; "optimiser" includes clipping and EMA.

    Rows named "graph" are captured steps, whose parts are not timed.
    """
    machine = report["machine"]
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {plural(machine['cores'], 'core')}, {plural(machine['threads'], 'thread')}, "
        f"torch {machine['torch']}, {machine['dtype']}, load {machine['load_before']} before, {machine['load_after']} after"
    ]
    for name, model in report["models"].items():
        title = f"{name}, {model['tokens']} tokens, batch {model['batch']}"
        if "failed" in model:
            lines += ["", f"{title}: {model['failed']}"]
            continue
        lines += ["", f"{title}, medians of {plural(model['rounds'], 'round')}"]
        lines.append(aligned([["", *COLUMNS], *([_name(row), *_cells(each)] for row, each in model["rows"].items())]))
        lines.append(f"best matmul {model['matmul_peak_tflops']:.4g} TFLOP/s")
        for ratio, value in model["ratios"].items():
            low, high = model["ratios_range"].get(ratio, (None, None))
            lines.append(f"  {ratio:<28} {value:.3f}" + (f"   ({low:.3f} to {high:.3f})" if low is not None else ""))
        sampled = model.get("sampling")
        if sampled is None:
            lines.append("sampling was not measured")
            continue
        lines.append(
            f"sampling, batch {sampled['batch']}, {sampled['steps']} Euler steps, guided: "
            f"{sampled['full_images_per_s']:.3g} images/s; guided on {sampled['interval']} only: "
            f"{sampled['interval_images_per_s']:.3g} (passes counted: {sampled['passes_interval_over_full']:.3f})"
        )
    loaded = report.get("loading")
    if loaded is None:
        return "\n".join([*lines, "", "loading was not measured"])
    lines += [
        "",
        f"loading {loaded['latent']}, posterior sampled: {loaded['memory_mapped_latents_per_s']:,.0f} latents/s "
        f"memory-mapped, {loaded['on_device_latents_per_s']:,.0f} with the data on the device",
    ]
    return "\n".join(lines)


def _name(row: str) -> str:
    """`stage 2, graph`: the row as the table has it."""
    kinds = {PLAIN: ", plain", CAPTURED: ", graph"}
    kind = next((prefix for prefix in kinds if row.startswith(prefix)), "")
    return row.removeprefix(kind).replace("stage", "stage ") + kinds.get(kind, "")


def _cells(row: dict[str, Any]) -> list[str]:
    keys = ("images_per_s", "ms", "data_ms", "forward_ms", "backward_ms", "optimiser_ms")
    memory = "-" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.2f}"
    return [*("-" if row[key] is None else f"{row[key]:.4g}" for key in keys), memory, f"{row['utilisation']:.1%}"]
