"""benchmarks/gpu_lease.sh and its parts: what is written when, what a part that fails or is killed leaves, order, the table."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from accelerate.state import AcceleratorState

from selftrans.experiments.bench import settings
from selftrans.models import fused_bias, fused_gelu, fused_norm
from selftrans.train.captured_step import NotCaptured
from selftrans.train.interrupted import Interrupted
from tests.support.scripts import script

ROOT = Path(__file__).parents[4]
SOURCES = f"{ROOT / 'src'}:{ROOT / 'benchmarks'}"


@pytest.fixture(autouse=True)
def _own_accelerator() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def raising(error: Exception) -> Any:
    raise error


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_parts_run_with_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, out, into = script("gpu_parts"), tmp_path / "work", tmp_path / "out"
    for part in ("correctness", "sampling", "around", "loading", "attention"):
        assert parts.main([part, "--out", str(out), "--into", str(into), "--toy"]) == 0
    found = read(out / "correctness.json")
    assert {name: len(each) for name, each in found["losses"].items()} == {
        "eager fp32": 14, "captured fp32": 14, "eager bf16": 14,
    }  # fmt: skip
    assert (
        found["checks"]["captured fp32 / eager fp32"]["difference"] == 0
        and found["checks"]["eager bf16 / eager fp32"]["steps"] == 14
    )
    assert found["graphs"] == {"captured fp32": 0} and found["machine"]["gpu"] is None and "unfinished" not in found
    found = read(out / "sampling.json")
    ways = ("eager", "captured", "compiled", "captured_compiled")
    assert all(found[f"{way}_of_{n}_{again}_per_s"] > 0 for way in ways for n in (4, 2) for again in ("first", "then"))
    # neither compiled nor recorded on a CPU
    assert all(found[f"{way}_mean_difference_of_levels"] == 0 for way in ways[1:])
    found = read(out / "around.json")
    assert all(value > 0 for name, value in found.items() if name.endswith("per_s"))
    assert 0 < found["decode_mean_difference_of_levels"] < 1 and found["features_per_s"] > 0
    assert (
        read(out / "loading.json")["streamed_latents_per_s"] > 0 < read(out / "loading.json")["on_device_latents_per_s"]
    )
    assert {"SiT-S/4, chosen, ms", "SiT-S/4, math, ms"} <= read(out / "attention.json").keys()
    assert set(read(into / "gpu_lease.json")) == {"around", "attention", "correctness", "loading", "sampling"}
    with tarfile.open(into / "lease.tgz") as packed:
        names = ["around", "attention", "correctness", "loading", "sampling"]
        assert packed.getnames() == [f"{name}.json" for name in names]
    shown = capsys.readouterr().out
    assert "correctness: passed: eager bf16 / eager fp32 " in shown and "captured fp32 / eager fp32 0.0e+00\n" in shown


def test_first_step_is_one_launched_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that is recorded as a graph is the fourth one."""
    measures, seen = script("gpu_measures"), list[Any]()

    def dry_run(config: Any, out: Path, *, steps: int) -> Any:
        seen.append((config.train.capture, steps))
        return SimpleNamespace(stages=[SimpleNamespace(seconds_per_step=0.25)])

    monkeypatch.setattr(measures, "dry_run", dry_run)
    measures.one_step(True)
    step, whole = capsys.readouterr().out.split()
    assert seen == [("off", 1)] and step == "0.25" and float(whole) >= 0


