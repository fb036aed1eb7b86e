"""The plain step has the loss and gradients of the package; measured times and the report are correct."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from selftrans import flow
from selftrans.cli.commands import COMMANDS, Sample
from selftrans.cli.main import main
from selftrans.cli.parse import blank, parse
from selftrans.config import SampleConfig, settings_of
from selftrans.experiments.bench import ROWS, bench, published, settings
from selftrans.experiments.bench import rounds as bench_rounds
from selftrans.experiments.bench.loading_sampling import passes, random_dataset
from selftrans.experiments.bench.machine import Clock, Peak, cpu_name
from selftrans.experiments.bench.plain_step import PlainStep, plain_losses, update_ema
from selftrans.experiments.bench.rounds import PARTS, Memory, in_turn, interleaved, randomise
from selftrans.experiments.bench.text_table import table
from selftrans.experiments.comparison.comparison_settings import for_method
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage2
from selftrans.models.sit import SiTConfig, build
from selftrans.recipes import recipe
from selftrans.train.captured_step import CapturedStep, NotCaptured
from selftrans.types import Batch, Conditions
from tests.support import toy
from tests.support.operations import sit_forward_flops
from tests.support.scripts import script

TEN = Conditions("labels", 10)
SMALL = SiTConfig(width=32, depth=3, heads=2, patch=2)
SHAPE = (4, 8, 8)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_accelerator() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def gradients(loss: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for module in modules for p in module.parameters()]))


@pytest.mark.parametrize("times", ["systematic", "uniform"])
@pytest.mark.parametrize("n", [1, 7, 10])
def test_plain_step_has_the_loss_and_gradients_of_the_package(times: str, n: int) -> None:
    config = settings(SMALL, n, "fp32")
    student, teacher = (build(SMALL, SHAPE, TEN) for _ in range(2))
    randomise(student)
    randomise(teacher)
    whole = copy.deepcopy(teacher)
    ours = SelfGuidance(student, Frozen(teacher, 2), config.sections["stage2"])
    batch = Batch(torch.randn(n, *SHAPE), torch.randint(10, (n,)))
    d = flow.draw(batch, student.null(batch.cond), times=times, drop=0.3)
    expected, report = Objective(student, [ours], times=times).losses(d, 0)
    loss, matched, term = plain_losses(
        student, ours.head, whole, d, config.sections["stage2"], contextlib.nullcontext()
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close((matched.detach(), term.detach()), (report["flow"], report["self"]))
    torch.testing.assert_close(
        gradients(loss, student, ours.head), gradients(expected, student, ours.head), rtol=1e-4, atol=1e-6
    )
    assert n < 7 or report["self"] > 0


def test_plain_vanilla_loss_is_that_of_the_package() -> None:
    student = build(SMALL, SHAPE, TEN)
    randomise(student)
    batch = Batch(torch.randn(5, *SHAPE), torch.randint(10, (5,)))
    d = flow.draw(batch, student.null(batch.cond))
    config = settings(SMALL, 5, "fp32").section(Stage2)
    loss, _, term = plain_losses(student, None, None, d, config, contextlib.nullcontext())
    expected, _ = Objective(student).losses(d, 0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, student), gradients(expected, student))
    assert term == 0


def test_plain_step_updates_weights_and_average() -> None:
    step = PlainStep(settings(SMALL, 4, "fp32"), SHAPE, TEN, CPU, guided=True)
    before = copy.deepcopy(step.model)
    assert step.teacher is not None and not any(p.requires_grad for p in step.teacher.parameters())
    losses = step.forward(Batch(torch.randn(4, *SHAPE), torch.randint(10, (4,))))
    step.backward(losses[0])
    values = step.update(losses)
    assert values[0] == losses[0].item() and len(values) == 3
    pairs = list(zip(step.ema.parameters(), before.parameters(), step.model.parameters(), strict=True))
    assert any(not torch.equal(old, new) for _, old, new in pairs)
    for average, old, new in pairs:
        torch.testing.assert_close(average, 0.9999 * old + 0.0001 * new)
    half, one = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = (half.weight + 3 * one.weight) / 4
    update_ema(half, one, 0.25)
    torch.testing.assert_close(half.weight, expected)


class KnownStep:
    """A step of known length, on a clock of its own."""

    def __init__(self, *parts: float) -> None:
        self.parts, self.steps, self.captured_in, self.replayed = parts, 0, 0.0, False

    def step(self) -> list[float]:
        self.steps += 1
        return list(itertools.accumulate(self.parts, initial=float(self.steps)))


def test_interleaved_steps_measure_known_durations() -> None:
    clock = Clock(CPU)
    slow, fast = KnownStep(0.02, 0.04, 0.06, 0.08), KnownStep(0.01, 0.02, 0.03, 0.04)
    rounds, _ = interleaved(
        {"slow": slow, "fast": fast}, clock, Peak(clock, torch.float32), Memory(CPU), seconds=0, least=4
    )
    assert slow.steps == fast.steps == 6, "the first steps are not counted"
    assert {name: len(each) for name, each in rounds.items()} == {"slow": 4, "fast": 4, "matmul": 4}
    for name, shortest in (("slow", 0.02), ("fast", 0.01)):
        for one in rounds[name]:
            assert [one[part] for part in PARTS] == pytest.approx([shortest * (i + 1) for i in range(4)])
            assert one["total"] == pytest.approx(10 * shortest)
    assert set(rounds["matmul"][0]) == {"512", "1024", "2048"} and all(s > 0 for s in rounds["matmul"][0].values())


def test_ways_take_turns_and_their_first_round_is_not_counted() -> None:
    calls: list[str] = []
    seconds = in_turn({name: partial(calls.append, name) for name in "ab"}, Clock(CPU), rounds=3)
    assert "".join(calls) == "baabbaab" and {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_rounds_continue_for_the_given_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that adds 0.5 s whenever it is read, a round takes 1 s; the last one ends within 4.5 s."""
    clock, ticks = Clock(CPU), itertools.count(0, 0.5)
    monkeypatch.setattr(bench_rounds, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    one, peak = KnownStep(0.1, 0.1, 0.1, 0.1), SimpleNamespace(measure=dict)
    rounds, _ = interleaved({"one": one}, clock, peak, Memory(CPU), seconds=4.5, least=1)  # type: ignore[arg-type]
    assert len(rounds["one"]) == 3


def test_no_round_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = Clock(CPU), itertools.count(0, 0.5)
    monkeypatch.setattr(bench_rounds, "time", SimpleNamespace(monotonic=lambda: next(now)))
    peak = SimpleNamespace(measure=dict)
    for deadline, rounds in ((0.0, 1), (1e9, 3)):
        one = {"one": KnownStep(0.1, 0.1, 0.1, 0.1)}
        found, first = interleaved(one, clock, peak, Memory(CPU), seconds=0, deadline=deadline)  # type: ignore[arg-type]
        assert len(found["one"]) == rounds and first == {"one": 0.5}


def test_chosen_rows_within_a_limit(tmp_path: Path) -> None:
    rows = ("vanilla", "stage2")
    found = bench(
        {"a": SMALL}, tmp_path, batch_size=4, tokens=16, device="cpu", seconds=0, quick=True, rows=rows, limit=0
    )
    small = found["models"]["a"]
    assert list(small["rows"]) == list(rows) and small["rounds"] == 1 and "sampling" not in small
    assert set(small["ratios"]) == {"stage2_over_vanilla"} and all(
        r["first_step_s"] > 0 for r in small["rows"].values()
    )
    assert "sampling was not measured" in table(found) and "loading was not measured" in table(found)
    with pytest.raises(ValueError, match="row 'stage3' is unknown"):
        bench({"a": SMALL}, tmp_path, rows=("stage3",))


def test_out_of_memory_model_is_reported_and_the_next_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("selftrans.experiments.bench")
    measure = module._steps

    def one(accelerator: Any, config: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        if config.model.depth == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(accelerator, config, *rest, **options)

    monkeypatch.setattr(module, "_steps", one)
    models = {"large": dataclasses.replace(SMALL, depth=4), "small": SMALL}
    found = bench(models, tmp_path, batch_size=4, tokens=16, device="cpu", seconds=0, quick=True)
    assert "rows" not in found["models"]["large"] and found["ratios"] == found["models"]["small"]["ratios"]
    assert "large, 16 tokens, batch 4: not enough memory" in table(found)
    assert json.loads((tmp_path / "bench.json").read_text()) == found


def test_row_that_cannot_be_captured_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before it is on disk, a model without memory for its graph included."""
    step = CapturedStep.take

    def take(self: CapturedStep, batches: Any) -> None:
        if self.trainer.config.model.depth == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.trainer.config.model.depth == 4:
            raise NotCaptured("as the trainer says it") from RuntimeError("no such kernel\nmore")
        step(self, batches)

    monkeypatch.setattr(CapturedStep, "take", take)
    large, deep = (dataclasses.replace(SMALL, depth=depth) for depth in (5, 4))
    models = {"large": large, "small": SMALL, "deep": deep}
    given = {"batch_size": 4, "tokens": 16, "device": "cpu", "seconds": 0, "quick": True, "steps_only": True}
    with pytest.raises(
        NotCaptured, match=r"^captured_vanilla cannot be captured \(no such kernel\); leave it out of --rows$"
    ):
        bench(models, tmp_path, rows=("captured_vanilla",), limit=0, **given)  # type: ignore[arg-type]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["models"]) == ["large", "small"] and "not enough memory" in found["models"]["large"]["failed"]
    assert "sampling" not in found["models"]["small"] and "loading" not in found


def test_random_dataset_can_be_read(tmp_path: Path) -> None:
    dataset = random_dataset(tmp_path, SHAPE, 600, classes=7)
    dataset.verify()
    moments, labels = (dataset.read(torch.arange(600))[name] for name in ("moments", "labels"))
    assert moments.shape == (600, 1, 8, 8, 8) and labels.max() == 6
    assert (moments[:, :, 4:] >= 0).all() and moments[:, :, :4].float().std().item() == pytest.approx(1, abs=0.02)


def test_passes_are_counted_on_the_sampling_grid() -> None:
    """Twenty steps from t = 1, 0.95 ...: thirteen of them at 0.65 or below, each of two passes, seven of one."""
    assert passes(20) == (13 * 2 + 7) / 40


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    out = tmp_path_factory.mktemp("bench")
    rows = (*ROWS, "captured_stage2")
    found = bench({"small": SMALL}, out, batch_size=10, tokens=16, device="cpu", seconds=0, quick=True, rows=rows)
    assert json.loads((out / "bench.json").read_text()) == json.loads(json.dumps(found))
    return found


def test_report_is_consistent(report: dict[str, Any]) -> None:
    machine, small = report["machine"], report["models"]["small"]
    assert machine["device"] == "cpu" and machine["dtype"] == "fp32" and machine["cpu"] == cpu_name()
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    five = ["vanilla", "stage1", "stage2", "plain_vanilla", "plain_stage2"]
    assert list(ROWS) == five and list(small["rows"]) == [*five, "captured_stage2"]
    assert small["rounds"] >= 3 and (small["batch"], small["tokens"]) == (10, 16)
    for name, row in small["rows"].items():
        assert row["images_per_s"] * row["ms"] == pytest.approx(10_000)
        parts = [row[f"{part}_ms"] for part in PARTS]
        assert parts == 4 * [None] if name == "captured_stage2" else all(part > 0 for part in parts)
        assert row["peak_memory_gb"] is None and row.get("replayed") is (False if name == "captured_stage2" else None)
        assert 0 < row["utilisation"] < 1
    assert report["ratios"] == small["ratios"] and set(small["ratios"]) == {
        "stage1_over_vanilla",
        "stage2_over_vanilla",
        "plain_stage2_over_stage2",
        "plain_stage2_over_vanilla",
        "plain_vanilla_over_vanilla",
        "captured_stage2_over_stage2",
        "sampling_interval_over_full",
    }
    for name, (low, high) in small["ratios_range"].items():
        assert 0 < low <= small["ratios"][name] <= high
    assert all(rate > 0 for name, rate in report["loading"].items() if name.endswith("per_s"))
    assert small["sampling"]["passes_interval_over_full"] == 0.825


def test_utilisation_counts_only_needed_operations(report: dict[str, Any]) -> None:
    """Stage 2 and the plain stage 2 differ only in time: superfluous operations are not counted."""
    small = report["models"]["small"]
    needed = {name: row["utilisation"] * row["ms"] for name, row in small["rows"].items()}
    assert needed["plain_stage2"] == pytest.approx(needed["stage2"])
    assert needed["captured_stage2"] == pytest.approx(needed["stage2"])
    assert needed["plain_vanilla"] == pytest.approx(needed["vanilla"])
    # by hand: 12 D² products per block and token, 2 T D for attention, and 6 D² per image in each block's modulation
    d, tokens, patch = 32, 16, 16
    block = 12 * d * d * tokens + 2 * tokens * tokens * d + 6 * d * d
    rest = 2 * tokens * patch * d + 2 * d * d + 256 * d + d * d
    image = 2 * (3 * block + rest)
    operations = small["matmul_peak_tflops"] * 1e12 * needed["vanilla"] / 1e3
    assert operations == pytest.approx(3 * 10 * image, rel=0.01)


def test_table_shows_the_report(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    text = table(report)
    assert (
        "stage 2, plain" in text and "stage 2, graph" in text and "stage2_over_vanilla" in text and "latents/s" in text
    )
    assert f"{report['ratios']['stage1_over_vanilla']:.3f}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "10"], "tokens 10 is not a square number; use 64, 256 or 1024"),
        (["--models", "SiT-Q/2"], "model.name 'SiT-Q/2' is unknown"),
        (["--rows", "captured_vanila"], "row 'captured_vanila' is unknown; did you mean captured_vanilla"),
        (["--batch-size", "0"], "batch_size 0 should be 1 or more"),
        (["--device", "cuda"], "this machine has no GPU that torch can use"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr().err
    assert output.startswith("selftrans: ") and message in output and output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_default_models_of_each_device() -> None:
    assert list(published(None, "cpu", quick=True)) == ["SiT-S/2"]
    assert list(published(None, "cpu")) == ["SiT-S/2", "SiT-B/2"]
    assert list(published(None, "cuda")) == ["SiT-S/2", "SiT-B/2", "SiT-XL/2"]
    assert published(["SiT-L/4"], "cpu") == {"SiT-L/4": SiTConfig(name="SiT-L/4")}


# ---- the scripts in benchmarks/


def test_ablations_change_the_recipe_as_named() -> None:
    for name, dotted in script("ablations").VARIANTS.items():
        config = for_method(recipe("digits").override(dotted)).check()
        found = {path: value for path, value, _ in settings_of(config)}
        assert {path: found[path] for path in dotted} == dotted, name


def test_protocols_of_published_figures_are_options_that_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = script("published_figures"), Path(__file__).parents[4] / "docs" / "published-figures.md"
    given = ["runs/b2", "--out", "results/b2", "--reference", "VIRTUAL_imagenet256_labeled.npz", "--print"]
    assert figures.main(given) == 0
    assert capsys.readouterr().out.strip() in page.read_text(encoding="utf-8")
    for name in figures.PROTOCOLS:
        sample, measure = figures.commands("run", "out", "reference.npz", name)
        for words in (sample, measure):
            command = parse(blank(COMMANDS[words[0]]), words[1:], "selftrans", kind=COMMANDS[words[0]], see="selftrans")
            assert name in page.read_text(encoding="utf-8") and str(command.out).startswith("out")
        settings = parse(blank(Sample), sample[1:], "selftrans", kind=Sample, see="selftrans").sampling.given()
        SampleConfig(**settings | {"labels": "random"}).check()
        original = name.startswith("sit")
        assert settings["rounding"] == ("nearest" if original else "down") and settings["labels"] == ("random",)
        assert settings.get("guidance_channels") == (3 if name == "sit-guided" else None)


def test_shard_reads_are_compared_with_plain_files(tmp_path: Path) -> None:
    reads = script("shard_reads")
    dataset = reads.random_dataset(tmp_path / "data", (3, 8, 8), 40)
    found = reads.compare(dataset, tmp_path, batch_size=8, rounds=3, streamed=True)
    assert found["plain_ms"] > 0 and found["streamed_latents_per_s"] > 0 and found["safetensors_ms"] > 0
    low, high = found["speed_ratio_range"]
    assert low <= found["speed_ratio"] <= high


def test_ablations_combine_every_setting_of_a_grid() -> None:
    found = script("ablations").with_grid({"w5": {"stage2.scale": 5.0}}, ["train.lr=1e-3,2e-3", "model.label_std=0.5"])
    shared = {"stage2.scale": 5.0, "model.label_std": 0.5}
    assert found == {
        "w5-lr=1e-3-label_std=0.5": shared | {"train.lr": 0.001},
        "w5-lr=2e-3-label_std=0.5": shared | {"train.lr": 0.002},
    }
    taught = script("ablations").with_grid({"w5": {}}, ['stage2.teacher="../runs/a"'])
    assert taught == {"w5-teacher=_.._runs_a_": {"stage2.teacher": "../runs/a"}}, "a name is that of one folder"


def test_floor_of_a_step_counts_the_operations_of_its_blocks() -> None:
    floor = script("step_floor")
    chip = floor.Chip(flops=1e15, bandwidth=1e30)  # bytes take no time
    found = floor.step("SiT-B/2", 4, chip)
    blocks = sit_forward_flops(256, 768, 12, 16) - sit_forward_flops(256, 768, 0, 16)
    assert found["operations"] == pytest.approx(3 * 4 * blocks)
    attention = 4 * 12 * 4 * 256**2 * 768  # its backward pass has five products instead of four
    assert found["seconds"] == pytest.approx((3 * 4 * blocks + 0.5 * attention) / 1e15)
    bytes_alone = floor.step("SiT-B/2", 4, floor.Chip(flops=1e30, bandwidth=1e12))
    per_block = sum(part["bytes"] for part in bytes_alone["block"].values())
    assert bytes_alone["seconds"] == pytest.approx((12 * per_block + 52 * found["parameters of the blocks"]) / 1e12)


@pytest.mark.slow
def test_ablations_are_compared(tmp_path: Path) -> None:
    command = [sys.executable, script("ablations").__file__, "digits", "--out", str(tmp_path), "--workers", "1"]
    command += ["--steps", "2", "--seeds", "0", "--images", "12", "--variants", "vanilla", "vanilla-uniform"]
    toy.small_digits_classifier(tmp_path / "digits-classifier.safetensors")
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["method"] for row in report["table"]] == ["vanilla", "vanilla-uniform"]
    configs = [json.loads((tmp_path / f"{row['method']}-seed0" / "config.json").read_text()) for row in report["table"]]
    assert [each["train"]["times"] for each in configs] == ["systematic_logitnormal", "uniform"]


def test_every_change_is_measured() -> None:
    changes = script("changes")
    table = changes.measure(changes.ways(SMALL, 10, CPU), Clock(CPU), rounds=1)
    assert len(table) == 5 and all(row["plain_ms"] > 0 and row["ours_ms"] > 0 for row in table)


def test_prompt_control_takes_other_methods_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    control = script("text_control")
    words = ["--out", "x", "--methods", "repa", "--set", "repa.weight=1.0", "stage2.until_step=null"]
    with pytest.raises(SystemExit):
        control.options_of(words)
    assert "repa needs --encoder" in capsys.readouterr().err
    for wrong in ("repa.weight", "train.times=uniform"):
        with pytest.raises(SystemExit):
            control.options_of(["--out", "x", "--set", wrong])
        assert f"--set: '{wrong}' should be SECTION.FIELD=JSON, such as" in capsys.readouterr().err
    config = control.settings_of(control.options_of([*words, "--encoder", "folder", "--steps", "20"]))
    repa, stage2 = config.sections["repa"], config.sections["stage2"]
    assert (repa.weight, repa.encoder, repa.head_width) == (1.0, "folder", 128)
    assert (stage2.until_step, config.train.steps) == (None, 20)


def test_prompt_control_reads_the_measured_checkpoints_and_prints_a_table(tmp_path: Path) -> None:
    control = script("text_control")
    stage = tmp_path / "stage1" / "checkpoints"
    for step in (2, 4, 6, 8, 10):
        folder = stage / f"step-{step:08d}"
        folder.mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"stage": "stage1"}]}))
    assert [folder.name for folder in control.checkpoints(tmp_path)] == ["step-00000004", "step-00000010"]
    names = list(control.ATTRIBUTES)
    row = {"digit": [0.5, 0.4, 0.6], **{name: {"pearson": [0.3, 0.2, 0.4]} for name in names}}
    final = {"method": "vanilla", "wording": "trained", "scale": 2.0, "distance": [1.0, 3.0], **row}
    along = {"method": "vanilla", "step": 4, "distance": [5.0], **row}
    lines = control.as_text({"scans": row, "final": [final], "along": [along]}).splitlines()
    cells = ["trained", "2.0", "vanilla", "0.500 [0.400, 0.600]", *["0.300 [0.200, 0.400]"] * len(names), "2.0"]
    assert lines[3] == "| " + " | ".join(cells) + " |"
    assert lines[4] == "vanilla 4: 0.500" + " 0.300" * len(names) + " 5.000"
