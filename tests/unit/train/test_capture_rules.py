"""When steps are captured, and how a run goes on in which CUDA has ended a recording."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selftrans.cli.main import main
from selftrans.config import Train
from selftrans.methods.guidance import Frozen
from selftrans.models.sit import SiT
from selftrans.train.capture_rules import (
    ENDED,
    NotCaptured,
    description,
    remembered,
    too_large,
    why_launched,
)
from selftrans.train.captured_step import captured_step
from selftrans.train.trainer import Trainer
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture

GIVEN = {"device": "cuda", "processes": 1, "precision": "bf16", "optimizer": "adamw", "parts": (3,), "recompute": False}
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
    (
        {"times": "uniform", "guidances": [SimpleNamespace(selects=False), SimpleNamespace(selects=True)]},
        "with train.times uniform a range of t selects another number of samples in every step",
    ),
    (
        {"time_shift": 3.0, "even": False, "guidances": [SimpleNamespace(selects=True)]},
        "with train.times systematic and train.time_shift 3 a range of t selects another number of samples in every step",
    ),
]


class OwnLayer(torch.nn.Module):
    """Code that is not of this package."""


def trainer_of(folder: Path, capture: str = "auto", **what: Any) -> Any:
    """What the rules see of a trainer: by default one whose steps can be captured."""
    given = GIVEN | {"times": "systematic", "guidances": [], "captured": None, "teacher": None}
    given |= {"time_shift": 1.0, "even": True, "modules": [torch.nn.Linear(1, 1)]} | what
    settings = SimpleNamespace(capture=capture, precision=given["precision"], optimizer=given["optimizer"])
    return SimpleNamespace(
        config=SimpleNamespace(train=settings),
        directory=folder / "stage1",
        accelerator=SimpleNamespace(device=SimpleNamespace(type=given["device"]), num_processes=given["processes"]),
        shards=SimpleNamespace(parts=given["parts"]),
        objective=SimpleNamespace(
            student=SimpleNamespace(recompute=given["recompute"], random_blocks=True),
            times=given["times"],
            time_shift=given["time_shift"],
            even=given["even"] and given["times"] == "systematic",
            guidances=given["guidances"],
            modules=lambda: iter(given["modules"]),
        ),
        captured=given["captured"],
        teacher=given["teacher"],
    )


@pytest.mark.parametrize(("what", "reason"), OBSTACLES)
def test_where_no_step_can_be_captured_one_line_says_why(tmp_path: Path, what: dict[str, Any], reason: str) -> None:
    """`on` is refused; `auto`, the default, goes on without a warning, and a dry run on a GPU says it."""
    assert Train().capture == "auto"
    with pytest.raises(ValueError, match=f"^train.capture on is not possible: {reason}; use auto, or off$"):
        captured_step(trainer_of(tmp_path, "on", **what))
    one = trainer_of(tmp_path, **what)
    with warnings.catch_warnings(action="error"):
        assert captured_step(one) is None
    shown = f"launched one by one: {reason}" if one.accelerator.device.type == "cuda" else ""
    assert (why_launched(one), description(one)) == (reason, shown)


def test_auto_leaves_some_steps_launched_that_on_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of other packages, a run in which CUDA has ended a recording, and AMD GPUs."""
    made = object()
    monkeypatch.setattr("selftrans.train.captured_step.CapturedStep", lambda _: made)
    assert captured_step(trainer_of(tmp_path)) is made
    own = {"modules": [torch.nn.Linear(1, 1), OwnLayer()]}
    assert str(why_launched(trainer_of(tmp_path, **own))).startswith("OwnLayer is code of another package, ")
    taught = SiT((1, 4, 4), 3, width=8, depth=2, heads=1, patch=2)
    assert why_launched(trainer_of(tmp_path, teacher=Frozen(taught, 1))) is None
    taught.blocks[0].mlp = OwnLayer()
    for teacher in (Frozen(taught, 1), OwnLayer()):  # the second as an encoder of one's own
        assert str(why_launched(trainer_of(tmp_path, teacher=teacher))).startswith(
            "OwnLayer is code of another package, "
        )
    (tmp_path / ENDED).touch()
    assert str(why_launched(trainer_of(tmp_path))).endswith(
        "not-captured.json in the folder of the run says; remove it to try again"
    )
    for what in (own, {}):
        assert captured_step(trainer_of(tmp_path, **what)) is None
        assert captured_step(trainer_of(tmp_path, "on", **what)) is made
        assert captured_step(trainer_of(tmp_path, "off", **what)) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(why_launched(trainer_of(tmp_path)))


