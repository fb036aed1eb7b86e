"""The captured step against the uncaptured one, bit for bit, and what a graph needs of the step: no value read, no new code."""

from __future__ import annotations

import contextlib
import gc
import pickle
import warnings
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from selftrans.data.dataset import Dataset
from selftrans.graphs import WARM_UP, Invalidated, Recorded
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.registry import stages
from selftrans.train import trainer
from selftrans.train.batches import draw_batch, inputs_of, seed_step
from selftrans.train.capture_rules import NotCaptured
from selftrans.train.captured_step import Phase
from selftrans.train.optim import optimizer_tensors
from selftrans.train.out_of_memory import between_steps, guarded_step
from selftrans.train.preview import Preview
from selftrans.train.run import train
from selftrans.train.signals import Interrupted
from selftrans.train.trainer import Trainer
from tests.support import toy
from tests.support.recorder import STREAM, without_gpu
from tests.support.toy import quick  # noqa: F401 - a fixture

STEPS = WARM_UP + 4
SPOILT = {1, WARM_UP + 1}  #: steps (0-based) whose loss is not finite: before and after the capture


def built(folder: Path, capture: str, settings: dict[str, Any], *, cpu: bool = True) -> Trainer:
    """A trainer of the last stage, with a teacher of random weights where it has one."""
    AcceleratorState._reset_state(True)
    config = toy.toy({"train.capture": capture, "train.warmup": 2, "train.weight_decay": 0.1} | settings)
    stage, shards = stages(config)[-1], Dataset.open(toy.digits())
    frozen = None
    if stage.teacher:
        torch.manual_seed(1)
        model = config.build_model(shards.manifest.shape, shards.manifest.conditions)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        frozen = Frozen(model, 2)
    return Trainer(Accelerator(cpu=cpu), config, stage, folder, shards, teacher=frozen)