def test_other_choices_for_the_step_are_measured_one_by_one(tmp_path: Path) -> None:
    parts = script("gpu_parts")
    for part in ("memory", "variants", "tuned", "xl2", "route"):
        assert parts.main([part, "--out", str(tmp_path), "--toy"]) == 0

    def rows(part: str) -> dict[str, set[str]]:
        return {name: set(each["rows"]) for name, each in read(tmp_path / f"{part}.json")["models"].items()}

    assert rows("memory") == {"toy batch 4, 1 recomputed": {"vanilla", "stage2"}}
    assert rows("xl2") == {"toy batch 4": {"vanilla", "captured_vanilla", "stage2"}}
    assert rows("route") == {"toy route 0.5": {"captured_vanilla", "captured_stage2"}}
    variants = parts.measures().gpu_variants
    for part, choices in (("variants", variants.VARIANTS), ("tuned", variants.TUNED)):
        found = read(tmp_path / f"{part}.json")["choices"]
        assert [*found] == [name for name, (_, over) in choices.items() if "train.fp8" not in over]
        assert len({(row["loss"], row["grad_norm"]) for row in found.values()}) == 1, "the same weights, data and noise"
    assert not inductor.max_autotune_gemm and not inductor.coordinate_descent_tuning, "as before"
    assert (importlib.util.find_spec("triton") is not None) == fused_norm.FUSED_NORMS, "as before"
    assert not fused_bias.FUSED_BIASES and not fused_gelu.EPILOGUES and fused_gelu.SUM_INSIDE, "as before"
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(a new job of a part with 100 seconds; what it has asked to measure; the errors of pieces) on a GPU that is made up."""
    parts = script("gpu_parts")
    variants, asked, errors = parts.measures().gpu_variants, list[str](), dict[str, Exception]()

    def measured(job: Any, folder: str, name: str, model: Any, rows: Any, **given: Any) -> Any:
        if job.part == "route":
            assert settings(model, 256, "bf16").override(given["overrides"]).model.route == 0.5
        asked.append(folder)
        if folder in errors:
            raise errors[folder]
        return {"rows": {row: {"ms": 5.0} for row in rows}}

    monkeypatch.setattr(variants, "measured", measured)
    gpu = SimpleNamespace(total_memory=85e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: asked.append(f"{share:.2f}"))

    def new(part: str, name: str = "NVIDIA H100", limit: float = 100.0) -> Any:
        made = parts.Job(part, tmp_path, limit)
        made.found["machine"] = {"gpu": name, "torch": "2.11", "dtype": "bf16"}
        asked.clear()
        return made

    return SimpleNamespace(new=new, asked=asked, errors=errors, variants=variants, gpu=gpu)


def test_variants_that_found_no_time_are_measured_by_the_next_call(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an earlier call stay, unless it had another GPU; what failed there comes last."""
    choices = dict.fromkeys(("one", "two", "three"), job.variants.VARIANTS["as it is"])
    monkeypatch.setattr(job.variants, "VARIANTS", choices)
    first = job.new("variants")
    job.errors["SiT-B/2 one"] = ValueError("no kernel")
    monkeypatch.setattr(type(first), "left", property(lambda self: 50.0 if len(job.asked) < 2 else 5.0))
    job.variants.variants(first)
    assert job.asked == ["SiT-B/2 one", "SiT-B/2 two"] and [*first.found["choices"]] == ["two"]
    assert first.found["failed"] == "SiT-B/2, one: ValueError no kernel"
    first.found.pop("unfinished")  # as at the end of a part
    first.write()
    assert first.found["unfinished"] == "not measured: SiT-B/2, three"
    monkeypatch.setattr(type(first), "left", property(lambda self: 50.0))
    second = job.new("variants")
    job.variants.variants(second)
    assert job.asked == ["SiT-B/2 three", "SiT-B/2 one"] and "two" in second.found["choices"]
    first.found["measuring"] = "SiT-B/2, three"
    first.write()
    job.variants.variants(job.new("variants"))
    assert job.asked == ["SiT-B/2 one", "SiT-B/2 three"], "both failed or did not end"
    other = job.new("variants", "NVIDIA H200")
    job.errors.clear()
    job.variants.variants(other)
    assert job.asked == ["SiT-B/2 two", "SiT-B/2 three", "SiT-B/2 one"] and "failed" not in other.found


def test_nothing_is_measured_after_an_error_that_spoils_the_process(job: Any) -> None:
    first = job.new("route")
    job.errors["SiT-B/2 route 0.5 captured_vanilla"] = NotCaptured("CUDA ended the recording")
    job.variants.route(first)
    assert job.asked == ["SiT-B/2 route 0.5 captured_vanilla"] and len(first.postponed) == 3
    first.write()
    assert first.found["unfinished"].startswith("not measured: SiT-B/2 route 0.5, captured_stage2, SiT-S/2")
    others = [
        f"SiT-{name} route 0.5 {row}" for name in ("B/2", "S/2") for row in ("captured_vanilla", "captured_stage2")
    ]
    job.variants.route(job.new("route"))
    assert job.asked == [*others[1:], others[0]], "the next call measures the others first"