@pytest.mark.parametrize(
    ("captured", "said"),
    [
        (SimpleNamespace(replaying=True, reason=None), "replayed as CUDA graphs"),
        (
            SimpleNamespace(replaying=False, reason="graphs would keep 3 GB"),
            "launched one by one: graphs would keep 3 GB",
        ),
        (SimpleNamespace(replaying=False, reason=None), "launched one by one: too few steps were taken to record them"),
    ],
)
def test_description_of_steps_on_a_gpu(tmp_path: Path, captured: Any, said: str) -> None:
    assert description(trainer_of(tmp_path, captured=captured)) == said
    assert description(trainer_of(tmp_path, "off", captured=captured)) == ""
    assert description(trainer_of(tmp_path, device="cpu", captured=captured)) == ""


@pytest.mark.parametrize(("peak", "refused"), [(13e9, False), (14e9, True)])
def test_graphs_get_half_of_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, peak: float, refused: bool
) -> None:
    """3 GB stay between steps and 20 are free: a step may use 10 more. Memory that the allocator keeps counts as free."""
    free = [8e9]
    for name, value in {
        "synchronize": lambda _: None,
        "empty_cache": lambda: free.append(20e9),
        "memory_allocated": lambda _: int(3e9),
        "mem_get_info": lambda _: (int(free[-1]), int(24e9)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    reason = too_large(torch.device("cpu"), int(peak))
    assert bool(reason) is refused
    if reason:
        assert reason == "graphs would keep 11 GB, more than half of the 20 GB that are free between steps"


def test_same_command_continues_after_cuda_has_ended_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line ends the run; its folder says that it is not to be captured, which later steps and a dry run follow. The same
    where a replay had no memory: what a process cannot do with graphs, a new one does without them."""
    run, out = Trainer.run, tmp_path / "run"
    failing = iter([NotCaptured("the step cannot be recorded", "CUDA ended the recording, so torch cannot go on")])

    def once(self: Trainer) -> Any:
        for error in failing:
            raise error
        seen.append(why_launched(trainer_of(self.directory.parent)))
        return run(self)

    seen: list[str | None] = []
    monkeypatch.setattr(Trainer, "run", once)
    command = [
        "train",
        "digits",
        f"--data={toy.digits()}",
        f"--out={out}",
        *toy.flags({"train.steps": 2, "stage1.steps": 1}),
    ]
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "CUDA ended the recording, so torch cannot go on; the same command continues from the last checkpoint" in said
    )
    assert said.endswith(f"without graphs, because of {out / ENDED}")
    assert json.loads((out / ENDED).read_text())["reason"] == "CUDA ended the recording, so torch cannot go on"
    assert main(command) == 0 and seen == 2 * [why_launched(trainer_of(out))] and seen[0]


def test_other_failures_are_not_remembered(tmp_path: Path) -> None:
    """`on` was asked for, or the recording could be ended: the error is shown as it is."""
    error = NotCaptured("the step cannot be recorded")
    with pytest.raises(NotCaptured) as caught, remembered(tmp_path):
        raise error
    assert caught.value is error and not (tmp_path / ENDED).exists()


def test_folder_that_cannot_be_written_keeps_the_first_message(tmp_path: Path) -> None:
    """It names the flag with which the run continues, as a new process would end alike; nothing is written through a link."""
    error, target = NotCaptured("use --train.capture off", "it is over"), tmp_path / "target"
    (tmp_path / ENDED).mkdir()
    with pytest.raises(NotCaptured) as caught, remembered(tmp_path):
        raise error
    assert caught.value is error and not error.reason
    (tmp_path / ENDED).rmdir()
    (tmp_path / ENDED).symlink_to(target)
    error.reason = "it is over"
    with pytest.raises(NotCaptured), remembered(tmp_path):
        raise error
    assert not target.exists()
