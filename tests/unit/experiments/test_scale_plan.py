"""`selftrans plan`: its arithmetic against closed forms, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from selftrans.cli.main import main
from selftrans.experiments.scale_plan import StageScale, scale_plan, text
from selftrans.experiments.step_cost import Cluster, read_measured, wire_bytes
from selftrans.methods.registry import meta_objective, stages
from selftrans.recipes import recipe
from selftrans.train.flops import forward_flops
from selftrans.types import Conditions
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture

#: seconds of a step of 100 images, 0.2 s of it for the optimiser; 1e9 multiply-adds of a forward pass (SiT, table 1)
MODELS = {"SiT-B/2": (2.0, 23.01), "SiT-S/2": (1.0, 6.06)}
SMALL: dict[str, Any] = {"model.name": "SiT-S/2"} | dict.fromkeys(
    ("model.width", "model.depth", "model.heads", "data.path", "data.shape", "data.classes")
)


def bench(path: Path, change: Any = None) -> Path:
    """A bench.json of a device with 10 TFLOP/s: vanilla, both stages (half as long again), and a plain row.

    A step has three forward passes. Stage 2 has two more, of 30 % of the images through two thirds of the blocks.
    """
    report: dict[str, Any] = {"machine": {"gpu": "Test GPU", "cpu": "none"}, "models": {}}
    for name, (seconds, giga) in MODELS.items():
        forward = 2e9 * giga * 100 / 10e12  # seconds of 100 images at the peak
        row = {"ms": 1e3 * seconds, "optimiser_ms": 200.0, "peak_memory_gb": 12.0, "utilisation": 3 * forward / seconds}
        guided = row | {"ms": 1500 * seconds, "utilisation": 3.4 * forward / (1.5 * seconds)}
        rows = {"vanilla": row, "stage1": row, "stage2": guided, "plain_vanilla": row}
        report["models"][name] = {"batch": 100, "tokens": 256, "matmul_peak_tflops": 10.0, "rows": rows}
    if change:
        change(report)
    path.write_text(json.dumps(report))
    return path


def config(**dotted: Any) -> Any:
    small = {"data.builtin": None, "data.shape": (1, 8, 8), "data.classes": 10, "model.name": "SiT-B/2"}
    return toy.toy(
        small
        | {"train.batch_size": 80, "train.accumulate": 1, "train.steps": 1000, "train.times": "systematic"}
        | dotted
    )


def test_bytes_on_the_wire() -> None:
    assert wire_bytes(400, 400, 1, sharded=False) == wire_bytes(400, 400, 1, sharded=True) == 0
    assert wire_bytes(999, 400, 2, sharded=False) == 400  # each sends half of the gradients, then half of the sums
    assert wire_bytes(999, 400, 8, sharded=False) == 2 * 7 * 400 / 8
    assert wire_bytes(800, 400, 4, sharded=True) == 3 * (800 + 800 + 400) / 4
    assert wire_bytes(800, 400, 4, sharded=True, accumulate=3) == 3 * (6 * 800 + 400) / 4
    assert wire_bytes(800, 400, 4, sharded=True, accumulate=3, average=100) == 3 * (6 * 800 + 3 * 100 + 400) / 4


def test_average_that_teaches_is_gathered() -> None:
    def sent(method: str, **options: Any) -> int:
        settings = {"train.shard": True, "method": method} | options
        return scale_plan(config(**settings), Cluster(2), rate=1.0).stages[0].wire_bytes

    run = config()
    model: Any = meta_objective(run, stages(run)[0], (1, 8, 8), Conditions("labels", 10)).student
    block = 4 * sum(p.numel() for p in model.blocks[1].parameters())
    deep, shallow = (sent("sra", **{"sra.block": 1, "sra.target_block": k}) for k in (2, 1))
    assert deep - shallow == block / 2, "each of two has half, and sends it"
    assert shallow > sent("vanilla"), "embedding, first block and head"


def test_ring_is_as_fast_as_its_slowest_link() -> None:
    assert Cluster(8, 8, link=100, local=1000).seconds(125e6) == pytest.approx(1e-3)
    assert Cluster(16, 8, link=100, local=1000).seconds(125e6) == pytest.approx(1e-2)
    assert Cluster(16, 8).machines == 2 and Cluster(4, 8).machines == 1


def test_steps_of_the_measured_model(tmp_path: Path) -> None:
    cluster = Cluster(8, 4, link=1.0, local=100.0)
    plan = scale_plan(config(**SMALL), cluster, measured=bench(tmp_path / "bench.json"))
    second = plan.stages[1]
    assert (second.name, second.steps, second.batch_per_gpu) == ("stage2", 1000, 10)
    assert second.tflops_per_step == pytest.approx(80 * 3.4 * 2 * 6.06e-3, rel=0.01)
    assert second.compute_seconds == pytest.approx((1.5 - 0.2) / 100 * 10 + 0.2, rel=0.01)
    assert second.wire_bytes == round(2 * 7 / 8 * 4 * second.trained)
    assert second.wire_seconds == pytest.approx(8 * second.wire_bytes / 1e9)
    low, high = max(second.compute_seconds, second.wire_seconds), second.compute_seconds + second.wire_seconds
    assert second.step_seconds == pytest.approx((low, high))
    assert second.images_per_s == pytest.approx((80 / low, 80 / high))
    assert second.hours == pytest.approx((1000 * low / 3600, 1000 * high / 3600))
    assert plan.hours[0] == pytest.approx(sum(stage.hours[0] for stage in plan.stages))
    assert plan.gpu_hours == pytest.approx([8 * hours for hours in plan.hours])
    assert second.memory["gradients"] == 4 * second.trained and "buckets" not in second.memory, "gradients lie in them"
    held = sum(size for name, size in second.memory.items() if name != "activations")
    assert second.memory["activations"] == pytest.approx((12e9 - held) * 10 / 100)
    assert second.memory["optimizer"] == 8 * second.trained and second.checkpoint > 3 * 4 * second.parameters
    row = 2 * 2 * 4 * 32 * 32 + 8  # mean and std in float16, label in int64
    assert plan.latents_bytes == plan.samples * row
    assert plan.read_bytes_per_s == pytest.approx(max(s.images_per_s[0] for s in plan.stages) * row / 2)
    assert any("Test GPU, batch 100" in line for line in plan.assumed)
    assert not any("not measured" in line or line.startswith("activations") for line in plan.assumed)


def step(stage: StageScale, seconds: float, forwards: float, fixed: float, giga: float = 6.06) -> Any:
    """Seconds of 80 images at as many operations per second as a measured step of 100, and the fixed part."""
    work = stage.tflops_per_step / 80 / (forwards * 2e-3 * giga)
    return pytest.approx(work * (seconds - 0.2) / 100 * 80 + fixed)


def test_other_models_by_operations_and_parameters(tmp_path: Path) -> None:
    """The part of a step that does not depend on the batch, such as the optimiser, goes by the student's parameters alone."""
    measured = bench(tmp_path / "bench.json", lambda report: report["models"].pop("SiT-S/2"))
    row = read_measured(measured, "SiT-S/2").rows["stage2"]
    assert row.flops == pytest.approx(3.4 * 2 * 23.01e9)
    plan = scale_plan(config(**SMALL), Cluster(1), measured=measured)
    assert plan.stages[1].parameters == 32_861_968
    fixed = 0.2 * 32_861_968 / 130_306_576  # of SiT-B/2
    assert plan.stages[1].compute_seconds == step(plan.stages[1], 3.0, 3.4, fixed, 23.01)
    assert plan.stages[1].wire_bytes == 0
    assert any("stage1, stage2 of SiT-S/2: not measured in these sizes" in line for line in plan.assumed)
    given = scale_plan(config(), Cluster(1), rate=160.0)
    assert given.stages[1].compute_seconds == pytest.approx(80 / 160)
    ratio = given.stages[0].tflops_per_step / given.stages[1].tflops_per_step
    assert given.stages[0].compute_seconds == pytest.approx(ratio * 80 / 160)


