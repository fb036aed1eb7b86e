"""REPA against hand-computed values; the encoder is not part of the objective; stored and computed features agree."""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.data.prepare_features import prepare_features
from selftrans.encoders.vision import load_encoder
from selftrans.methods.objective import Objective
from selftrans.methods.registry import stages
from selftrans.methods.repa import Repa, RepaGuidance
from selftrans.models.sit import SiT
from selftrans.train.batches import Loaded, to_batch
from selftrans.train.run import train
from selftrans.train.trainer import Trainer
from tests.support.memory import freed
from tests.support.pictures import save_vae
from tests.support.shared import once
from tests.support.stub import Stub, handmade_draw, mlp_by_hand, numbers, patches_by_hand
from tests.support.toy import assert_same_run, checkpoint, digits, flags, log, pictures, place, quick, tensors, toy  # noqa: F401
from tests.support.vision import save_encoder

TIMES = [0.1, 0.4, 0.9]


def stored(grid: int = 2, width: int = 5) -> SimpleNamespace:
    return SimpleNamespace(grid=(grid, grid), width=width, flops=0, encode=None)


@once
def encoder() -> str:
    return save_encoder(place("encoder"))


@once
def with_features() -> Path:
    """Mirrored digits with their features."""
    shutil.copytree(digits(), place("digits with features"))
    prepare_features("digits", place("digits with features"), encoder(), progress=False)
    return place("digits with features")


# ---- the loss


def test_loss_of_known_vectors() -> None:
    """Mean over samples and tokens of one minus the cosine over channels; norms do not matter."""
    g = RepaGuidance(Stub(), stored(width=3), Repa(block=2))
    g.head = nn.Identity()
    hidden = torch.tensor([  # (N, T, D): 2 samples of 4 tokens
        [[3.0, 4, 0], [1, 0, 0], [0, 0, 2], [1, 1, 0]],
        [[5.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 0]],
    ])  # fmt: skip
    target = torch.tensor([
        [[4.0, 3, 0], [0, 2, 0], [0, 0, 7], [0, 0, 1]],  # cosines 24/25, 0, 1, 0
        [[-1.0, 0, 0], [0, 9, 0], [0, 0, 1], [0, 1, 1]],  # -1, 1, 1, 1/sqrt 2
    ])  # fmt: skip
    d = handmade_draw(TIMES[:2])._replace(features=target.half())
    term, report = g(d, {2: hidden})
    cosines = [24 / 25, 0, 1, 0, -1, 1, 1, 1 / math.sqrt(2)]
    assert term.item() == pytest.approx(sum(1 - c for c in cosines) / 8, rel=1e-6) and term.dim() == 0
    assert report["target_norm"].item() == pytest.approx((5 + 2 + 7 + 1 + 1 + 9 + 1 + math.sqrt(2)) / 8, rel=1e-6)


def test_loss_with_head_equals_a_hand_computed_value() -> None:
    """All samples at all times, through the head, with the condition that the student sees."""
    student, d = Stub(), handmade_draw(TIMES, dropped=(1,))
    target = torch.randn(3, 4, 5)
    g = RepaGuidance(student, stored(), Repa(block=3, weight=0.3, head_width=6))
    parameters = [numbers(p) for p in g.head.parameters()]
    terms = []
    for i in range(3):
        h = 0.5 * patches_by_hand(numbers(d.zt[i]), 2) - 1.5 * TIMES[i] + 0.25 * d.dropped[i].item()
        for token, y in zip(h, numbers(target[i]), strict=True):
            p = mlp_by_hand(parameters, token)
            terms.append(1 - p @ y / math.sqrt((p @ p) * (y @ y)))
    loss, report = Objective(student, [g]).losses(d._replace(features=target), 0)
    assert report["repa"].item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.3 * np.mean(terms), rel=1e-5)


def test_gradient_reaches_head_and_student_but_not_the_encoder() -> None:
    model = load_encoder(encoder(), 4)
    student = SiT((3, 8, 8), 3, width=16, depth=3, heads=2, patch=2)
    with torch.no_grad():
        for parameter in student.parameters():  # the gates of a new model are zero
            parameter.normal_(std=0.1)
    g = RepaGuidance(student, model, Repa(head_width=8))
    objective, d = Objective(student, [g]), handmade_draw(TIMES, shape=(3, 8, 8), num_classes=3)
    term, _ = g(d, student(d.zt, d.t, d.dropped, taps=g.taps).feats)
    term.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in g.head.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
    held = {id(p) for p in model.model.parameters()}
    assert not held & {id(p) for p in objective.parameters()} and not any(
        "encoder" in key for key in objective.state_dict()
    )
    assert not [m for m in objective.modules() if m is model.model]


def test_default_block_is_the_published_one() -> None:
    blocks = {}
    for depth in (2, 6, 12, 24, 28):
        blocks[depth] = RepaGuidance(
            SiT((1, 4, 4), 3, width=8, depth=depth, heads=1, patch=2), stored(), Repa(head_width=4)
        ).block
    assert blocks == {2: 1, 6: 2, 12: 4, 24: 8, 28: 8}
    assert (Repa().weight, Repa().head_width, Repa().until_step) == (0.5, 2048, None)