def test_rows_of_the_largest_model_after_one_that_fails_are_measured_by_the_next_call(job: Any) -> None:
    title = "SiT-XL/2 batch 128"
    job.errors[f"{title} captured_vanilla"] = NotCaptured("CUDA ended the recording")
    first = job.new("xl2")
    job.variants.xl2(first)
    assert job.asked == [f"{title} vanilla", f"{title} captured_vanilla"] and first.postponed == [f"{title}, stage2"]
    second = job.new("xl2")
    job.variants.xl2(second)
    assert job.asked == [f"{title} stage2", f"{title} captured_vanilla"]
    assert set(second.found["models"][title]["rows"]) == {"vanilla", "stage2"}


def test_more_blocks_of_the_largest_model_are_recomputed_where_few_do_not_fit(job: Any) -> None:
    first = job.new("memory")
    job.errors["SiT-XL/2 batch 256, 12 recomputed vanilla"] = MemoryError("not enough memory")
    job.variants.memory(first)
    found = [f"SiT-XL/2 batch 256, {n} recomputed" for n in (12, 16)]
    assert job.asked == ["0.94", f"{found[0]} vanilla", f"{found[1]} vanilla", f"{found[1]} stage2"]
    assert [*first.found["models"]] == found[1:] and "MemoryError" in first.found["failed"]
    second = job.new("memory")
    job.variants.memory(second)
    assert job.asked == ["0.94"] and "failed" not in second.found, "what does not fit is not tried again"


@pytest.mark.parametrize(("gigabytes", "batch"), [(151.0, 256), (85.0, 128), (48.0, 64), (24.0, 64)])
def test_batch_of_the_largest_model_fits_the_gpu(job: Any, gigabytes: float, batch: int) -> None:
    job.gpu.total_memory = gigabytes * 1e9
    assert job.variants.largest_batch() == batch


def test_attention_is_timed_over_tokens() -> None:
    """Queries of N pictures with T tokens and h heads are (N, h, T, d) to torch."""
    backends, seen = script("attention_backends"), list[Any]()

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append([tuple(each.shape) for each in args])
            return func(*args, **(kwargs or {}))

    with Shapes():
        backends.once(torch.randn(2, 16, 3 * 24, requires_grad=True), 3)
    assert seen == [[(2, 3, 16, 8)] * 3]


