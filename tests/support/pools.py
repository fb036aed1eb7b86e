"""Comparisons in this process, or in forked ones: a spawned worker imports torch for seconds before it trains a toy run.

Spawned workers are tested in test_outsider.py (packages) and test_bench.py (a script, in which nothing is replaced).
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch

from selftrans.experiments.comparison import runner, worker
from tests.support.processes import PRELOADED


class InProcess:
    """Stands in for `ProcessPoolExecutor`: a job runs in this process, when it is submitted."""

    def __init__(self, workers: int, context: Any, initializer: Callable[..., object], initargs: tuple[Any, ...]):
        assert workers == 1
        self._processes: dict[int, Any] = {}
        worker._worker.clear()
        initializer(*initargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        worker._worker.clear()

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(job(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        """Nothing runs."""


def in_this_process(patch: pytest.MonkeyPatch, pool: type[InProcess] = InProcess) -> None:
    """Comparisons train and measure in this process, on one thread, and leave its handling of signals and warnings alone."""
    patch.setattr(runner, "ProcessPoolExecutor", pool)
    patch.setattr(runner, "processes", lambda comparison, workers: (1, 1))
    patch.setattr(worker, "ignore_interrupts", lambda: None)
    patch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`in_this_process` for one test. Import it into a test module."""
    before = torch.get_num_threads()
    in_this_process(monkeypatch)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a process that has imported torch, and nothing else: they know as little as spawned ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    monkeypatch.setattr(runner, "multiprocessing", SimpleNamespace(get_context=lambda kind: context))