def state(one: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a step changes, by name."""
    one._read()
    means = {
        f"{name}/{k}": v
        for name, w in (("log", one.since_log), ("checkpoint", one.since_checkpoint))
        for k, v in w.means().items()
    }
    held = {f"objective/{k}": v for k, v in one.objective.state_dict().items()}
    held |= {f"ema/{k}": v for k, v in one.ema.model.state_dict().items()}
    held |= {f"optimizer/{k}": v for k, v in optimizer_tensors(one.optimizer, one.objective).items()}
    return {k: v.detach().clone() for k, v in (held | means).items()}


def steps(one: Trainer, count: int = STEPS) -> dict[str, torch.Tensor]:
    batches = one.stream.from_step(0)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(count):
            one.train_step(batches)
        return state(one)


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of the steps `SPOILT` are not finite."""
    original = Objective.forward

    def forward(self: Objective, batch: Any, step: Any) -> Any:
        loss, report = original(self, batch, step)
        for number in SPOILT:
            loss = loss * torch.where(torch.as_tensor(step, device=loss.device) == number, float("nan"), 1.0)
        return loss, report

    monkeypatch.setattr(Objective, "forward", forward)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Graphs without a GPU: what is captured runs at each replay, into the same output; those captured are returned.

    Gradients that are made within a graph are made anew, as by a replay.
    """
    made: list[Recorded] = []

    def capture(self: Recorded, pool: Any) -> None:
        owner: Any = self.function.__self__  # type: ignore[attr-defined]

        def replay() -> None:
            if self is owner._micro and not owner._held:
                owner.trainer.objective.zero_grad(set_to_none=True)
            owner.phase = Phase.RECORDING
            found = self.function()
            owner.phase = Phase.REPLAYING
            self._out = found if self._out is None or not len(self._out) else self._out.copy_(found)

        made.append(self)
        self._graph, self._out = SimpleNamespace(replay=replay), torch.zeros(0)  # type: ignore[assignment]

    monkeypatch.setattr(Recorded, "capture", capture)
    without_gpu(monkeypatch)
    return made


def on_stream(one: Trainer) -> Any:
    """The captured step of a trainer, as on a GPU."""
    captured: Any = one.captured
    captured._stream = STREAM
    captured.restart()
    return captured


CASES = {
    "vanilla": {"method": "vanilla", "train.accumulate": 1},
    "structure": {"method": "structure"},
    "self": {"method": "self_transcendence", "stage2.until_step": 4, "stage2.fade": 0.5, "train.accumulate": 1},
    "labels": {"method": "self_transcendence", "stage2.until_step": 40, "stage2.label_part": "decay"},
    "sra": {"method": "sra", "sra.head_width": 16},
}
SELF = {"method": "self_transcendence", "train.accumulate": 1}
#: on a CPU alone: a GPU has minutes
MORE = {
    "routed": SELF | {"model.route": 0.5, "stage2.until_step": 40},
    "scale": {"method": "structure", "stage1.range_mode": "scale"},
    "logit-normal times": SELF | {"train.times": "systematic_logitnormal"},
    "all times": SELF | {"stage2.timestep_range": None, "train.times": "uniform"},
    "layersync": {"method": "layersync", "layersync.block": 1, "layersync.target_block": 2},
    "dispersive": {"method": "dispersive"},
    "terms of the flow loss": {"method": "vanilla", "train.cosine": 0.5, "train.contrastive": 0.1},
    "DiT": SELF | {"model.name": "DiT-S/2", "model.route": 0.5},
    "LightningDiT": SELF | {"model.name": "LightningDiT-S/1", "model.patch": 2},
}


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("case", CASES | MORE)
def test_captured_steps_equal_launched_steps(tmp_path: Path, case: str) -> None:
    """Micro-batches, clipping, warm-up, weight decay, skipped updates, ends of guidance, terms that fade, routed tokens."""
    settings = (CASES | MORE)[case]
    launched = steps(built(tmp_path, "off", settings))
    one = built(tmp_path, "on", settings)
    assert one.captured is not None
    toy.assert_same(steps(one), launched)
    assert one.nonfinite.skipped == 2 and float(launched["log/flow"]) > 0


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("parts", [1, 2])
def test_replays_equal_launched_steps(tmp_path: Path, graphs: list[Recorded], parts: int) -> None:
    """Two graphs after the warm-up, and two others after the end of a guidance."""
    settings = CASES["self"] | {"train.accumulate": parts}
    launched = steps(built(tmp_path, "off", settings), 9)
    one = built(tmp_path, "on", settings)
    captured = on_stream(one)
    toy.assert_same(steps(one, 9), launched)
    assert len(graphs) == 4 and graphs[2:] == [captured._micro, captured._update]
    assert captured.transient == 20 and bool(captured._held) == (parts > 1)


def asking(one: Trainer, capture: str) -> Trainer:
    """The same trainer with another `train.capture`."""
    one.config = one.config.override({"train.capture": capture})
    return one


#: what a recording meets -> how it fails, and the reason that is shown
FAILURES = {
    "fails": (lambda: raising(RuntimeError("no such kernel\nsecond line")), "no such kernel"),
    "draws": (lambda: torch.rand(1), "random numbers are drawn on the CPU"),
    "invalidated": (lambda: raising(Invalidated("operation not permitted when stream is capturing")), "operation not"),
}


def raising(error: Exception) -> None:
    raise error


def warmed_up(folder: Path, settings: dict[str, Any]) -> tuple[Trainer, Any]:
    one = built(folder, "on", settings)
    on_stream(one)
    batches = one.stream.from_step(0)
    for _ in range(WARM_UP):
        one.train_step(batches)
    return one, batches


@pytest.mark.usefixtures("spoilt", "graphs")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("why", ["fails", "draws"])
def test_step_that_cannot_be_captured_goes_on_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, why: str
) -> None:
    """With `auto`, where the recording could be ended."""
    settings, (failure, said) = CASES["vanilla"] | {"train.accumulate": parts}, FAILURES[why]
    launched = steps(built(tmp_path, "off", settings))
    monkeypatch.setattr(Recorded, "capture", lambda self, pool: failure())
    one, batches = warmed_up(tmp_path, settings)
    asking(one, "auto")
    with pytest.warns(UserWarning, match=f"goes on without a graph: {said}[^\n]*$"):
        one.train_step(batches)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(STEPS - WARM_UP - 1):
            one.train_step(batches)
        toy.assert_same(state(one), launched)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    ("capture", "why"), [("on", "fails"), ("on", "draws"), ("on", "invalidated"), ("auto", "invalidated")]
)
def test_run_ends_where_a_step_cannot_be_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: str, why: str
) -> None:
    """With `on`; with `auto`, where CUDA ended the recording, after which torch cannot go on. Nothing has been changed."""
    failure, said = FAILURES[why]
    monkeypatch.setattr(Recorded, "capture", lambda self, pool: failure())
    one, batches = warmed_up(tmp_path, CASES["vanilla"])
    before = state(asking(one, capture))
    with pytest.raises(
        NotCaptured, match=f"^train.capture {capture}: the step cannot be recorded as a graph \\({said}"
    ) as e:
        one.train_step(batches)
    assert isinstance(e.value, ValueError), "which the command line shows as one line"
    restarts = f"CUDA ended the recording of the step as a graph ({said}"
    assert e.value.reason.startswith(restarts) if capture == "auto" else e.value.reason == ""
    assert str(e.value).endswith("the same command with --train.capture off continues from the last checkpoint")
    assert "\n" not in str(e.value) and one.step == WARM_UP
    toy.assert_same(state(one), before)


@pytest.mark.usefixtures("graphs")
def test_out_of_memory_while_recording_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `on`: the graph that was recorded before is freed, and the run ends; the same step had memory without a graph."""
    capture = Recorded.capture

    def second_fails(self: Recorded, pool: Any) -> None:
        if self is captured._update:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        capture(self, pool)

    monkeypatch.setattr(Recorded, "capture", second_fails)
    one, batches = warmed_up(tmp_path, CASES["vanilla"])
    captured: Any = one.captured
    with pytest.raises(
        MemoryError, match=r" while it is recorded as a graph; without one it fits: use --train.capture off, or "
    ) as caught:
        guarded_step(one, batches)
    assert "\n" not in str(caught.value) and one.step == WARM_UP
    assert captured._micro._graph is None and not captured.replaying


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("capture", ["on", "auto"])
def test_replay_without_memory_ends_the_run_and_auto_continues_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capture: str
) -> None:
    """One line says it; the error of `auto` tells what repeats a command that a new process continues."""
    one, batches = warmed_up(tmp_path, CASES["vanilla"])
    asking(one, capture).train_step(batches)
    replays = RuntimeError("CUDA out of memory: not enough memory")
    monkeypatch.setattr(type(one.captured), "_fill", lambda self, loaded: raising(replays))
    with pytest.raises(NotCaptured if capture == "auto" else MemoryError) as caught:
        guarded_step(one, batches)
    said = " while graphs keep that of the step before; without one it fits: use --train.capture off, or "
    assert said in str(caught.value) and "\n" not in str(caught.value)
    reason = "a step of vanilla had no memory while graphs kept that of the step before"
    assert pickle.loads(pickle.dumps(caught.value)).__dict__ == ({"reason": reason} if capture == "auto" else {})


