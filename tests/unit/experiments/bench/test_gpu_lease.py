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

from selftrans.models import fused_bias, fused_norm
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
    for part in ("correctness", "sampling", "around"):
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
    assert set(read(into / "gpu_lease.json")) == {"around", "correctness", "sampling"}
    with tarfile.open(into / "lease.tgz") as packed:
        assert packed.getnames() == ["around.json", "correctness.json", "sampling.json"]
    shown = capsys.readouterr().out
    assert "correctness: passed: eager bf16 / eager fp32 " in shown and "captured fp32 / eager fp32 0.0e+00\n" in shown


def test_first_step_is_one_launched_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that is recorded as a graph is the fourth one."""
    measures, seen = script("gpu_measures"), list[Any]()
    monkeypatch.setattr(measures, "dry_run", lambda config, out, steps: seen.append((config.train.capture, steps)))
    measures.one_step(True)
    assert seen == [("off", 1)] and float(capsys.readouterr().out) >= 0


def test_other_choices_for_the_step_are_measured_one_by_one(tmp_path: Path) -> None:
    parts = script("gpu_parts")
    for part in ("memory", "variants", "tuned"):
        assert parts.main([part, "--out", str(tmp_path), "--toy"]) == 0
    found = read(tmp_path / "memory.json")["models"]
    assert {name: set(each["rows"]) for name, each in found.items()} == {
        "vanilla, 1 recomputed": {"vanilla"}, "stage2, 1 recomputed": {"stage2"},
    }  # fmt: skip
    choices = ("as it is", "norms by inductor", "biases in the kernels", "without cuDNN", "kernels joined")
    choices += ("fewer partial sums",)
    found = read(tmp_path / "variants.json")
    shown = ("ms", "first step s")
    assert {name for name in found if name.startswith("toy")} == {
        f"toy, {each}, {k}" for each in choices for k in shown
    }
    choices = ("as it is", "products tuned", "products tuned, TMA", "other kernels tuned")
    found = read(tmp_path / "tuned.json")
    assert {name for name in found if name.startswith("toy")} == {
        f"toy, {each}, {k}" for each in choices for k in shown
    }
    assert not inductor.max_autotune_gemm and not inductor.coordinate_descent_tuning, "as before"
    assert (importlib.util.find_spec("triton") is not None) == fused_norm.FUSED_NORMS, "as before"
    assert not fused_bias.FUSED_BIASES, "as before"
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_part_keeps_what_it_measured_before_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that raise, a part that raises, and one that is asked to stop."""
    parts, seen = script("gpu_parts"), list[dict[str, Any]]()

    def pieces(job: Any) -> None:
        job.attempt("one", lambda: {"a_per_s": 2.0})
        seen.append(read(tmp_path / "s2.json"))
        assert not job.attempt("two", lambda: raising(NotCaptured("no graph")))
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
    assert found["failed"] == "two: NotCaptured no graph" and found["b_per_s"] == 3 and "unfinished" not in found
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
os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "into").mkdir()
    environment = os.environ | {"PYTHONPATH": SOURCES}
    words = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "into")]
    assert subprocess.run(words, env=environment, check=False).returncode == -signal.SIGKILL
    assert read(tmp_path / "into" / "gpu_lease.json")["around"]["features_per_s"] == 1234.5
    (tmp_path / "s2.json").write_text(json.dumps({"failed": "not enough memory"}))
    code = "import sys, gpu_parts; assert gpu_parts.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", code, "table", "--out", str(tmp_path)]
    shown = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert shown == [
        "correctness  not measured", "s2           failed: not enough memory", "b2           not measured",
        "s4           not measured", "xl2          not measured", "memory       not measured",
        "variants     not measured", "sampling     not measured",
        "first_step   not measured", "around       unfinished; features_per_s 1.23e+03", "tuned        not measured",
    ]  # fmt: skip


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
        before = read(tmp_path / "b2.json")
        asked.append((rows, out.name, "models" in before, steps_only))
        assert 0 < limit < 100
        if rows == measures.CAPTURED and isinstance(captured, Exception):
            raise captured
        return measured(next(iter(models)), {"vanilla": 20.0, "stage2": 30.0} if rows == measures.ROWS else captured)

    monkeypatch.setattr(measures.gpu_variants, "bench", bench)
    monkeypatch.setattr(measures, "sampled", lambda *_: {"sampled_per_s": 7.0})
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
    assert [*found["models"]["SiT-B/2"]["rows"]] == ["vanilla", "stage2"] and "sampled_per_s" not in found
    said = (
        "b2: failed: captured steps: NotCaptured the step cannot be recorded; vanilla 100/s (25.0% of the peak), 1.5 GB"
    )
    assert said in capsys.readouterr().out
    asked.clear()
    assert parts.main(["xl2", "--out", str(tmp_path), "--limit", "20"]) == 0
    assert len(asked) == 1 and "sampled_per_s" not in read(tmp_path / "xl2.json"), "too little time is left"
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
    code, shown, parts = lease.run(SKIP="around xl2 tuned", FAILS="s2", KILLED="b2")
    assert parts == ["correctness", "s2", "b2", "s4", "memory", "variants", "sampling", "first_step", "table"]
    assert (
        code == 1 and shown[-1] == "the table" and "why" in shown and any("b2: stopped after" in each for each in shown)
    )
    assert "no GPU: tiny models, which show only that the parts run" in shown
    toys = [each.split() for each in lease.log.read_text().splitlines()]
    assert all(each[1] == "--toy" for each in toys[:-1]) and all(each[-1].endswith("/src") for each in toys)
    assert [path.name for path in lease.out.iterdir()] == ["lease.tgz"]
    code, shown, parts = lease.run()
    assert parts == ["xl2", "around", "tuned", "s2", "b2", "table"] and code == 0 and "s4: measured already" in shown
    assert lease.run(ONLY="b2", FRESH="1")[2] == ["b2", "table"]
    code, shown, parts = lease.run(FRESH="1", BUDGET="5")
    assert "s2: skipped, the time is over" in shown and parts == ["table"] and code == 1


def test_lease_on_a_gpu_takes_the_models_themselves(lease: Any) -> None:
    code, _, parts = lease.run(GPU="GPU 0: NVIDIA H100", REQUIRE_GPU="1", ONLY="s2 b2")
    assert code == 0 and parts == ["s2", "b2", "table"] and "--toy" not in lease.log.read_text()
    code, shown, parts = lease.run(GPU="GPU 0: NVIDIA H100", NO_GPU="s4")
    assert parts == ["correctness", "s4", "table"] and code == 1 and shown[-1] == "the table"


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
