"""The captured step against the uncaptured one, bit for bit, and what a graph needs of the step: no value read, no new code."""

from __future__ import annotations

import contextlib
import gc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from selftrans.data.dataset import Dataset
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.registry import stages
from selftrans.train import captured_step, trainer
from selftrans.train.batches import draw_batch, inputs_of, seed_step
from selftrans.train.captured_step import WARM_UP, Invalidated, NotCaptured, Recorded
from selftrans.train.optim import optimizer_tensors
from selftrans.train.out_of_memory import guarded_step
from selftrans.train.run import train
from selftrans.train.signals import Interrupted
from selftrans.train.trainer import Trainer
from tests.support import toy
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
    means = {f"{name}/{k}": v for name, w in (("window", one.window), ("span", one.span)) for k, v in w.means().items()}
    held = {f"objective/{k}": v for k, v in one.objective.state_dict().items()}
    held |= {f"ema/{k}": v for k, v in one.ema.model.state_dict().items()}
    held |= {f"optimizer/{k}": v for k, v in optimizer_tensors(one.optimizer.optimizer, one.objective).items()}
    return {k: v.detach().clone() for k, v in (held | means).items()}


def steps(one: Trainer, count: int = STEPS) -> dict[str, torch.Tensor]:
    batches = one.stream.from_step(0)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(count):
            one._train_step(batches)
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


STREAM = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda _: None)


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
            owner._capturing = True
            found = self.function()
            owner._capturing = False
            self._out = found if self._out is None or not len(self._out) else self._out.copy_(found)

        made.append(self)
        self._graph, self._out = SimpleNamespace(replay=replay), torch.zeros(0)  # type: ignore[assignment]

    monkeypatch.setattr(Recorded, "capture", capture)
    for name, value in {
        "current_stream": lambda *_: STREAM,
        "stream": lambda _: contextlib.nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
        "set_stream": lambda _: None,
        "synchronize": lambda *_: None,
        "max_memory_allocated": lambda _: 30,
        "memory_allocated": lambda _: 10,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
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


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_equal_launched_steps(tmp_path: Path, case: str) -> None:
    """Micro-batches, clipping, warm-up, weight decay, skipped updates, the end of a guidance, terms that fade."""
    launched = steps(built(tmp_path, "off", CASES[case]))
    one = built(tmp_path, "on", CASES[case])
    assert one.captured is not None
    toy.assert_same(steps(one), launched)
    assert one.nonfinite.skipped == 2 and float(launched["window/flow"]) > 0


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
        one._train_step(batches)
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
        one._train_step(batches)
    with warnings.catch_warnings(action="ignore"):
        for _ in range(STEPS - WARM_UP - 1):
            one._train_step(batches)
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
        one._train_step(batches)
    assert isinstance(e.value, ValueError), "which the command line shows as one line"
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


@pytest.mark.parametrize(
    ("inner", "end", "kind", "said"),
    [
        (None, None, None, ""),
        ("reads a value", None, RuntimeError, "reads a value"),
        ("reads a value\nmore", "stream capture invalidated", Invalidated, "reads a value"),
        (None, "stream capture unjoined", Invalidated, "stream capture unjoined"),
    ],
)
def test_a_recording_that_cuda_has_ended_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, inner: str | None, end: str | None, kind: type[Exception] | None, said: str
) -> None:
    """As torch.cuda.graph: leaving it raises where CUDA has ended the recording, else it ends it."""

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Any:
        try:
            yield
        finally:
            if end:
                raise RuntimeError(end)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    one = Recorded(lambda: raising(RuntimeError(inner)) or torch.zeros(1) if inner else torch.ones(1), None)
    with pytest.raises(kind, match=f"^{said}") if kind else contextlib.nullcontext() as caught:
        one.capture((0, 0))
    assert (one._graph == "a graph") is (kind is None) and (caught is None or type(caught.value) is kind)


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
    one._train_step(batches)
    assert collecting == [False, False] and freed == [1, 1] and gc.isenabled()
    assert one.captured is not None and one.captured.replaying


@pytest.mark.usefixtures("spoilt")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_graphs_on_a_gpu_equal_launched_steps(tmp_path: Path, case: str, compiled: bool) -> None:
    settings = CASES[case] | {"train.compile": compiled}
    launched = steps(built(tmp_path, "off", settings, cpu=False), 9)
    one = built(tmp_path, "on", settings, cpu=False)
    captured = steps(one, 9)
    assert one.captured is not None and one.captured._micro._graph is not None, "it went on without a graph"
    assert one.nonfinite.skipped == 2 and captured.keys() == launched.keys()
    for name, value in launched.items():
        if name.startswith(("window/", "span/")):
            assert float(captured[name]) == pytest.approx(float(value), rel=1e-4), name


def test_interrupted_captured_run_equals_a_launched_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, stopped after every fifth step: weights, moments, checkpointed means and log lines."""
    launched, asked = toy.finished(), list[int]()
    monkeypatch.setattr(trainer.StopSignal, "asked", lambda *_: asked.append(0) or len(asked) % 5 == 0)
    for _ in range(5):
        with contextlib.suppress(Interrupted):
            train(toy.toy({"train.capture": "on"}), tmp_path, quiet=True)
    assert len(asked) == 12
    toy.assert_same_run(tmp_path, launched)


def test_one_graph_without_a_break_serves_all_steps(tmp_path: Path) -> None:
    """dynamo traces draws, student, teacher and losses as one piece of code, on tensors without values."""
    from torch._dynamo.utils import counters

    one = built(tmp_path, "off", CASES["labels"] | {"train.accumulate": 1})
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


OBSTACLES = [
    ({"device": "mps"}, "CUDA graphs need a CUDA GPU, this device is mps"),
    ({"processes": 2}, "it is for one process"),
    (
        {"recompute": frozenset({1})},
        "train.recompute repeats blocks that may draw random numbers",
    ),
    ({"precision": "fp16"}, "the gradient scaler of fp16 is not captured; use bf16"),
    ({"optimizer": "adamw8bit"}, "train.optimizer adamw8bit decides on the host whether a step is skipped"),
    ({"parts": (3, 4)}, "the data hold several sizes, and a graph has one shape"),
]


@pytest.mark.parametrize(("what", "reason"), OBSTACLES)
def test_where_no_step_can_be_captured_one_line_says_why(what: dict[str, Any], reason: str) -> None:
    given = {"device": "cuda", "processes": 1, "precision": "bf16", "optimizer": "adamw", "parts": (3,)}
    given = given | {"recompute": False} | what
    for capture in ("on", "auto"):
        settings = SimpleNamespace(capture=capture, precision=given["precision"], optimizer=given["optimizer"])
        one: Any = SimpleNamespace(
            config=SimpleNamespace(train=settings),
            accelerator=SimpleNamespace(device=SimpleNamespace(type=given["device"]), num_processes=given["processes"]),
            shards=SimpleNamespace(parts=given["parts"]),
            objective=SimpleNamespace(
                student=SimpleNamespace(recompute=given["recompute"], random_blocks=True),
                times="systematic",
            ),
        )
        assert captured_step.obstacle(one) == reason
        if capture == "on":
            with pytest.raises(ValueError, match=f"^train.capture on is not possible: {reason}; leave it off"):
                captured_step.captured_step(one)
        elif given["device"] == "cuda":
            with pytest.warns(UserWarning, match=f"^train.capture auto: steps are not captured: {reason}$"):
                assert captured_step.captured_step(one) is None
        else:
            assert captured_step.captured_step(one) is None


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