@pytest.mark.usefixtures("graphs")
def test_memory_of_a_recording_that_had_none_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `auto`: tensors of the recording are gone when the allocator returns its memory, then the step goes on."""
    alive, freed = list[weakref.ref[torch.Tensor]](), list[list[bool]]()

    def fails(self: Recorded, pool: Any) -> None:
        activations = torch.ones(1)
        alive.append(weakref.ref(activations))
        failed: RuntimeError | None = None
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
        except RuntimeError as error:
            failed = error  # as `Recorded.capture`: the frame and the error refer to each other
        raise failed

    monkeypatch.setattr(Recorded, "capture", fails)
    one, batches = warmed_up(tmp_path, CASES["vanilla"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append([tensor() is None for tensor in alive]))
    with pytest.warns(UserWarning, match="goes on without a graph: CUDA out of memory. Tried to allocate 20.00 GiB$"):
        asking(one, "auto").train_step(batches)
    assert freed == [[], [True]] and one.step == WARM_UP + 1


@pytest.mark.usefixtures("spoilt")
def test_graphs_that_would_take_most_of_the_memory_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[Recorded]
) -> None:
    """With `auto`, without a warning; the numbers of the steps are the same."""
    launched = steps(built(tmp_path, "off", CASES["self"]), 9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (39, 100))
    one = built(tmp_path, "on", CASES["self"])
    captured = on_stream(asking(one, "auto"))
    batches = one.stream.from_step(0)
    with warnings.catch_warnings(action="error"):
        for _ in range(4):
            one.train_step(batches)
    with warnings.catch_warnings(action="ignore"):  # of skipped updates
        for _ in range(5):
            one.train_step(batches)
        toy.assert_same(state(one), launched)
    assert graphs == [] and captured.reason.startswith("graphs would keep ") and not captured._held


@pytest.mark.parametrize("capture", ["auto", "on"])
def test_step_that_waits_for_the_device_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[Recorded], capture: str
) -> None:
    """With `auto`: torch's check finds it in the step before, so that CUDA ends no recording; other warnings are shown."""
    modes, original = [0], Objective.forward
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def forward(self: Objective, batch: Any, step: Any) -> Any:
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
        return original(self, batch, step)

    monkeypatch.setattr(Objective, "forward", forward)
    one = built(tmp_path, "on", CASES["vanilla"])
    on_stream(asking(one, capture))
    batches = one.stream.from_step(0)
    with warnings.catch_warnings(record=True) as warned:
        for _ in range(WARM_UP):
            one.train_step(batches)
    shown = [str(each.message) for each in warned]
    if capture == "on":
        one.train_step(batches)
        assert (shown, modes, len(graphs)) == ([], [0], 2)
        return
    assert (shown, modes) == (["another warning"], [0, "warn", 0, "warn", 0])
    said = r"an operation waits for the device at test_captured_step.py:\d+, which a graph cannot"
    with pytest.warns(UserWarning, match=f"goes on without a graph: {said}$"):
        one.train_step(batches)
    assert graphs == []


