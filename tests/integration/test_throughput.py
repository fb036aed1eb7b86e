"""What makes a step fast changes none of its numbers, and is compiled once."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from selftrans.checkpoints import format as checkpoint
from selftrans.config import Data, Log, RunConfig, Train, sections
from selftrans.data.dataset import Dataset
from selftrans.data.on_device import OnDevice
from selftrans.data.prepare import prepare_digits
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import stages
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.compiling import compile_model
from selftrans.models.sit import SiT, SiTConfig
from selftrans.train.batches import Stream, to_batch
from selftrans.train.run import train
from selftrans.train.trainer import Trainer


def config(method: str = "vanilla", **settings: object) -> RunConfig:
    """Two blocks on the digits, ten images a step."""
    options = {"steps": 6, "batch_size": 10, "preview_every": 0, "checkpoint_every": 1000} | settings
    return RunConfig(
        recipe="digits",
        method=method,
        model=SiTConfig(width=32, depth=2, heads=2, patch=2),
        sections=sections(
            Stage1(steps=6, block=1, head_width=16),
            Stage2(student_block=1, teacher_block=1, until_step=None, head_width=16),
        ),
        train=Train(**options),  # type: ignore[arg-type]
        log=Log(every=1000, tensorboard=False),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True)


def trainer(
    accelerator: Accelerator, settings: RunConfig, shards: Dataset, room: Path, teacher: Frozen | None = None
) -> Trainer:
    """The last stage of `settings.method`."""
    return Trainer(accelerator, settings, stages(settings)[-1], room, shards, teacher=teacher)


def frozen(settings: RunConfig, shards: Dataset) -> Frozen:
    """A teacher with something to say: random weights everywhere."""
    model = settings.build_model(shards.manifest.shape, shards.manifest.conditions)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Frozen(model, 1)


# ---- the set on the device


def test_a_resident_set_gives_the_same_batches(shards: Dataset) -> None:
    resident = OnDevice(shards, "cpu")
    rows = np.array([0, 1796, 5, 5, 1024, 1023])
    ours, theirs = resident.read(rows), shards.read(torch.from_numpy(rows))
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in shards.names
    )
    streams = (Stream(x, batch_size=7, accumulate=1, seed=3).from_step(250) for x in (shards, resident))
    for _, one, two in zip(range(20), *streams, strict=False):  # over the end of an epoch
        assert np.array_equal(one[0], two[0])
        batches = []
        for drawn in (one, two):
            torch.manual_seed(1)
            batches.append(to_batch(drawn, shards, torch.device("cpu")))
        assert all(torch.equal(a, b) for a, b in zip(*(batch[:2] for batch in batches), strict=True))
    with pytest.raises(ValueError, match=r"indices -1 .. 1797 are outside the 1797 pictures"):
        resident.read(np.array([-1, 1797]))


def test_a_run_on_a_resident_set_is_the_same_run(shards: Dataset, tmp_path: Path) -> None:
    weights = []
    for on_device in (False, True):
        out = tmp_path / str(on_device)
        settings = dataclasses.replace(config(), data=Data(path=str(shards.path), on_device=on_device))
        train(settings, out, quiet=True)
        weights.append(checkpoint.weights_sha256(next(out.glob("vanilla/checkpoints/*/student.safetensors"))))
    assert weights[0] == weights[1]
    longer = dataclasses.replace(settings, data=Data(path=str(shards.path)), train=Train(**_steps(settings, 8)))
    train(longer, tmp_path / "True", quiet=True)  # may change between two visits


def _steps(settings: RunConfig, steps: int) -> dict:
    return dataclasses.asdict(settings.train) | {"steps": steps}


def test_a_device_without_room_is_told_in_one_line(shards: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 21 GiB\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ValueError, match=r"needs 0.0 GB, more than cpu has free \(out of memory.*on_device off$"):
        OnDevice(shards, "cpu")


# ---- precision after the guidance has ended


def test_reduced_precision_outlives_the_guidance(shards: Dataset, tmp_path: Path) -> None:
    """accelerate marks what it has prepared: a model that is wrapped again must not lose its autocast."""
    AcceleratorState._reset_state(True)
    settings = config("self_transcendence", precision="bf16")
    settings = settings.override({"stage2.until_step": 2})
    made = trainer(Accelerator(cpu=True, mixed_precision="bf16"), settings, shards, tmp_path, frozen(settings, shards))
    seen: list[torch.dtype] = []
    block = made.objective.student.blocks[0]
    block.mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    batches = made.stream.from_step(0)
    for _ in range(4):
        made._train_step(batches)
    assert not len(made.objective.guidances) and made.teacher is None
    assert seen == [torch.bfloat16] * 4
    AcceleratorState._reset_state(True)


# ---- memory of a step on a CPU


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's malloc is not glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Pages fetched from the system while blocks of 24 MB, six at a time, come and go: 6,000 each round, or none."""
    code = (
        "import resource, torch; from selftrans.train.processes import keep_memory\n"
        "def fetched():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5):\n"
        "        blocks = [torch.ones(6_000_000) for _ in range(6)]\n"
        "        del blocks\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first, kept = fetched(), keep_memory(); fetched(); print(first, kept, fetched())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    first, kept, then = done.stdout.split()
    if kept == "False":
        pytest.skip("the system's malloc is not glibc's")
    assert int(first) > 30_000 and int(then) < 3_000, done.stdout


# ---- the host does not wait


class Waits(TorchDispatchMode):
    """Counts what needs a value on the host, or a shape that depends on values: on a GPU each of them waits for it."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.partition(".")[0] in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["vanilla", "structure", "self_transcendence", "sra", "layersync", "dispersive"])
def test_a_step_waits_for_nothing(accelerator: Accelerator, shards: Dataset, tmp_path: Path, method: str) -> None:
    settings = config(method).override({"layersync.block": 1, "layersync.target_block": 2}).restricted()
    teacher = frozen(settings, shards) if method == "self_transcendence" else None
    made = trainer(accelerator, settings, shards, tmp_path, teacher)
    batches = made.stream.from_step(0)
    with Waits() as waits:
        made._train_step(batches)
        made._train_step(batches)
    assert waits.seen == []
    with Waits() as waits:
        torch.ones(3).nonzero()
        torch.ones(()).item()
    assert len(waits.seen) == 2


def test_independent_times_wait_once_for_how_many_are_selected(
    accelerator: Accelerator, shards: Dataset, tmp_path: Path
) -> None:
    settings = config("self_transcendence", times="uniform")
    made = trainer(accelerator, settings, shards, tmp_path, frozen(settings, shards))
    with Waits() as waits:
        made._train_step(made.stream.from_step(0))
    assert waits.seen == ["_local_scalar_dense.default"]


# ---- compilation

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(600)
def test_a_batch_is_on_the_device_as_a_whole(shards: Dataset) -> None:
    # what is not would be moved by DDP, at every micro-batch, and the host would wait for it
    loaded = next(Stream(shards, batch_size=4, accumulate=1, seed=0).from_step(0))
    batch = to_batch(loaded, shards, torch.device("meta"))
    assert {x.device.type for x in batch if isinstance(x, torch.Tensor)} == {"meta"}


def test_many_shapes_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, calls = [], []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return lambda *args: calls.append(1) or graph(*args)

    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: whole(self, backend=backend, **options))
    torch.compiler.reset()
    for width in (8, 16, 32):  # three models, four batch sizes each: more than dynamo allows of itself
        model = SiT((1, 4, 4), 3, width=width, depth=2, heads=1, patch=2)
        compile_model(model)
        for n in (2, 3, 4, 5):
            model(torch.randn(n, 1, 4, 4), torch.rand(n), torch.zeros(n, dtype=torch.long))
    torch.compiler.reset()
    assert len(graphs) == 12 and len(calls) == 24


def test_blocks_are_compiled_once(accelerator: Accelerator, shards: Dataset, tmp_path: Path) -> None:
    """After two steps of each stage nothing is compiled any more: not by other steps, nor when guidance ends."""
    from torch._dynamo.utils import counters

    def compilations() -> int:
        return counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    counters.clear()
    for name in ("vanilla", "structure", "self_transcendence"):
        settings = config(name, compile=True, steps=100)
        settings = settings.override({"stage2.until_step": 6})
        teacher = frozen(settings, shards) if name == "self_transcendence" else None
        made = trainer(accelerator, settings, shards, tmp_path / name, teacher)
        model, teacher = weakref.ref(teacher.model) if teacher else None, None
        batches = made.stream.from_step(0)
        made._train_step(batches)
        made._train_step(batches)
        warm = compilations()
        for _ in range(7):  # the guidance of stage 2 ends among them
            made._train_step(batches)
        made.step = 97
        made._train_step(batches)
        assert compilations() == warm, f"{name} compiled again: {dict(counters['stats'])}"
        assert not counters["graph_break"], dict(counters["graph_break"])
    gc.collect()
    assert model is not None and model() is None, "compiled code holds the teacher in memory"
    assert warm == 2, "one graph for the student's blocks, one for the teacher's"


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(600)
def test_a_compiled_step_has_the_numbers_of_an_eager_one(
    accelerator: Accelerator, shards: Dataset, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        settings = config("self_transcendence", compile=compiled)
        torch.manual_seed(0)
        teacher = frozen(settings, shards)
        made = trainer(accelerator, settings, shards, tmp_path / str(compiled), teacher)
        batches = made.stream.from_step(0)
        for _ in range(3):
            made._train_step(batches)
        losses.append({name: float(value) for name, value in made.window.means().items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0]["self"] > 0
