"""Recordings of functions as CUDA graphs: how they fail, and what is found before."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selftrans.graphs import Invalidated, Recorded, noted_waits, recordings
from tests.support.recorder import without_gpu


def raising(error: Exception) -> None:
    raise error


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


def test_warnings_are_noted_only_where_they_are_about_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode of the check is as before after an error, too."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found: list[str] = []
    with contextlib.suppress(KeyError), noted_waits(found):
        raise KeyError
    assert modes == [0, "warn", 0] and found == []
    with warnings.catch_warnings(action="error"), noted_waits(found):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert found == []


@pytest.mark.parametrize("waits", [[], ["model.py:3", "model.py:5"]])
def test_recordings_that_cannot_be_right_are_refused(monkeypatch: pytest.MonkeyPatch, waits: list[str]) -> None:
    """An operation that waited before, and random numbers of the CPU, whose generator is as it was."""
    without_gpu(monkeypatch)
    drawn = torch.get_rng_state()
    said = (
        "an operation waits for the device at model.py:3, which a graph cannot" if waits else "random numbers are drawn"
    )

    def record() -> None:
        with recordings(torch.device("cpu"), waits):
            assert not waits, "nothing is recorded"
            torch.rand(1)

    with pytest.raises(RuntimeError, match=f"^{said}"):
        record()
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_recording_on_another_device_leaves_device_and_streams_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own `torch.cuda.stream`, on two pretended devices; `torch.cuda.set_stream` also sets the device."""
    zero, one = (torch.device("cuda", index) for index in (0, 1))
    streams = {device: SimpleNamespace(device=device, name=f"of {device}") for device in (zero, one)}
    before, here = dict(streams), [zero]

    def set_stream(stream: Any) -> None:
        here[:], streams[stream.device] = [stream.device], stream

    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_: here[0].index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[device or here[0]])
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with contextlib.suppress(RuntimeError), recordings(one, []):
        assert here == [one] and streams == before
        set_stream(SimpleNamespace(device=one, name="of a capture that fails"))
        raise RuntimeError
    assert here == [zero] and streams == before