@pytest.mark.parametrize("parts", [1, 2])
def test_graphs_are_freed_for_work_that_has_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[Recorded], parts: int
) -> None:
    """A preview after the fifth step; it is made again when the memory is free, and training goes on launched."""
    settings = CASES["vanilla"] | {"train.accumulate": parts, "train.preview_every": 5}
    made, seen = list[Any](), list[Any]()

    def make(self: Preview, model: Any, path: Path) -> None:
        held = one.captured is not None and one.captured.replaying
        made.append((held, len(seen), any(p.grad is not None for p in one.objective.parameters())))
        if held:
            seen.append("failed")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    launched = steps(built(tmp_path, "off", settings))
    monkeypatch.setattr(Preview, "_make", make)
    one, batches = warmed_up(tmp_path, settings)
    asking(one, "auto").preview = Preview(one.config, one.shards, torch.device("cpu"))
    for _ in range(WARM_UP, 5):
        one.train_step(batches)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("freed"))
    said = "^train.capture auto: a preview had no memory while graphs kept theirs; from step 5 on, steps are launched"
    with pytest.warns(UserWarning, match=said) as warned:
        one._preview(False)
    assert len(warned) == 1 and made == [(True, 0, True), (False, 2, False)] and seen == ["failed", "freed"]
    for _ in range(5, STEPS):
        one.train_step(batches)
    toy.assert_same(state(one), launched)
    assert len(graphs) == 2 and one.captured is not None and not one.captured.replaying


