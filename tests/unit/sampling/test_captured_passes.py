"""Passes that are recorded and replayed against launched ones, and what happens where they cannot be."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from selftrans.config import SampleConfig
from selftrans.encoders.identity import identity
from selftrans.graphs import WARM_UP, Invalidated, Recorded
from selftrans.models.mmdit import MMDiT
from selftrans.models.sit import SiT
from selftrans.sampling.images import Sampler, cast_products
from selftrans.types import MASK, TEXT, Backbone
from tests.support import diffusers_models
from tests.support.recorder import STREAM, recorder  # noqa: F401 - a fixture

TEXTS = diffusers_models.TEXTS
SIZES = {"width": 32, "depth": 3, "heads": 2, "patch": 2}
GPU = torch.cuda.is_available()


def model(kind: str = "labels", seed: int = 0) -> Backbone:
    """A tiny model of labels, of text, or of diffusers; with a second output where it can have one."""
    torch.manual_seed(seed)
    if kind not in ("labels", "text"):
        return diffusers_models.tiny(kind, (3, 8, 8)).eval()
    built = SiT((3, 8, 8), 10, **SIZES) if kind == "labels" else MMDiT((3, 8, 8), TEXTS, **SIZES)
    built.add_early(1)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return built.eval()


class Captions:
    """Text of 2 to 5 tokens for each image."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self.null: Any = {TEXT: torch.full((1, 5, 24), 0.25), MASK: torch.tensor([[True, True, False, False, False]])}

    def of(self, indices: np.ndarray) -> tuple[Any, np.ndarray]:
        rows = [torch.randn(5, 24, generator=torch.Generator().manual_seed(int(k))) for k in indices]
        lengths = 2 + torch.from_numpy(indices) % 4
        return {TEXT: torch.stack(rows), MASK: torch.arange(5)[None] < lengths[:, None]}, indices

    def texts(self, indices: np.ndarray) -> None:
        return None


HALF = {"guidance_scale": 1.8, "guidance_interval": (0.0, 0.65)}
#: settings, and how many graphs they take
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "sde": ({"sampler": "sde", "time_shift": 2.0} | HALF, 2),
    "heun": ({"sampler": "heun"} | HALF, 2),
    "channels": ({"guidance_scale": 2.0, "guidance_channels": 2}, 1),
    "early": ({"early_guidance": 2.5, "early_interval": (0.3, 0.8), "steps": 12} | HALF, 4),
    "weaker": ({"autoguidance": "other"} | HALF, 2),
    "bf16": ({"precision": "bf16"} | HALF, 2),
}
KINDS = {"text": HALF | {"early_guidance": 2.0}, "dit": HALF, "pixart": HALF, "sd3": HALF, "flux": HALF}


def sampler(
    capture: str, settings: dict[str, Any], kind: str = "labels", *, device: str = "cpu", **more: Any
) -> Sampler:
    """Of 5 images in batches of 2; the passes of `on` go to a stream, as on a GPU."""
    config = SampleConfig(**{"num": 5, "batch_size": 2, "steps": 6, "sampler": "euler", "capture": capture} | settings)
    built = model(kind).to(device)
    weak = model(kind, seed=1).to(device) if config.autoguidance else None
    conditioning = Captions() if built.conditions.kind == "text" else None
    made = Sampler(built, identity("values"), config, device=device, weak=weak, conditioning=conditioning, **more)
    for each in made.models:
        cast_products(each, {"bf16": torch.bfloat16}.get(config.precision, torch.float32))
    if made._captured and device == "cpu":
        made._captured._stream = STREAM
    return made


def images(made: Sampler, indices: Any = None) -> np.ndarray:
    return np.concatenate([batch.images for batch in made.sample(indices)])