def test_shares_of_a_comparison_by_hand(tmp_path: Path) -> None:
    """100 s with 40 s of steps, of which 10 s are compilation: 30 s of steps remain when it is repeated."""
    around = script("gpu_parts").measures().gpu_around
    spent = {"seconds": 100.0, "steps": 0.4, "training": 0.1, "measuring": 0.3, "other": 0.2}
    found = around.shares(spent, 120.0, 30.0, 200, 2000)
    assert found["share_of_200_steps"] == 0.4 and found["before_s"] == 20 and found["measuring_s"] == pytest.approx(30)
    assert found["share_of_2000_steps"] == pytest.approx(300 / 370)
    x = found["steps_for_85%"] / 200
    assert 30 * x / (30 * x + 70) == pytest.approx(0.85)
    for name, start in (("vanilla-seed0/vanilla", 8.0), ("b-seed0/stage2", 1.0)):
        (tmp_path / name).mkdir(parents=True)
        lines = [{"step": 2 * (k + 1), "seconds": start + 0.5 * k} for k in range(4)]
        (tmp_path / name / "log.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    assert around.clean_steps(tmp_path) == pytest.approx(2 * 8 * 0.25)


@pytest.mark.slow
def test_a_short_comparison_and_the_tests_of_a_gpu_are_parts(tmp_path: Path) -> None:
    parts = script("gpu_parts")
    assert parts.main(["compare", "--out", str(tmp_path), "--toy"]) == 0
    found = read(tmp_path / "compare.json")
    assert 0 < found["share_of_10_steps"] < found["share_of_50000_steps"] < 1 and found["measuring_s"] > 0


def test_tests_of_a_gpu_are_run_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = script("gpu_parts")
    measures, asked = parts.measures(), list[str]()

    def run(words: list[str], **options: Any) -> Any:
        asked.append(words[-1])
        assert (ROOT / words[-1]).is_file() and "on_a_gpu or of_a_gpu" in words and options["timeout"] > 0
        bad = "captured_step" in words[-1]
        said = "FAILED tests/a.py::test_b - assert 1\n1 failed, 2 passed in 3.1s" if bad else "4 passed in 2.0s"
        return SimpleNamespace(stdout=f"{said}\n", stderr="", returncode=int(bad))

    monkeypatch.setattr(measures.subprocess, "run", run)
    job = parts.Job("tests", tmp_path, 100.0)
    measures.tests(job)
    assert tuple(asked) == measures.TESTS and f"{asked[0]}: 4 passed in 2.0s" in parts.items("tests", job.found)
    assert "FAILED tests/a.py::test_b - assert 1; 1 failed, 2 passed in 3.1s" in job.found["failed"]


def test_choices_are_compared_with_the_usual_one() -> None:
    usual = {"ms": 80.0, "first_step_s": 30.2, "loss": 0.5, "grad_norm": 4.0}
    other = {"ms": 78.0, "first_step_s": 41.0, "loss": 0.50001, "grad_norm": 4.4}
    unknown = {"ms": 88.0, "first_step_s": 1.0, "loss": None, "grad_norm": 4.0}
    shown = script("gpu_parts").items("variants", {"choices": {"as it is": usual, "joined": other, "fp8": unknown}})
    assert shown == [
        "as it is 80.00 ms, first step 30 s",
        "joined 78.00 ms (time -2.5%, loss +2e-05, gradient +1e-01), first step 41 s",
        "fp8 88.00 ms (time +10.0%, gradient +0e+00), first step 1 s",
    ]


def test_clock_while_the_gpu_was_busy_is_in_the_table(tmp_path: Path) -> None:
    parts, log = script("gpu_parts"), tmp_path / "b2-gpu.log"
    assert parts.clock(log) == []
    log.write_text("0, 345, 90.2\n97, 1980, 650.5\n99, 1755, 699.9\n98, 1900, 690.0\n97, [N/A], 600\n97, 19")
    assert parts.clock(log) == ["1900 MHz (1755 at least), 700 W at most"]
    assert parts.items("b2", {"machine": {"free_memory": 0.55}}) == ["OTHERS USE THE GPU (55% of its memory was free)"]
    assert parts.items("b2", {"machine": {"free_memory": 0.99}}) == []


def test_a_part_keeps_what_it_measured_before_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that raise, a part that raises, and one that is asked to stop."""
    parts, seen = script("gpu_parts"), list[dict[str, Any]]()

    def pieces(job: Any) -> None:
        job.attempt("one", lambda: {"a_per_s": 2.0})
        seen.append(read(tmp_path / "s2.json"))
        assert not job.attempt("two", lambda: raising(ValueError("no graph")))
        seen.append(read(tmp_path / "s2.json"))
        job.attempt("three", lambda: {"b_per_s": 3.0})

    def stopped(job: Any) -> None:
        pieces(job)
        job.attempt("four", lambda: raising(Interrupted("stopped by SIGTERM")))
        raise AssertionError("it went on")

    measures = SimpleNamespace(machine=lambda toy: {"gpu": None, "cpu": "a", "torch": "2"}, no_gpu=lambda: "no driver")
    monkeypatch.setattr(parts, "measures", lambda: measures)
    measures.PARTS = {"s2": pieces, "b2": stopped, "s4": lambda job: raising(KeyError("loss"))}
    assert parts.main(["s2", "--out", str(tmp_path), "--toy"]) == 1
    assert [set(each) - {"machine", "part_s"} for each in seen[:2]] == [
        {"unfinished", "a_per_s"}, {"unfinished", "a_per_s", "failed"},
    ]  # fmt: skip
    found = read(tmp_path / "s2.json")
    assert found["failed"] == "two: ValueError no graph" and found["b_per_s"] == 3 and "unfinished" not in found
    assert parts.main(["b2", "--out", str(tmp_path), "--toy"]) == 1
    found = read(tmp_path / "b2.json")
    assert (
        found["unfinished"]
        and found["b_per_s"] == 3
        and found["failed"].endswith("; b2: Interrupted stopped by SIGTERM")
    )
    assert parts.main(["s4", "--out", str(tmp_path), "--toy"]) == 1
    assert read(tmp_path / "s4.json")["failed"] == "s4: KeyError 'loss'"
    monkeypatch.setattr(parts, "measures", lambda: raising(ImportError("No module named 'accelerate'")))
    assert parts.main(["xl2", "--out", str(tmp_path), "--toy"]) == 1
    assert read(tmp_path / "xl2.json")["failed"] == "xl2: ImportError No module named 'accelerate'"
    monkeypatch.setattr(parts, "measures", lambda: measures)
    assert parts.main(["around", "--out", str(tmp_path)]) == parts.NO_GPU and not (tmp_path / "around.json").exists()


def test_what_a_killed_part_has_measured_is_in_the_table_which_needs_no_torch(tmp_path: Path) -> None:
    code = """
import os, signal, sys, pathlib, gpu_parts
out, into = map(pathlib.Path, sys.argv[1:])
job = gpu_parts.Job("around", out, 60.0, into=into)
job.attempt("classifier", lambda: {"features_per_s": 1234.5})
assert "torch" not in sys.modules
job.attempt("VAE", lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    (tmp_path / "into").mkdir()
    environment = os.environ | {"PYTHONPATH": SOURCES}
    words = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "into")]
    assert subprocess.run(words, env=environment, check=False).returncode == -signal.SIGKILL
    found = read(tmp_path / "into" / "gpu_lease.json")["around"]
    assert found["features_per_s"] == 1234.5 and found["measuring"] == "VAE"
    (tmp_path / "s2.json").write_text(json.dumps({"failed": "not enough memory"}))
    code = "import sys, gpu_parts; assert gpu_parts.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", code, "table", "--out", str(tmp_path)]
    shown = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    known = {"s2": ["failed: not enough memory"], "around": ["unfinished, stopped in VAE", "features_per_s 1,234"]}
    wanted = []
    for name in script("gpu_parts").PARTS:
        first, *others = known.get(name, ["not measured"])
        wanted += [f"{name:<12} {first}", *(f"{' ':<12} {each}" for each in others)]
    assert shown == wanted


