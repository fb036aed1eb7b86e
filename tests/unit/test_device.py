"""The default device: the GPU of the process, or the CPU."""

import pytest
import torch

from selftrans.device import default_device


@pytest.mark.parametrize(("rank", "gpus", "expected"), [(None, 8, "cuda:0"), ("3", 8, "cuda:3"), ("3", 1, "cuda:0")])
def test_gpu_of_the_local_rank_among_those_that_the_process_sees(rank, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == torch.device(expected)


def test_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cpu")