def test_grid_that_differs_from_the_students_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on a 4x4 grid, the student's tokens on 2x2; prepare the data with --grid 2"):
        RepaGuidance(Stub(), stored(grid=4), Repa())
    for grid, named in (((2, 4), "2x4"), ((4,), "4"), ((2, 2, 2), "2x2x2")):  # no value of --grid fits these
        student = Stub()
        student.grid = grid
        with pytest.raises(
            ValueError, match=f"tokens on {named}; an encoder's grid is a square, so give data of square"
        ):
            RepaGuidance(student, stored(grid=2), Repa())


# ---- stored features


def test_stored_features_are_those_of_the_chosen_copy() -> None:
    """The digits are stored with mirrored copies: the features belong to the copy that is drawn."""
    shards, model = Dataset.open(with_features()), load_encoder(encoder(), 4)
    shards.open_features()
    model.space = shards.manifest.latent_space
    rows = np.arange(0, 1797, 45)
    loaded = Loaded(rows, shards.read(rows))
    torch.manual_seed(3)
    batch = to_batch(loaded, shards, torch.device("cpu"))
    torch.manual_seed(3)
    without = to_batch(Loaded(rows, shards.read(rows, ["moments", "labels"])), shards, torch.device("cpu"))
    assert torch.equal(batch.z0, without.z0) and without.features is None, (
        "the noise of a run is the same with features"
    )
    plain = shards.manifest.latent_space.mean(loaded.tensors["moments"][:, 0])
    mirrored = [not torch.equal(z, own) for z, own in zip(batch.z0, plain, strict=True)]
    assert 5 < sum(mirrored) < 35
    assert batch.features is not None and batch.features.shape == (40, 16, 16)
    expected = model.encode(batch.z0)
    torch.testing.assert_close(batch.features.float(), expected, rtol=0.01, atol=0.01)
    assert (expected - model.encode(batch.z0.flip(dims=(3,)))).abs().amax(dim=(1, 2)).min() > 0.05, (
        "otherwise the comparison proves nothing"
    )


REPA: dict[str, Any] = {"method": "repa", "repa.head_width": 16, "train.steps": 6}


@once
def runs() -> tuple[Path, Path]:
    """A run whose encoder sees the pixels, and one on stored features, otherwise the same."""
    live, kept = place("repa live"), place("repa kept")
    train(toy(REPA | {"repa.encoder": encoder()}), live, quiet=True)
    train(toy(REPA | {"data.path": str(with_features())}), kept, quiet=True)
    return live, kept


def test_stored_and_computed_features_train_alike() -> None:
    live, kept = (log(run, "repa") for run in runs())
    for a, b in zip(live, kept, strict=True):
        assert a["repa"] == pytest.approx(b["repa"], rel=2e-3) and a["flow"] == pytest.approx(b["flow"], rel=2e-3)
        assert a["repa/target_norm"] == pytest.approx(b["repa/target_norm"], rel=2e-3)
    assert live[0]["repa"] != live[-1]["repa"]
    names = tensors(runs()[0], "repa").keys()
    assert any(name.startswith("heads/") for name in names) and not any(
        "encoder" in name.split("/")[1] for name in names
    )


def test_operations_of_the_encoder_are_counted() -> None:
    """The extra cost of a step compared with stored features: one forward pass of the encoder per image."""
    live, kept = (log(run, "repa")[-1]["tflops"] * 1e12 for run in runs())
    expected = 6 * 8 * load_encoder(encoder(), 4).flops  # steps x images
    assert live - kept == pytest.approx(expected, rel=1e-6)


def test_memory_of_the_encoder_is_counted() -> None:
    live, kept = (json.loads((run / "run.json").read_text())["stages"][0]["memory"] for run in runs())
    model = load_encoder(encoder(), 4).model
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert live.pop("encoder") == held > 0 and live == kept


@pytest.mark.parametrize("features", ["stored", "computed"])
def test_interrupted_and_continued_equals_uninterrupted(features: str, tmp_path: Path) -> None:
    """Across checkpoints, and across the guidance's end at step 5."""
    options = REPA | {"repa.until_step": 5, "train.steps": 8}
    options |= {"data.path": str(with_features())} if features == "stored" else {"repa.encoder": encoder()}
    train(toy(options), tmp_path / "uninterrupted", quiet=True)
    for steps in (2, 4, 6, 8):
        train(toy(options | {"train.steps": steps}), tmp_path / "resumed", quiet=True)
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "resumed", stages=("repa",))
    lines = log(tmp_path / "uninterrupted", "repa")
    assert "repa" in lines[0] and "repa" not in lines[-1], "the term is absent after its end"
    assert not [name for name in tensors(tmp_path / "uninterrupted", "repa") if name.startswith("heads/")]