def measured(name: str, rows: dict[str, float]) -> dict[str, Any]:
    """A bench.json of a model with these rows, in milliseconds."""
    each = {"images_per_s": 100.0, "peak_memory_gb": 1.5, "utilisation": 0.25, "first_step_s": 9.0}
    found = {row: each | {"ms": ms} | ({"replayed": True} if "captured" in row else {}) for row, ms in rows.items()}
    return {"models": {name: {"rows": found, "ratios": {"_over_".join(reversed([*rows])): 2.0}, "batch": 256}}}


def test_launched_steps_are_written_before_any_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, asked, captured = script("gpu_parts"), list[Any](), {"captured_vanilla": 10.0, "captured_stage2": 12.0}
    measures = parts.measures()

    def bench(
        models: Any, out: Path, *, rows: tuple[str, ...], limit: float, steps_only: bool, **_: Any
    ) -> dict[str, Any]:
        before = read(tmp_path / f"{out.name.split('-')[1]}.json")
        asked.append((rows, out.name, "models" in before, steps_only))
        assert 0 < limit < 100
        if rows == measures.CAPTURED and isinstance(captured, Exception):
            raise captured
        return measured(next(iter(models)), {"vanilla": 20.0, "stage2": 30.0} if rows == measures.ROWS else captured)

    monkeypatch.setattr(measures.gpu_variants, "bench", bench)
    monkeypatch.setattr(measures, "no_gpu", lambda: None)
    given = ["b2", "--out", str(tmp_path), "--limit", "100"]
    assert parts.main(given) == 0
    assert asked == [
        (("vanilla", "stage2"), "bench-b2-launched", False, True),
        (("captured_vanilla", "captured_stage2"), "bench-b2-captured", True, True),
    ]
    model = read(tmp_path / "b2.json")["models"]["SiT-B/2"]
    assert [*model["rows"]] == ["vanilla", "stage2", "captured_vanilla", "captured_stage2"]
    assert model["ratios"]["captured_vanilla_over_vanilla"] == 0.5 and model["ratios"]["stage2_over_vanilla"] == 2
    assert model["ratios"]["captured_stage2_over_stage2"] == 0.4
    captured = NotCaptured("the step cannot be recorded")  # type: ignore[assignment]
    assert parts.main(given) == 1
    found = read(tmp_path / "b2.json")
    assert [*found["models"]["SiT-B/2"]["rows"]] == ["vanilla", "stage2"]
    said = "b2: failed: captured steps: NotCaptured the step cannot be recorded; SiT-B/2 vanilla 20.0 ms, 100"
    assert said in capsys.readouterr().out
    asked.clear()
    assert parts.main(["s4", "--out", str(tmp_path), "--limit", "15"]) == 1
    assert len(asked) == 1, "too little time is left"
    assert read(tmp_path / "s4.json")["unfinished"] == "not measured: captured steps"
    monkeypatch.setattr(
        measures.gpu_variants, "bench", lambda *_, **__: {"models": {"SiT-B/2": {"failed": "not enough memory"}}}
    )
    assert parts.main(given) == 1
    assert "launched steps: MemoryError not enough memory" in read(tmp_path / "b2.json")["failed"]