@pytest.mark.usefixtures("graphs")
def test_graphs_that_were_asked_for_stay(tmp_path: Path) -> None:
    """With `on`; and with `auto` after an error of another kind. The error is that of the work."""
    one, batches = warmed_up(tmp_path, CASES["vanilla"])
    one.train_step(batches)
    for capture, error in (("on", torch.OutOfMemoryError("CUDA out of memory.")), ("auto", RuntimeError("no kernel"))):
        with pytest.raises(type(error), match=str(error)):
            between_steps(asking(one, capture), "a preview", lambda error=error: raising(error))  # type: ignore[misc]
        assert one.captured is not None and one.captured.replaying
    assert between_steps(one, "a preview", lambda: 3) == 3


@pytest.mark.usefixtures("graphs")
def test_nothing_is_collected_during_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier trainer's graph, freed then, would end it."""
    collecting, freed = list[bool](), list[int]()
    capture = Recorded.capture

    def noted(self: Recorded, pool: Any) -> None:
        collecting.append(gc.isenabled())
        freed.append(len(dead))
        capture(self, pool)

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            dead.append(1)

    dead: list[int] = []
    monkeypatch.setattr(Recorded, "capture", noted)
    one, batches = warmed_up(tmp_path, CASES["vanilla"])
    gc.disable()
    Cycle()
    gc.enable()
    one.train_step(batches)
    assert collecting == [False, False] and freed == [1, 1] and gc.isenabled()
    assert one.captured is not None and one.captured.replaying


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.usefixtures("spoilt")
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_graphs_on_a_gpu_equal_launched_steps(tmp_path: Path, case: str, compiled: bool) -> None:
    settings = CASES[case] | {"train.compile": compiled}
    launched = steps(built(tmp_path, "off", settings, cpu=False), 9)
    one = built(tmp_path, "auto", settings, cpu=False)
    captured = steps(one, 9)
    assert one.captured is not None and one.captured.replaying, "it went on without a graph"
    assert one.nonfinite.skipped == 2
    assert_close(captured, launched)


def assert_close(found: dict[str, torch.Tensor], launched: dict[str, torch.Tensor]) -> None:
    """The means of the log: on a GPU the rate is rounded, and kernels add in another order."""
    assert found.keys() == launched.keys()
    for name, value in launched.items():
        if name.startswith(("log/", "checkpoint/")):
            assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name


@needs_gpu
def test_memory_of_graphs_on_a_gpu_is_returned(tmp_path: Path) -> None:
    """To work that had none, after which the steps go on."""
    settings = CASES["labels"] | {"train.accumulate": 1, "train.compile": False}
    launched = steps(built(tmp_path, "off", settings, cpu=False))
    one = built(tmp_path, "auto", settings, cpu=False)
    batches = one.stream.from_step(0)

    def reserved() -> int:
        if one.captured is not None and one.captured.replaying:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.cuda.memory_reserved()

    for _ in range(WARM_UP + 2):
        one.train_step(batches)
    kept = torch.cuda.memory_reserved()
    with pytest.warns(UserWarning, match="a preview had no memory while graphs kept theirs"):
        assert between_steps(one, "a preview", reserved) < kept
    for _ in range(WARM_UP + 2, STEPS):
        one.train_step(batches)
    assert_close(state(one), launched)