def passes(built: Backbone) -> list[tuple[int, bool]]:
    """The batch size of each pass that the host takes, and whether autocast keeps casts; filled as they happen."""
    seen: list[tuple[int, bool]] = []
    built.register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), torch.is_autocast_cache_enabled())))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_replayed_passes_equal_launched_passes(recorder: list[Recorded], case: str) -> None:  # noqa: F811
    """Other labels and noise in each batch, guidance that is on in a part of the steps, and a last batch that is filled."""
    settings, graphs = CASES[case]
    launched, made = sampler("off", settings), sampler("on", settings)
    seen = passes(made.model)
    found, expected = images(made), images(launched)
    assert found.shape == (5, 3, 8, 8) and np.array_equal(found[:4], expected[:4]), "batches of the same size"
    np.testing.assert_allclose(found[4:], expected[4:], atol=0.05 if case == "bf16" else 1e-4)
    assert len(recorder) == graphs and len(seen) == graphs * (WARM_UP + 1), "each is recorded once, for all batches"
    assert not any(kept for _, kept in seen) and torch.is_autocast_cache_enabled()


def test_replayed_passes_of_text_equal_launched_ones(recorder: list[Recorded]) -> None:  # noqa: F811
    """Tokens and masks are copied for each batch."""
    found, expected = (images(sampler(capture, KINDS["text"], "text")) for capture in ("on", "off"))
    assert np.array_equal(found[:4], expected[:4]) and len(recorder) == 2
    np.testing.assert_allclose(found[4:], expected[4:], atol=1e-4)


def test_pass_is_recorded_in_a_later_batch_and_of_each_size_alone(recorder: list[Recorded]) -> None:  # noqa: F811
    """Two steps of each batch, of three batches, then of another size."""
    made, launched = (sampler(capture, {"steps": 2}) for capture in ("on", "off"))
    assert np.array_equal(images(made)[:4], images(launched)[:4]) and len(recorder) == 1
    for indices in ([4], [3], [2]):
        np.testing.assert_allclose(images(made, indices), images(launched, indices), atol=1e-5)
    assert len(recorder) == 2, "four passes of one image"


def test_changed_size_has_a_graph_of_its_own(recorder: list[Recorded]) -> None:  # noqa: F811
    made, launched = (sampler(capture, {"num": 2}) for capture in ("on", "off"))
    for side in (8, 4, 8):
        for each in (made, launched):
            each.shape = (3, side, side)
        assert np.array_equal(images(made), images(launched))
    assert len(recorder) == 2


def test_weights_that_change_in_place_are_read_by_replays(recorder: list[Recorded]) -> None:  # noqa: F811
    made, launched = (sampler(capture, {"num": 2}) for capture in ("on", "off"))
    first = images(made)
    for each in (made, launched):
        with torch.no_grad():
            for p in each.model.parameters():
                p.mul_(1.1)
    assert np.array_equal(images(made), images(launched)) and not np.array_equal(images(made), first)
    assert len(recorder) == 1


def failing(error: Exception | None) -> Any:
    """What a recording does: it raises, or draws a number on the CPU."""

    def capture(self: Recorded, pool: Any) -> None:
        asked.append(self)
        torch.rand(1)
        if error:
            raise error

    asked: list[Recorded] = []
    return capture, asked


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no such kernel\nsecond line"), "no such kernel"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            "CUDA out of memory. Tried to ",
        ),
        (None, "random numbers are drawn on the CPU"),
    ],
)
def test_passes_that_cannot_be_recorded_are_launched(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, said: str
) -> None:
    """One warning, once; the images are the same, and buffers are freed before torch returns its memory."""
    capture, asked = failing(error)
    monkeypatch.setattr(Recorded, "capture", capture)
    made, expected, freed = sampler("on", HALF), images(sampler("off", HALF)), list[int]()
    assert made._captured
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(made._captured._passes)))  # type: ignore[union-attr]
    with pytest.warns(
        UserWarning, match=f"^sample.capture: a pass .* is not captured, all are launched: {said}[^\n]*$"
    ) as w:
        found = images(made)
    assert np.array_equal(found[:4], expected[:4]) and (len(w), len(asked), freed) == (1, 1, [0])