def test_losses_are_compared_where_both_have_one() -> None:
    """A skipped update has no loss; captured steps may differ by what the same computation differs by when it is repeated."""
    measures = script("gpu_parts").measures()
    losses = {"eager fp32": [1.0, 2.0, 4.0], "compiled fp16": [None, 2.02, 4.0], "eager bf16": [1.0, None, 5.0]}
    found = measures.checks(losses | {"compiled bf16": [None, None, None]})
    assert found["compiled fp16 / eager fp32"] == {
        "difference": pytest.approx(0.01),
        "steps": 2,
        "allowed": 0.03,
        "passed": True,
    }
    assert found["eager bf16 / eager fp32"]["passed"] is False and found["eager bf16 / eager fp32"]["steps"] == 2
    assert found["compiled bf16 / eager bf16"] == {"difference": None, "steps": 0, "allowed": 0.03, "passed": False}
    runs = {"compiled bf16": [1.0], "compiled bf16 again": [1.001], "captured bf16": [1.003]}
    assert measures.checks(runs)["captured bf16 / compiled bf16"]["passed"] is True
    assert measures.checks(runs | {"compiled bf16 again": [1.0]})["captured bf16 / compiled bf16"]["passed"] is False
    assert "passed" not in measures.checks(runs)["compiled bf16 again / compiled bf16"]
    order = list(measures.variants(gpu=True))
    assert order[:3] == ["eager bf16", "compiled bf16", "captured bf16"] and order[-1] == "compiled fp16"


def test_without_a_gpu_torch_says_why() -> None:
    measures = script("gpu_parts").measures()
    assert (measures.no_gpu() is None) is torch.cuda.is_available()


