"""A training process: a finite timeout, and one line when another process is gone."""

from datetime import timedelta

import pytest
import torch
from accelerate.state import AcceleratorState

from selftrans.config import Train
from selftrans.train import processes
from selftrans.train.processes import (
    accelerator_of,
    check_same,
    keep_memory,
    process_group_options,
    reporting_lost_processes,
)
from tests.support import toy


def test_runs_of_one_process_may_have_different_precisions(tmp_path):
    """accelerate keeps its state for the process; the fields by which it is begun anew are private."""
    AcceleratorState._reset_state(True)
    try:
        for precision, mixed in (("fp32", "no"), ("bf16", "bf16"), ("bf16", "bf16"), ("fp32", "no")):
            config = toy.toy({"train.precision": precision})
            assert accelerator_of(config, tmp_path).mixed_precision == mixed
    finally:
        AcceleratorState._reset_state(True)


def test_timeout_of_the_process_group_is_the_setting():
    assert process_group_options(Train(timeout=7)).timeout == timedelta(seconds=7)


def test_loss_is_not_divided_by_a_variable_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    accelerator_of(toy.toy({"train.precision": "fp32"}), tmp_path).backward(3 * weight)
    assert weight.grad == 3


@pytest.mark.parametrize(("variable", "engine"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_engines_of_accelerate_are_refused_with_the_remedy(monkeypatch, variable, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "TRUE")
    with pytest.raises(ValueError, match=rf"accelerate is configured to use {engine}.*--train\.shard True"):
        process_group_options(Train())


@pytest.mark.parametrize("rank", [0, 2])
def test_other_files_in_one_process_end_all_of_them(monkeypatch, rank):
    found = ["a", "a", "b"]
    monkeypatch.setattr(processes, "gather_object", lambda mine: found if mine == [found[rank]] else None)
    with pytest.raises(ValueError, match="process 2 of 3 reads other data than process 0: give all of them the same"):
        check_same("data", found[rank])


@pytest.mark.parametrize(
    "message",
    ["[gloo] Connection closed by peer [127.0.0.1]:1\nmore", "NCCL watchdog", "Broken pipe", "Timed out after 3 s"],
)
def test_lost_process_is_one_line(message, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(ConnectionError, match="process 1 of 4 ends, because another one has ended") as caught,
        reporting_lost_processes(),
    ):
        raise RuntimeError(message)
    assert message.splitlines()[0] in str(caught.value) and "\n" not in str(caught.value)
    assert "the same command continues from the last checkpoint" in str(caught.value)


@pytest.mark.parametrize(("world", "message"), [("1", "Broken pipe"), ("4", "shapes do not match")])
def test_other_errors_are_raised_unchanged(world, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(RuntimeError, match=message), reporting_lost_processes():
        raise RuntimeError(message)


def test_other_allocators_than_glibc_are_left_unchanged(monkeypatch):
    def no_library(_):
        raise OSError("no such library")

    monkeypatch.setattr("ctypes.CDLL", no_library)
    assert keep_memory() is False
