"""benchmarks/encoder.py and evidence_gpu.py: losses and tables by hand, what is written, continuing after the time is over."""

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


# ---- every method in one process

TOY = ("model.width=32", "model.depth=3", "model.heads=2", "model.patch=2", "train.batch_size=8", "sample.steps=2")
TOY += ("stage1.head_width=16", "stage2.head_width=16")


def test_arms_are_tuned_trained_measured_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, out = script("evidence_gpu"), tmp_path / "out"
    monkeypatch.setattr(gpu, "TUNED", [(1e-3, 0.5), (2e-3, 0.02)])
    given = [
        str(prepared(tmp_path, count=8)),
        "--out",
        str(out),
        "--features",
        "values",
        "--images",
        "8",
        "--steps",
        "5",
    ]
    given += ["--tune-steps", "2", "--seeds", "0", "--arms", "vanilla", "structure", "w2", "--set", *TOY]

    def results(*options: str) -> dict[str, Any]:
        assert gpu.main([*given, *options]) == 0
        return dict(json.loads((out / "evidence_gpu.json").read_text()))

    assert len(results("--minutes", "0")["left"]) == 5 and not (out / "runs").exists()
    steps = iter([False] * 6 + [True])  # 2 + 2 of the tuning; vanilla is interrupted at its third step
    monkeypatch.setattr(gpu.Deadline, "asked", lambda self, accelerator: next(steps))
    stopped = results()
    assert stopped["left"] == ["vanilla-seed0", "structure-seed0", "w2-seed0"]
    assert [point["step"] for point in stopped["runs"]["vanilla-seed0"]["points"]] == [1, 2]
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "TUNED", [(1e-3, 0.5), (2e-3, 0.02)])
    done = results()
    runs, best = (
        done["runs"],
        min((1e-3, 0.5), (2e-3, 0.02), key=lambda p: last(done, f"tune-lr={p[0]:g}-std={p[1]:g}")),
    )
    assert done["left"] == [] and done["chosen"] == {"train.lr": best[0], "model.label_std": best[1]}
    assert (
        [p["step"] for p in runs["w2-seed0"]["points"]]
        == [1, 2, 3, 4, 5]
        == [p["step"] for p in runs["vanilla-seed0"]["points"]]
    )
    assert [path.name for path in (out / "runs").iterdir()] == ["structure-seed0"], "which teaches"
    rows = {row["arm"]: row for row in done["table"]}
    assert rows["w2"]["tflops"] > 1.4 * rows["vanilla"]["tflops"], "with two fifths of stage 1"
    assert rows["w2"]["difference"]["mean"] == pytest.approx(last(done, "w2") - last(done, "vanilla"))
    assert rows["structure"]["difference"] is None, "other weights and noise"
    with pytest.raises(ValueError, match="holds results of other images"):
        results("--images", "9")


def last(results: dict[str, Any], arm: str) -> float:
    return float(results["runs"][f"{arm}-seed0"]["points"][-1]["distance"])


def test_table_compares_at_equal_compute_with_the_longest_baseline() -> None:
    gpu = script("evidence_gpu")

    def run(*points: tuple[float, float]) -> dict[str, Any]:
        found = [{"step": k, "tflops": x, "distance": y} for k, (x, y) in enumerate(points, start=1)]
        return {"done": True, "points": found}

    runs = {"vanilla-seed0": run((1, 16), (2, 8)), "vanilla-longer-seed0": run((1, 16), (2, 8), (4, 2))}
    runs |= {"w2-seed0": run((2, 10), (3, 5)), "repa-seed0": run((5, 1)), "w5-seed0": {"done": False, "points": []}}
    rows = {row["arm"]: row for row in gpu.table({"runs": runs})}
    assert rows["w2"]["difference"]["mean"] == -3 and rows["w2"]["difference"]["error"] is None
    assert rows["w2"]["difference_at_compute"]["mean"] == pytest.approx(5 - 4)  # between 8 and 2: sqrt(16)
    assert rows["repa"]["difference_at_compute"] is None and "w5" not in rows