@pytest.fixture
def lease(tmp_path: Path) -> Any:
    """gpu_lease.sh with scripts in place of Python, which logs its parts, and of nvidia-smi, which finds what GPU says."""
    stub, log, folder = tmp_path / "python", tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text('#!/bin/bash\necho "${GPU:-No devices found}"')
    stub.write_text(
        f"""#!/bin/bash
        echo "$2 $9 ${{PYTHONPATH%%:*}}" >> {log}
        [ "$2" = table ] && {{ echo the table; exit 0; }}
        [ "$2" = "${{NO_GPU:-}}" ] && exit 3
        echo '{{"unfinished": true}}' > $4/$2.json
        tar -czf $6/lease.tgz -C $4 .
        [ "$2" = "${{KILLED:-}}" ] && kill -KILL $$
        echo '{{"passed": true}}' > $4/$2.json
        [ "$2" = "${{FAILS:-}}" ] && {{ echo '{{"failed": "x"}}' > $4/$2.json; echo why >&2; }}
        tar -czf $6/lease.tgz -C $4 .
        [ "$2" != "${{FAILS:-}}" ]
        """
    )
    for each in (stub, folder / "nvidia-smi"):
        each.chmod(0o755)
    words = ["bash", str(ROOT / "benchmarks" / "gpu_lease.sh"), str(tmp_path / "a" / "out")]

    def run(log_file: Path | None = None, **more: str) -> tuple[int, list[str], list[str]]:
        log.write_text("")
        environment = os.environ | {"PYTHON": str(stub), "PATH": f"{folder}:{os.environ['PATH']}"} | more
        with log_file.open("a") if log_file else contextlib.nullcontext(subprocess.PIPE) as err:
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=err, text=True, check=False)
        shown = [*(done.stderr or "").splitlines(), *done.stdout.splitlines()]
        return done.returncode, shown, [each.split()[0] for each in log.read_text().splitlines()]

    return SimpleNamespace(run=run, log=log, out=tmp_path / "a" / "out")


def test_lease_continues_with_what_is_missing_and_then_what_failed(lease: Any) -> None:
    every = script("gpu_parts").PARTS
    code, shown, parts = lease.run(SKIP="around xl2 tuned", FAILS="s2", KILLED="b2")
    assert parts == [*(name for name in every if name not in ("around", "xl2", "tuned")), "table"]
    assert (
        code == 1 and shown[-1] == "the table" and "why" in shown and any("b2: stopped after" in each for each in shown)
    )
    assert "no GPU: tiny models, which show only that the parts run" in shown
    toys = [each.split() for each in lease.log.read_text().splitlines()]
    assert all(each[1] == "--toy" for each in toys[:-1]) and all(each[-1].endswith("/src") for each in toys)
    assert [path.name for path in lease.out.iterdir()] == ["lease.tgz"]
    code, shown, parts = lease.run()
    assert parts == ["xl2", "around", "tuned", "b2", "s2", "table"] and code == 0 and "s4: measured already" in shown
    assert lease.run(ONLY="b2", FRESH="1")[2] == ["b2", "table"]
    code, shown, parts = lease.run(FRESH="1", BUDGET="5")
    assert "s2: skipped, the time is over" in shown and parts == ["table"] and code == 1


def test_lease_on_a_gpu_takes_the_models_themselves(lease: Any) -> None:
    code, _, parts = lease.run(GPU="GPU 0: NVIDIA H100", REQUIRE_GPU="1", ONLY="s2 b2")
    assert code == 0 and parts == ["b2", "s2", "table"] and "--toy" not in lease.log.read_text()
    with tarfile.open(lease.out / "lease.tgz") as packed:
        assert {"./b2-gpu.log", "./s2-gpu.log"} <= set(packed.getnames()), "what nvidia-smi says meanwhile is kept"
    code, shown, parts = lease.run(GPU="GPU 0: NVIDIA H100", NO_GPU="first_step")
    assert parts == ["correctness", "first_step", "table"] and code == 1 and shown[-1] == "the table"


def test_lease_appends_the_list_of_gpus_to_a_log(lease: Any, tmp_path: Path) -> None:
    """What a file held before stays in it, and a GPU is found at any place of a long list."""
    path, names = tmp_path / "all.log", "a warning\n" + "\n".join(f"GPU {i}: NVIDIA H100" for i in range(9000))
    (tmp_path / "list").write_text(names)
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/bash\ncat {tmp_path / 'list'}")
    path.write_text("before\n")
    assert lease.run(path, REQUIRE_GPU="1", ONLY="s2")[2] == ["s2", "table"]
    shown = path.read_text()
    assert shown.startswith(f"before\n{names}\n") and "--toy" not in lease.log.read_text()


def test_lease_that_requires_a_gpu_ends_where_there_is_none(lease: Any) -> None:
    code, shown, parts = lease.run(REQUIRE_GPU="1")
    assert code == 1 and parts == [] and "no GPU was found, and REQUIRE_GPU is set" in shown and not lease.out.exists()