def test_smaller_teacher_leaves_the_optimiser_of_the_student(tmp_path: Path) -> None:
    """Half the blocks of stage 1 are half its operations. Stage 2 trains the same student, with a cheaper teacher."""
    measured = bench(tmp_path / "bench.json")
    plan = scale_plan(config(**SMALL, **{"stage2.teacher_depth": 6}), Cluster(1), measured=measured)
    first, second = plan.stages
    assert first.tflops_per_step == pytest.approx(80 * 3 / 2 * 2 * 6.06e-3, rel=0.02)
    assert second.tflops_per_step == pytest.approx(80 * 3.2 * 2 * 6.06e-3, rel=0.01)
    block = 18 * 384**2 + 15 * 384 + 4 * 64  # attention, MLP and modulation: weights, biases, norms of queries and keys
    assert first.parameters == second.parameters - 6 * block
    assert second.compute_seconds == step(second, 1.5, 3.4, 0.2)
    assert first.compute_seconds == step(first, 1.0, 3.0, 0.2 * first.parameters / second.parameters)
    assert first.memory["activations"] == 80 * 6 * 68 * 256 * 384  # 34 bytes in 16 bits, 68 in 32
    assert any("stage1, stage2 of SiT-S/2: not measured" in line for line in plan.assumed)
    assert any(line.startswith("activations: 34 bytes") for line in plan.assumed)