def test_pass_that_waits_for_the_device_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
    recorder: list[Recorded],  # noqa: F811
) -> None:
    """torch's check finds it in the pass before, so that CUDA ends no recording; it is on in that pass alone."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    made, expected = sampler("on", {}), images(sampler("off", {}))

    def waits(*_: Any) -> None:
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    made.model.register_forward_pre_hook(waits)
    said = r"all are launched: an operation waits for the device at test_captured_passes.py:\d+, which a graph cannot$"
    with pytest.warns(UserWarning, match=said) as warned:
        found = images(made)
    assert np.array_equal(found[:4], expected[:4]) and (len(warned), recorder, modes) == (1, [], [0, "warn", 0])


@pytest.mark.usefixtures("recorder")
def test_recording_that_cuda_has_ended_ends_the_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, _ = failing(Invalidated("operation not permitted when stream is capturing"))
    monkeypatch.setattr(Recorded, "capture", capture)
    with pytest.raises(
        ValueError, match=r"CUDA ended the recording .*\(operation not permitted .*use --capture off"
    ) as e:
        images(sampler("on", {}))
    assert "\n" not in str(e.value)


def test_device_without_graphs_is_refused_and_a_cpu_launches() -> None:
    said = "sample.capture on is not possible: CUDA graphs need a CUDA GPU, this device is mps; use off$"
    with pytest.raises(ValueError, match=said):
        Sampler(model(), identity("values"), SampleConfig(capture="on"), device="mps")
    with pytest.raises(ValueError, match=r"sample.capture should be one of 'off', 'on', not 'auto'"):
        SampleConfig(capture="auto").check()  # type: ignore[arg-type]
    made = sampler("on", HALF)
    made._captured._stream = None  # type: ignore[union-attr]
    seen = passes(made.model)
    assert np.array_equal(images(made)[:4], images(sampler("off", HALF))[:4])
    assert len(seen) == 6 * 3, "every pass is computed"


def test_buffers_are_freed_with_the_sampler() -> None:
    """At once: several models are sampled in one process."""
    made = sampler("on", {"num": 2})
    made._captured._stream = None  # type: ignore[union-attr]
    images(made)
    kept = [weakref.ref(each) for each in made._captured._passes.values()]  # type: ignore[union-attr]
    gc.disable()
    try:
        del made
        assert len(kept) == 1 and kept[0]() is None
    finally:
        gc.enable()


needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_graphs_on_a_gpu_equal_launched_passes(case: str, compiled: bool) -> None:
    settings, graphs = CASES[case]
    assert_replays(settings, "labels", graphs, compiled=compiled)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_other_models_on_a_gpu_equal_launched_passes(kind: str) -> None:
    assert_replays(KINDS[kind], kind, 2)


def assert_replays(settings: dict[str, Any], kind: str, graphs: int, *, compiled: bool = False) -> None:
    """A warning, which a failed recording gives, is an error."""
    launched, made = (sampler(capture, settings, kind, device="cuda") for capture in ("off", "on"))
    if compiled:
        for each in (launched, made):
            each._compile()
    expected = images(launched)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sample.capture")
        found = images(made)
    assert (
        made._captured and sum(each.recorded._graph is not None for each in made._captured._passes.values()) == graphs
    )
    half = settings.get("precision") == "bf16"
    np.testing.assert_allclose(found, expected, atol=0.1 if half else 1e-3)


@needs_gpu
def test_value_read_on_the_host_of_a_gpu_is_found_before_the_recording() -> None:
    """So that the process can go on, and draw random numbers on the device."""
    made, expected = sampler("on", {}, device="cuda"), images(sampler("off", {}, device="cuda"))
    made.model.register_forward_pre_hook(lambda _, given: given[0].sum().item() and None)
    with pytest.warns(
        UserWarning, match=r"all are launched: an operation waits for the device at test_captured_passes.py:"
    ):
        found = images(made)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert torch.rand(1, device="cuda").isfinite()
