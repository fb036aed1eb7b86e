"""benchmarks/encoder.py and the other scripts that make the evidence: their losses by hand, and what they write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selftrans.data.dataset import Dataset
from selftrans.encoders.vision import load_encoder
from tests.support.scripts import script
from tests.support.toy import prepared

# ---- encoders without labels


def test_contrastive_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = script("encoder")
    monkeypatch.setattr(encoder, "distorted", lambda x: x)
    patches = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # (N, T, D) of two pictures, a class token before them

    def model(pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(
            last_hidden_state=torch.cat([torch.full((4, 1, 2), 7.0), patches.repeat(2, 1, 1)], dim=1)
        )

    found = encoder.contrastive_loss(model, nn.Identity(), torch.zeros(2, 1, 4, 4), torch.zeros(2))
    same, other = math.exp(1 / 0.2), math.exp(0.0)  # each view has its twin, and both views of the other picture
    assert found.item() == pytest.approx(-math.log(same / (same + 2 * other)), rel=1e-5)


def test_grey_pictures_are_never_mirrored_and_colours_are_in_half_of_the_views() -> None:
    encoder = script("encoder")
    for channels, mirrored in ((1, 0.0), (3, 0.5)):
        torch.manual_seed(0)
        left = torch.full((400, channels, 8, 8), -0.8)
        left[..., :4] = 0.8
        views = encoder.distorted(left, turn=0.0)
        assert views.shape == left.shape and not torch.equal(views[0], views[1])
        swapped = (views[..., -1].mean(dim=(1, 2)) > views[..., 0].mean(dim=(1, 2))).float().mean().item()
        assert swapped == pytest.approx(mirrored, abs=0.08)


@pytest.mark.parametrize("task", ["labels", "rotation", "contrastive"])
def test_encoder_is_one_that_repa_takes(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared(tmp_path, count=8)
    assert (
        script("encoder").main(["--out", str(tmp_path / "e"), "--task", task, "--data", str(data), "--epochs", "2"])
        == 0
    )
    written = json.loads((tmp_path / "e" / "encoder.json").read_text())
    assert written["task"] == task and written["held_out"] == 4 and written["trained_on"] == 12
    assert (
        0 <= written["linear_probe"] <= 1 and f"linear probe {written['linear_probe']:.3f}" in capsys.readouterr().out
    )
    loaded = load_encoder(
        str(tmp_path / "e"), 4
    )  # the patches of 8 pixels: no feature is resized, so nothing is warned of
    assert loaded.width == 96 and loaded.encode(torch.zeros(2, 3, 8, 8)).shape == (2, 16, 96)


def test_resnet_has_a_grid_of_a_quarter() -> None:
    encoder = script("encoder")
    net = encoder.build("resnet", 32, 3, 4).eval()
    assert net(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 128, 8, 8)
    assert encoder.pooled(net, torch.zeros(1, 3, 32, 32)).shape == (1, 128)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ((), ["--task", "labels"], "has no classes"),
        (("a", "b"), ["--patch", "3"], "cannot be divided into patches of 3"),
        (("a", "b"), ["--network", "resnet"], "needs 32 pixels, not 8"),
    ],
)
def test_unusable_settings_of_an_encoder(
    classes: tuple[str, ...], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared(tmp_path, classes)
    assert Dataset.open(data).manifest.num_classes == len(classes)
    with pytest.raises(SystemExit):
        script("encoder").main(["--out", str(tmp_path / "e"), "--data", str(data), *options])
    assert message in capsys.readouterr().err and not (tmp_path / "e").exists()