@pytest.mark.parametrize(
    ("own", "forwards"), [({"model.depth": 6}, 1.5), ({"data.shape": (4, 16, 16)}, 0.698)], ids=["depth", "tokens"]
)
def test_own_size_under_a_published_name_is_not_what_was_measured(
    tmp_path: Path, own: dict[str, Any], forwards: float
) -> None:
    """Half the blocks: half the operations. A quarter of the tokens: less than a quarter, as attention is quadratic."""
    plan = scale_plan(config(**SMALL | own), Cluster(1), measured=bench(tmp_path / "bench.json"))
    first = plan.stages[0]
    assert first.tflops_per_step == pytest.approx(80 * forwards * 2 * 6.06e-3, rel=0.02)
    assert first.compute_seconds == step(first, 1.0, 3.0, 0.2 * first.parameters / 32_861_968)
    assert any("stage1, stage2 of SiT-S/2: not measured in these sizes" in line for line in plan.assumed)


def test_average_that_teaches_is_counted() -> None:
    """SRA: 80 images pass through two of three blocks of the average, too, besides three passes of the student."""
    runs = [config(method=name, **{"sra.head_width": 16}) for name in ("vanilla", "sra")]
    vanilla, sra = (scale_plan(run, Cluster(1), rate=1.0).stages[0] for run in runs)
    labels = toy.Conditions("labels", 10)
    teacher = forward_flops(runs[0].build_model((1, 8, 8), labels), labels.example(), (2,), stop=True)
    head = 16 * 2 * (32 * 16 + 16 * 16 + 16 * 32)  # 16 tokens, three layers
    assert sra.tflops_per_step - vanilla.tflops_per_step == pytest.approx(80 * (3 * head + teacher) / 1e12)


def test_recomputed_blocks_keep_their_input() -> None:
    def activations(**options: Any) -> int:
        plan = scale_plan(config(**{"train.precision": "fp32"} | options), Cluster(1), rate=1.0)
        return plan.stages[0].memory["activations"]

    every, blocks = activations(), config().model.depth
    block = every // blocks  # 68 bytes for each token and channel, of which the input takes 4
    inputs = block // 68 * 4
    assert activations(**{"train.recompute": 1}) == every + inputs, "one at a time: the first is computed again alone"
    assert activations(**{"train.recompute": 2}) == every - block + 2 * inputs
    assert activations(**{"train.recompute": True}) == block + blocks * inputs