def test_encoder_is_freed_and_features_are_not_read_after_guidance_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    step = Trainer.train_step

    def watching(self: Trainer, batches: Any) -> None:
        if not seen:
            seen.append(weakref.ref(self.teacher.model))
        step(self, batches)
        held = self.teacher is not None
        seen.append((not freed(seen[0], seconds=0 if held else 30), held))

    monkeypatch.setattr(Trainer, "train_step", watching)
    train(toy(REPA | {"repa.encoder": encoder(), "repa.until_step": 3}), tmp_path / "run", quiet=True)
    assert seen[1:] == [(True, True)] * 2 + [(False, False)] * 4

    monkeypatch.undo()
    gather, batches = Dataset._gather, []

    def counted(self: Dataset, name: str, rows: np.ndarray, which: np.ndarray | None) -> torch.Tensor:
        batches.extend([len(rows)] * (name == "features"))
        return gather(self, name, rows, which)

    monkeypatch.setattr(Dataset, "_gather", counted)
    options = REPA | {"data.path": str(with_features()), "repa.until_step": 3, "train.accumulate": 1}
    train(toy(options), tmp_path / "stored", quiet=True)
    assert 3 <= len(batches) <= 5, "three steps and at most two batches read ahead"
    train(
        toy({"method": "vanilla", "train.steps": 2, "data.path": str(with_features())}), tmp_path / "plain", quiet=True
    )
    assert len(batches) <= 5, "a method that does not use features reads none"


def test_on_device_data_give_the_same_run(tmp_path: Path) -> None:
    train(toy(REPA | {"data.path": str(with_features()), "data.on_device": True}), tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", runs()[1], stages=("repa",))


def test_reduced_precision(tmp_path: Path) -> None:
    train(toy(REPA | {"repa.encoder": encoder(), "train.precision": "bf16"}), tmp_path / "run", quiet=True)
    assert log(tmp_path / "run", "repa")[0]["repa"] == pytest.approx(log(runs()[0], "repa")[0]["repa"], rel=0.02)


# ---- refused settings and data


def test_other_encoder_is_refused_on_resume_and_a_moved_one_is_accepted(tmp_path: Path) -> None:
    shutil.copytree(encoder(), tmp_path / "moved")
    shutil.copytree(runs()[0], tmp_path / "run")
    other = save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was trained with the teacher .*, which is not the one given now"):
        train(toy(REPA | {"repa.encoder": other, "train.steps": 7}), tmp_path / "run", quiet=True)
    train(toy(REPA | {"repa.encoder": str(tmp_path / "moved"), "train.steps": 7}), tmp_path / "run", quiet=True)
    assert checkpoint(tmp_path / "run", "repa").name == "step-00000007"


def test_unsuitable_data_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no features; .*or give an encoder by hub id or folder"):
        train(toy(REPA), tmp_path / "run", quiet=True)
    vae, source = save_vae(tmp_path / "vae"), pictures(tmp_path / "pictures")
    prepare(source, tmp_path / "latents", autoencoder=vae, progress=False)
    latents = {"data.path": str(tmp_path / "latents")}
    with pytest.raises(
        ValueError, match=r"holds no features; .*`selftrans prepare .*pictures --out .* --features MODEL`"
    ):
        train(toy(REPA | latents), tmp_path / "run", quiet=True)
    with pytest.raises(
        ValueError, match=r"encoder .* reads pixels; store its features by `selftrans prepare .* --features"
    ):
        train(toy(REPA | latents | {"repa.encoder": encoder()}), tmp_path / "run", quiet=True)
    prepare_features(source, tmp_path / "latents", encoder(), progress=False)
    with pytest.raises(ValueError, match=r"on a 2x2 grid, the student's tokens on 4x4; prepare the data with --grid 4"):
        train(toy(REPA | latents | {"model.patch": 1}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "config.json").exists()
    train(toy(REPA | latents | {"train.steps": 2}), tmp_path / "run", quiet=True)
    assert "repa" in log(tmp_path / "run", "repa")[0]


def test_method_has_one_stage_with_an_encoder_and_no_teacher() -> None:
    (stage,) = stages(toy(REPA | {"repa.encoder": "owner/model"}))
    assert stage.name == "repa" and stage.teacher is None and stage.encoder is not None
    assert stage.encoder.name == "owner/model"


# ---- the commands


def test_train_and_sample_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    options = flags({"repa.head_width": 16, "repa.encoder": encoder(), "train.steps": 3})
    assert main(["train", "digits", "--method", "repa", "--out", run, *options]) == 0
    assert "repa guidance at block 1" in capsys.readouterr().out
    assert main(["sample", run, "--out", str(tmp_path / "images"), "--num", "4", "--steps", "2"]) == 0
    assert len(list((tmp_path / "images").rglob("*.png"))) == 4
    assert main(["train", "digits", "--method", "repa", "--out", str(tmp_path / "none"), *flags()]) == 1
    assert "--features MODEL" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert (
        main(["train", "digits", "--method", "repa", "--out", str(tmp_path / "x"), "--repa.encoder=no/model", *flags()])
        == 1
    )
    assert "encoder 'no/model' cannot be loaded" in capsys.readouterr().err