@needs_gpu
def test_value_read_on_the_host_of_a_gpu_is_found_before_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the process can go on: a recording that CUDA ends leaves torch unable to draw random numbers."""
    original, settings = Objective.forward, CASES["vanilla"] | {"train.compile": False}

    def reads(self: Objective, batch: Any, step: Any) -> Any:
        loss, report = original(self, batch, step)
        assert loss.item() > 0
        return loss, report

    launched = steps(built(tmp_path, "off", settings, cpu=False))
    monkeypatch.setattr(Objective, "forward", reads)
    one = built(tmp_path, "auto", settings, cpu=False)
    batches = one.stream.from_step(0)
    for _ in range(WARM_UP):
        one.train_step(batches)
    with pytest.warns(
        UserWarning, match=r"without a graph: an operation waits for the device at test_captured_step\.py:"
    ):
        one.train_step(batches)
    for _ in range(WARM_UP + 1, STEPS):
        one.train_step(batches)
    assert_close(state(one), launched)


def test_interrupted_captured_run_equals_a_launched_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, stopped after every fifth step: weights, moments, checkpointed means and log lines. The second visit is
    by a machine without a GPU, where `auto` launches the steps."""
    launched, asked = toy.finished(), list[int]()
    monkeypatch.setattr(trainer.StopSignal, "asked", lambda *_: asked.append(0) or len(asked) % 5 == 0)
    for capture in ("on", "auto", "on"):
        with contextlib.suppress(Interrupted):
            train(toy.toy({"train.capture": capture}), tmp_path, quiet=True)
    assert len(asked) == 12
    toy.assert_same_run(tmp_path, launched)


@pytest.mark.parametrize("case", ["labels", "scale", "routed", "LightningDiT"])
def test_one_graph_without_a_break_serves_all_steps(tmp_path: Path, case: str) -> None:
    """dynamo traces draws, student, teacher and losses as one piece of code, on tensors without values."""
    from torch._dynamo.utils import counters

    one = built(tmp_path, "off", (CASES | MORE)[case] | {"train.accumulate": 1})
    space, objective = one.shards.manifest.latent_space, one.objective

    def losses(inputs: Any, step: torch.Tensor) -> torch.Tensor:
        return objective(draw_batch(inputs, space), step)[0]

    def seen(function: Any) -> list[float]:
        found = []
        for number, loaded in zip(range(4), one.stream.from_step(0), strict=False):
            seed_step(0, 0, number, 0, 0)
            loss = function(inputs_of(loaded, one.shards, torch.device("cpu")), torch.tensor(number))
            loss.backward()
            found.append(float(loss))
        return found

    torch.compiler.reset()
    counters.clear()
    compiled = seen(torch.compile(losses, fullgraph=True, backend="aot_eager"))
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    for buffer in objective.guidances.buffers():
        buffer.zero_()  # the means of the labels are those of earlier steps
    assert compiled == pytest.approx(seen(losses), rel=1e-6)
    torch.compiler.reset()


class Launched(TorchDispatchMode):
    """The operations that Python calls on the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in ("detach", "select", "view", "alias"):  # of no kernel
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("case", ["vanilla", "labels", "routed"])
def test_a_replayed_step_launches_two_graphs_and_seven_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """As docs/step.md says: rows, labels, step, rate, two of the report, the average."""
    one = built(tmp_path, "on", (CASES | MORE)[case] | {"train.accumulate": 1})
    captured, replayed = on_stream(one), list[Any]()
    batches = one.stream.from_step(0)
    for _ in range(WARM_UP + 2):
        one.train_step(batches)
    assert captured.replaying
    for function in (captured._micro, captured._update):
        replay = partial(replayed.append, function)
        monkeypatch.setattr(function, "_graph", SimpleNamespace(replay=replay))  # what is within launches nothing
    with Launched() as launched:
        one.train_step(batches)
    assert replayed == [captured._micro, captured._update]
    assert sorted(launched.names) == ["_foreach_lerp_", "clone", "copy_", "copy_", "copy_", "fill_", "fill_"]


@pytest.mark.parametrize("case", ["structure", "self"])
def test_a_range_of_independent_times_is_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    """The number of samples inside is read by the host in every step."""
    uniform = CASES[case] | {"train.times": "uniform"}
    with pytest.raises(
        ValueError, match=r"train.capture on is not possible: with train.times uniform a range of t sel"
    ):
        built(tmp_path / "a", "on", uniform)
    section = "stage1" if case == "structure" else "stage2"
    for whole in ({f"{section}.timestep_range": None}, {f"{section}.range_mode": "scale"}):
        assert built(tmp_path / "b", "on", uniform | whole).captured is not None