def test_sharding_divides_weights_and_not_the_teacher() -> None:
    whole, parts = (scale_plan(config(**{"train.shard": s}), Cluster(8), rate=1.0).stages[1] for s in (False, True))
    for name, size in whole.memory.items():
        assert parts.memory[name] == (size if name in ("teacher", "activations") else size // 8)


def test_ddp_keeps_sums_of_micro_batches_beside_its_buckets() -> None:
    def memory(world: int, **options: Any) -> dict[str, int]:
        return scale_plan(config(**{"train.accumulate": 2} | options), Cluster(world), rate=1.0).stages[1].memory

    assert memory(8)["buckets"] == memory(8)["gradients"]
    assert "buckets" not in memory(1) and "buckets" not in memory(8, **{"train.shard": True})


def test_settings_that_were_not_measured_change_its_time_and_memory(tmp_path: Path) -> None:
    """Blocks that are computed again: a third more operations for all of them, and activations by the same rule as without a
    measurement. Moments of 8 bits: the same activations, as the peak was that of 32 bits."""
    measured = bench(tmp_path / "bench.json")

    def second(**options: Any) -> StageScale:
        return scale_plan(config(**SMALL, **options), Cluster(1), measured=measured).stages[1]

    plain, again, half, small = (
        second(**each)
        for each in ({}, {"train.recompute": True}, {"train.recompute": 6}, {"train.optimizer": "adamw8bit"})
    )
    assert again.tflops_per_step == plain.tflops_per_step, "those that the method needs"
    more = 80 * 1.3 / 100 * (1 / 3.4)  # of 3.4 forward passes in 1.5 s, 0.2 s of it for the optimiser
    assert again.compute_seconds - plain.compute_seconds == pytest.approx(more, rel=0.01)
    assert half.compute_seconds - plain.compute_seconds == pytest.approx(more / 2, rel=0.01)
    share = (68 + 12 * 4) / (12 * 68)  # one block of 68 bytes, and the inputs of all in float32
    assert again.memory["activations"] == pytest.approx(share * plain.memory["activations"])
    assert small.memory["activations"] == plain.memory["activations"]
    assert sum(small.memory.values()) < sum(plain.memory.values())


def test_blocks_that_a_smaller_teacher_does_not_have_are_not_computed_again() -> None:
    options = {"model.depth": 6, "stage2.teacher_depth": 2, "train.recompute": 4}
    first, second = scale_plan(config(**options), Cluster(1), rate=1.0).stages
    assert first.memory["activations"] == 80 * (68 + 2 * 4) * 16 * 32
    assert second.memory["activations"] == 80 * (3 * 68 + 4 * 4) * 16 * 32


@pytest.mark.parametrize(
    ("gpus", "options", "kept", "seconds", "said"),
    [
        (1, {}, ("stage2", "captured_stage2"), 0.6, "batch 100, as CUDA graphs"),
        (1, {"train.capture": "off"}, ("stage2", "captured_stage2"), 1.5, "batch 100; images"),
        (2, {}, ("stage2", "captured_stage2"), 1.5, "batch 100; images"),
        (2, {}, ("captured_stage2",), 0.6, "measured as CUDA graphs, which this run has not"),
        (1, {}, ("stage2",), 1.5, "batch 100; images"),
        (1, {"train.precision": "bf16"}, ("stage2",), 1.5, "in fp32, and train.precision is bf16"),
    ],
)
def test_rows_of_graphs_are_for_runs_that_have_them(
    tmp_path: Path, gpus: int, options: dict[str, Any], kept: tuple[str, ...], seconds: float, said: str
) -> None:
    """Several processes launch their steps, which takes small models several times as long."""

    def change(report: dict[str, Any]) -> None:
        report["machine"]["dtype"] = "fp32"
        rows = report["models"]["SiT-S/2"]["rows"]
        launched = rows["stage2"]
        graph = launched | {"ms": 600.0, "optimiser_ms": None, "utilisation": launched["utilisation"] * 2.5}
        report["models"]["SiT-S/2"]["rows"] = {k: graph if "capt" in k else launched for k in kept}

    measured = bench(tmp_path / "bench.json", change)
    plan = scale_plan(config(**SMALL, **options), Cluster(gpus), measured=measured)
    fixed = 0.2 if seconds == 1.5 else 0.0
    expected = (seconds - fixed) / 100 * 80 / gpus + fixed
    assert plan.stages[1].compute_seconds == pytest.approx(expected, rel=0.01)
    assert any(said in line for line in plan.assumed), plan.assumed


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (7, {"rate": 1.0}, "train.batch_size 80 does not divide among 7 GPUs x 1 micro-batch"),
        (20, {"rate": 1.0}, "20 GPUs do not divide into machines of 8"),
        (0, {"rate": 1.0}, "--gpus is 0; it must be a number above zero"),
        (8, {}, "give --measured bench.json, made by `selftrans bench`"),
        (8, {"rate": 0.0}, "--rate is 0; it must be a number above zero"),
        (8, {"rate": math.nan}, "--rate is nan; it must be a number above zero"),
        (8, {"rate": math.inf}, "--rate is inf; it must be a number above zero"),
        (8, {"rate": 1.0, "measured": Path("missing.json")}, "give --measured bench.json"),
        (8, {"measured": Path("missing.json")}, "missing.json is not a bench.json"),
    ],
)
def test_what_is_refused(gpus: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        scale_plan(config(), Cluster(gpus), **options)


def test_links_are_finite_and_assumed_data_are_named_where_the_model_takes_others() -> None:
    with pytest.raises(ValueError, match="--link-gbps is inf; it must be a number above zero"):
        scale_plan(config(), Cluster(2, link=math.inf), rate=1.0)  # plan.json would not be json
    with pytest.raises(ValueError, match=r"is conditioned on text.*are assumed: give --data DIR"):
        scale_plan(recipe("mmdit_coco"), Cluster(1), rate=1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.clear(),
        lambda report: report.update(models=[]),
        lambda report: report["models"]["SiT-B/2"].update(batch=0),
        lambda report: report["models"]["SiT-B/2"].update(rows={"vanilla": {"ms": "x"}}),
        lambda report: report["models"]["SiT-B/2"]["rows"]["vanilla"].update(ms=1.0),
        lambda report: [model.pop("rows") for model in report["models"].values()],
    ],
)
def test_damaged_measurements_are_one_line(tmp_path: Path, change: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a bench.json \(.*selftrans bench") as error:
        read_measured(bench(tmp_path / "bench.json", change), "SiT-B/2")
    assert "\n" not in str(error.value)


def test_command_writes_json_and_says_what_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bench(tmp_path / "bench.json")
    words = ["plan", "sit_imagenet_b2", "--gpus=64", "--measured=bench.json", "--model.depth=2", "--model.width=64"]
    assert main([*words, "--model.heads=2"]) == 0
    shown = capsys.readouterr().out
    assert "64 GPUs in 8 machines, batches of 256" in shown and "4 images per GPU" in shown and "assumed:" in shown
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["cluster"]["machines"] == 8 and [s["name"] for s in found["stages"]] == ["stage1", "stage2"]
    assert found["samples"] == 1_281_167 and found["latents_bytes"] == 1_281_167 * (2 * 8 * 32 * 32 + 8)
    assert main(["plan", "digits", "--gpus=2", "--rate=1"]) == 1
    assert "give --data DIR" in capsys.readouterr().err
    assert text(scale_plan(config(), Cluster(1), rate=1.0)).startswith(
        "digits, SiT-B/2: 1 GPU in 1 machine, batches of 80"
    )
