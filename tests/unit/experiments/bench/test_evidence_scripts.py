"""benchmarks/encoder.py, evidence_gpu.py, scaled_velocity.py and ui_speed.py: losses, velocities and tables by hand, what is
written, continuing after the time is over, answers of the local page."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from torch import nn

from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.encoders.vision import load_encoder
from selftrans.train.interrupted import EXIT_RESUME, Interrupted
from selftrans.ui.serve import listening
from selftrans.ui.server import Page, application
from tests.support.scripts import script
from tests.support.toy import pictures, prepared, vanilla


def test_velocity_of_contrastive_training_by_hand() -> None:
    changed = script("scaled_velocity").changed
    v, mean = torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0, 1.0]])
    torch.testing.assert_close(changed(v, 0.2, mean), torch.tensor([[3.2 / 0.8, 0.8 / 0.8]]))
    torch.testing.assert_close(changed(v, 0.2, None), v / 0.8)
    torch.testing.assert_close(changed(changed(v, 0.2, mean), -0.2 / 0.8, mean), v)


def test_distances_under_a_changed_velocity(tmp_path: Path) -> None:
    out = tmp_path / "scaled.json"
    words = [str(vanilla()), "--features", "digits", "--images", "20", "--factors", "0", "0.05"]
    script("scaled_velocity").main([*words, "--out", str(out)])
    points = json.loads(out.read_text())["points"]
    last = max(p["step"] for p in points)
    found = [(p["kind"], p["factor"]) for p in points if p["step"] == last]
    assert found == [("contrastive", 0.0), ("contrastive", 0.05), ("scaled", 0.05)]
    assert len({p["distance"] for p in points if p["step"] == last}) == 3


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


def test_encoder_refuses_pictures_that_are_not_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(pictures(tmp_path / "pictures"), tmp_path / "data", resolution=(8, 4), progress=False)
    with pytest.raises(SystemExit):
        script("encoder").main(["--out", str(tmp_path / "e"), "--data", str(tmp_path / "data"), "--epochs", "1"])
    assert "does not hold square pictures; prepare some with --resolution SIDE" in capsys.readouterr().err


# ---- every method in one process

TOY = ("model.width=32", "model.depth=3", "model.heads=2", "model.patch=2", "train.batch_size=8", "sample.steps=2")
TOY += ("stage1.head_width=16", "stage2.head_width=16")


def test_arms_are_tuned_trained_measured_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, out = script("evidence_gpu"), tmp_path / "out"
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
    given += ["--rates", "1e-3", "2e-3", "--stds", "0.5"]
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
    done = results()
    runs, best = (
        done["runs"],
        min((1e-3, 0.5), (2e-3, 0.5), key=lambda p: last(done, f"tune-lr={p[0]:g}-std={p[1]:g}")),
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
    assert f"to vanilla {rows['w2']['difference']['mean']:+.3f} at equal steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds results of other images"):
        results("--images", "9")


def test_stop_while_the_classifier_is_trained_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script("evidence_gpu")

    def stopped(*_: Any, **__: Any) -> str:
        raise Interrupted("stopped by SIGTERM at step 7; the same command continues")

    monkeypatch.setattr(gpu, "classifier_from_data", stopped)
    assert gpu.main([str(prepared(tmp_path, count=8)), "--out", str(tmp_path / "out"), "--set", *TOY]) == EXIT_RESUME
    assert capsys.readouterr().err == "evidence_gpu: stopped by SIGTERM at step 7; the same command continues\n"


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
    assert rows["vanilla-longer"]["difference"] is None, "more steps than vanilla"


# ---- answers of the local page


@contextlib.contextmanager
def served_here(folder: Path) -> Iterator[tuple[int, int]]:
    """The server of `selftrans ui` in a thread of this process, which starts at once."""
    config = uvicorn.Config(application(Page([folder])), log_level="warning", access_log=False)
    server, listener = uvicorn.Server(config), listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1], os.getpid()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def test_every_kind_of_request_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = script("ui_speed")
    monkeypatch.setattr(speed, "started", served_here)
    options = ["--runs", "3", "--lines", "20", "--starts", "1", "--repeats", "2", "--pause", "0"]
    speed.main([*options, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "ui_speed.json").read_text())
    counts = {(row["request"], row["state"]): row["count"] for row in report["requests"]}
    shown = ("page", "a run", "side by side", "tables", "preview")
    assert counts == {
        **{(kind, "cold"): 3 if kind == "a run" else 1 for kind in (*shown, "list of runs")},
        **{(kind, "warm"): 2 for kind in shown},
        ("list of runs", "warm"): 1,
        **{(kind, "grown"): 2 for kind in ("a run", "list of runs")},
    }
    sent = {(row["request"], row["state"]): row["bytes"] for row in report["requests"]}
    assert sent["a run", "warm"] == 0 < sent["a run", "grown"], "a browser has what has not changed"
    assert all(0 < row["ms"] <= row["ms_largest"] for row in report["requests"])
    assert (report["runs"], report["lines"]) == (3, 20) and report["log_bytes"] > 3 * 2 * 20 * 100
    assert "processor ms largest" in capsys.readouterr().out


def test_medians_and_largest_values_by_hand() -> None:
    speed = script("ui_speed")
    noted = {("a run", "cold"): [(1.0, 4.0, 10), (9.0, None, 30), (2.0, 6.0, 20)], ("page", "warm"): [(1.0, None, 0)]}
    first, second = speed.table(noted)
    assert first == {
        "request": "a run", "state": "cold", "count": 3, "bytes": 20,
        "ms": 2.0, "ms_largest": 9.0, "processor_ms": 5.0, "processor_ms_largest": 6.0,
    }  # fmt: skip
    assert second["processor_ms"] is None and speed.text([first, second]).count("\n") == 3


def test_runs_that_the_page_finds_wrong_are_not_measured(tmp_path: Path) -> None:
    speed = script("ui_speed")
    speed.make_runs(tmp_path / "runs", 1, 10)
    (tmp_path / "runs" / "run-seed0" / "run.json").write_text("{")
    client = speed.Client()
    with served_here(tmp_path / "runs") as (port, pid):
        client.connect(port, pid)
        with pytest.raises(ValueError, match="1 of them not as they were made"):
            speed.measure(client, tmp_path / "runs", 10, 1, 0)


def test_figures_are_drawn_again_from_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, file = script("figures"), tmp_path / "a.json"
    lines = {"self_transcendence": [[0.3, 0.4], [0.5, 0.4]], "dispersive": [[0.2, 0.1]]}
    file.write_text(json.dumps({"probes": {name: {"0.2": rows} for name, rows in lines.items()}, "norms": {}}))
    stored = file.read_bytes()
    monkeypatch.setattr(figures, "TIMESTEPS", (0.2,))
    monkeypatch.setattr("sys.argv", ["figures.py", str(file), "--out", str(tmp_path), "--name", "a"])
    figures.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-probes.png", "a.json"]
    assert file.read_bytes() == stored
    drawn = figures.draw_probes(json.loads(stored)["probes"]).axes[0].lines
    assert [line.get_ydata().tolist() for line in drawn] == [[0.4, 0.4], [0.2, 0.1]], "means over seeds"
    assert all(line.get_markersize() > 8 * line.get_markeredgewidth() for line in drawn), "markers are not all edge"


def test_curve_of_the_baseline_goes_on_over_all_compute() -> None:
    figures = script("figures")
    own = {
        "step": {"vanilla": [[1, 2], [9.0, 5.0], [0.1, 0.2]]},
        "tflops": {"vanilla": [[3.0, 6.0], [9.0, 5.0], [0.1, 0.2]]},
    }
    row = {"method": "vanilla", "steps": 4, "total_tflops": {"mean": 12.0, "std": 0.0}}
    longer = {"table": [row], "curves": {"vanilla": [[2, 3, 4], [5.0, 4.0, 3.0], [0.2, 0.3, 0.4]]}}
    found = figures.over_more_compute({"curves": own}, longer)["curves"]
    assert found["tflops"]["vanilla"] == [[3.0, 6.0, 9.0, 12.0], [9.0, 5.0, 4.0, 3.0], [0.1, 0.2, 0.3, 0.4]]
    assert found["step"] == own["step"] and len(own["tflops"]["vanilla"][0]) == 2
    assert figures.over_more_compute({"curves": own}, None)["curves"] == own
