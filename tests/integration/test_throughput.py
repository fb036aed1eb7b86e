"""Optimisations of a step do not change its results, and blocks are compiled once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from selftrans.checkpoints import format as checkpoint
from selftrans.config import Data, Log, RunConfig, Train, sections
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare_builtin
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import stages
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.models.sit import SiTConfig
from selftrans.train.run import train
from selftrans.train.trainer import Trainer
from tests.support.graphs_only import graphs_only  # noqa: F401 - a fixture
from tests.support.memory import freed


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
    return prepare_builtin("digits", tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True)


def trainer(
    accelerator: Accelerator, settings: RunConfig, shards: Dataset, folder: Path, teacher: Frozen | None = None
) -> Trainer:
    """The last stage of `settings.method`."""
    return Trainer(accelerator, settings, stages(settings)[-1], folder, shards, teacher=teacher)


def frozen(settings: RunConfig, shards: Dataset) -> Frozen:
    """A teacher with random weights everywhere: a new model would predict zero."""
    model = settings.build_model(shards.manifest.shape, shards.manifest.conditions)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Frozen(model, 1)


# ---- data on the device


def test_run_with_data_on_the_device_is_the_same_run(shards: Dataset, tmp_path: Path) -> None:
    weights = []
    for on_device in (False, True):
        out = tmp_path / str(on_device)
        settings = dataclasses.replace(config(), data=Data(path=str(shards.path), on_device=on_device))
        train(settings, out, quiet=True)
        weights.append(checkpoint.weights_sha256(next(out.glob("vanilla/checkpoints/*/student.safetensors"))))
    assert weights[0] == weights[1]
    longer = dataclasses.replace(settings, data=Data(path=str(shards.path)), train=Train(**_steps(settings, 8)))
    train(longer, tmp_path / "True", quiet=True)  # the setting may change on resume


def _steps(settings: RunConfig, steps: int) -> dict:
    return dataclasses.asdict(settings.train) | {"steps": steps}


# ---- precision after the guidance has ended


def test_reduced_precision_continues_after_guidance_ends(shards: Dataset, tmp_path: Path) -> None:
    """accelerate marks models that it has prepared: a model that is wrapped again must keep its autocast."""
    AcceleratorState._reset_state(True)
    settings = config("self_transcendence", precision="bf16")
    settings = settings.override({"stage2.until_step": 2})
    built = trainer(Accelerator(cpu=True, mixed_precision="bf16"), settings, shards, tmp_path, frozen(settings, shards))
    seen: list[torch.dtype] = []
    block = built.objective.student.blocks[0]
    block.mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    batches = built.stream.from_step(0)
    for _ in range(4):
        built.train_step(batches)
    assert not len(built.objective.guidances) and built.teacher is None
    assert seen == [torch.bfloat16] * 4
    AcceleratorState._reset_state(True)


# ---- memory of a step on a CPU


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's malloc is not glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Page faults while six blocks of 24 MB are allocated and freed: about 6,000 each time, or none."""
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, kept, then = done.stdout.split()
    if kept == "False":
        pytest.skip("the system's malloc is not glibc's")
    assert int(first) > 30_000 and int(then) < 3_000, done.stdout


# ---- the host does not synchronise


class Synchronisations(TorchDispatchMode):
    """Records operations that need a value on the host, or whose shape depends on values: on a GPU each synchronises."""

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
def test_step_does_not_synchronise_with_the_device(
    accelerator: Accelerator, shards: Dataset, tmp_path: Path, method: str
) -> None:
    for capture in ("off", "on"):
        settings = config(method, capture=capture).override({"layersync.block": 1, "layersync.target_block": 2})
        teacher = frozen(settings, shards) if method == "self_transcendence" else None
        built = trainer(accelerator, settings.restricted(), shards, tmp_path, teacher)
        batches = built.stream.from_step(0)
        with Synchronisations() as recorded:
            for _ in range(5 if capture == "on" else 2):
                built.train_step(batches)
        assert recorded.seen == []
    with Synchronisations() as recorded:
        torch.ones(3).nonzero()
        torch.ones(()).item()
    assert len(recorded.seen) == 2


def test_independent_times_synchronise_once_to_count_the_selected(
    accelerator: Accelerator, shards: Dataset, tmp_path: Path
) -> None:
    settings = config("self_transcendence", times="uniform")
    built = trainer(accelerator, settings, shards, tmp_path, frozen(settings, shards))
    with Synchronisations() as recorded:
        built.train_step(built.stream.from_step(0))
    assert recorded.seen == ["_local_scalar_dense.default"]


# ---- compilation; that compiled training equals eager training is tested in test_trainer.py


@pytest.mark.usefixtures("graphs_only")
def test_blocks_are_compiled_once(accelerator: Accelerator, shards: Dataset, tmp_path: Path) -> None:
    """After two steps of each stage nothing is compiled again, neither in later steps nor when guidance ends."""
    from torch._dynamo.utils import counters

    def compilations() -> int:
        return counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    counters.clear()
    for name in ("vanilla", "structure", "self_transcendence"):
        settings = config(name, compile=True, steps=100)
        settings = settings.override({"stage2.until_step": 6})
        teacher = frozen(settings, shards) if name == "self_transcendence" else None
        built = trainer(accelerator, settings, shards, tmp_path / name, teacher)
        model, teacher = weakref.ref(teacher.model) if teacher else None, None
        batches = built.stream.from_step(0)
        built.train_step(batches)
        built.train_step(batches)
        warm = compilations()
        for _ in range(7):  # the guidance of stage 2 ends among them
            built.train_step(batches)
        built.step = 97
        built.train_step(batches)
        assert compilations() == warm, f"{name} compiled again: {dict(counters['stats'])}"
        assert not counters["graph_break"], dict(counters["graph_break"])
    assert model is not None and freed(model), "compiled code holds the teacher in memory"
    assert warm == 3, (
        "one graph for the blocks of the student, one for its last layer, one for the blocks of the teacher"
    )
