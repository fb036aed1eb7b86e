"""Internal Guidance by hand: the second output's loss and place, its average, its resume, and sampling with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selftrans import Objective, SiT
from selftrans.checkpoints.format import read_header
from selftrans.checkpoints.load import find, load_model
from selftrans.cli.main import main
from selftrans.config import SampleConfig, to_json
from selftrans.data.dataset import Dataset
from selftrans.encoders.identity import identity
from selftrans.interop import SiTPipeline
from selftrans.interop.exporting import export_run
from selftrans.interop.interpolant_scheduler import InterpolantScheduler
from selftrans.interop.interpolant_transformer import InterpolantTransformer
from selftrans.methods.internal_guidance import Internal, InternalGuidance, default_block
from selftrans.methods.registry import meta_objective, stages
from selftrans.sampling.images import Sampler
from selftrans.sampling.run_settings import applicable_settings
from selftrans.train.flops import step_flops
from selftrans.train.run import train
from tests.support.shared import once
from tests.support.stub import Stub, features_by_hand, handmade_draw, patches_by_hand
from tests.support.toy import assert_same_run, checkpoint, place, quick, toy  # noqa: F401 - quick is a fixture

NAME = "internal_guidance"
WEIGHT, BIAS = "early_output.1.weight", "early_output.1.bias"


@once
def run() -> Path:
    train(toy({"method": NAME, "model.early_block": 2}), place("internal guidance"), quiet=True)
    return place("internal guidance")


# ---- the loss


def test_loss_by_hand() -> None:
    """Mean squared error of W LN(h_2) + b against the velocity's patches, added with its weight."""
    student, d = Stub(), handmade_draw([0.1, 0.4, 0.9])
    student.add_early(2)
    torch.manual_seed(0)
    torch.nn.init.normal_(student.early[1].weight)
    torch.nn.init.normal_(student.early[1].bias)
    loss, report = Objective(student, [InternalGuidance(student, Internal(weight=0.3))]).losses(d, 0)
    weight, bias = (p.detach().numpy() for p in (student.early[1].weight, student.early[1].bias))
    errors = []
    for i in range(3):
        for h, v in zip(features_by_hand(d, i, 2), patches_by_hand(d.v[i].numpy(), 2), strict=True):
            errors.append(np.mean((weight @ ((h - h.mean()) / np.sqrt(h.var() + 1e-6)) + bias - v) ** 2))
    assert report["early"].item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.3 * np.mean(errors), rel=1e-4)


@pytest.mark.parametrize(("depth", "block"), [(28, 8), (24, 8), (12, 4), (6, 2), (2, 1)])
def test_default_block_is_the_released_one_of_28(depth: int, block: int) -> None:
    assert default_block(depth) == block


def test_operations_of_the_second_output_are_counted() -> None:
    """A linear layer of 16 channels to 4 cells on 4 tokens: 2 x 16 x 4 x 4 operations, and twice that backward."""
    student = SiT((1, 4, 4), 3, width=16, depth=3, heads=2, patch=2)
    objective = Objective(student, [InternalGuidance(student, Internal())])
    assert step_flops(objective, torch.zeros(1, dtype=torch.long), 5)[0] == 5 * 3 * (2 * 16 * 4 * 4)
    assert not [name for name in objective.state_dict() if name.startswith("guidances")], "it is the student's, once"


# ---- its place in the model


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 6), (2, 2, 4, 4)])
def test_tokens_become_the_latent_that_they_were_cut_from(shape: tuple[int, ...]) -> None:
    model, x = SiT(shape, 3, width=16, depth=2, heads=2, patch=2), torch.randn(2, *shape)
    assert torch.equal(model.from_tokens(model.patchify(x), shape), x)


@pytest.mark.parametrize("block", [0, 3, 9])
def test_block_must_be_before_the_last(block: int) -> None:
    with pytest.raises(ValueError, match=f"model.early_block {block} must be a block before the last of 3"):
        SiT((1, 4, 4), 3, width=16, depth=3, heads=2, patch=2).add_early(block)


def test_method_that_does_not_train_the_second_output_is_refused() -> None:
    student = SiT((1, 4, 4), 3, width=16, depth=3, heads=2, patch=2)
    student.add_early(1)
    with pytest.raises(ValueError, match="which this method does not train"):
        Objective(student)
    assert student.truncated(2).early is None and student.early is not None


def test_second_output_is_averaged_and_in_each_weights_file() -> None:
    folder = checkpoint(run(), NAME)
    raw, average = (load_file(folder / f"{name}.safetensors") for name in ("student", "ema"))
    assert raw[WEIGHT].abs().max() > 0 and not torch.equal(raw[WEIGHT], average[WEIGHT])
    assert not load_file(folder / "heads.safetensors")
    loaded = load_model(run())
    assert loaded.model.early_block == 2 and torch.equal(loaded.model.early[1].bias, average[BIAS])


def test_default_block_becomes_a_setting_of_the_run(tmp_path: Path) -> None:
    config = toy({"method": NAME, "train.steps": 1})
    manifest = Dataset.open(str(config.data.path)).manifest
    meta_objective(config, stages(config)[0], manifest.shape, manifest.conditions)  # not settled yet, as in `compare`
    train(config, tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["early_block"] == 1


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    options = {"method": NAME, "model.early_block": 2}
    train(toy(options | {"train.steps": 4}), tmp_path / "resumed", quiet=True)
    train(toy(options), tmp_path / "resumed", quiet=True)
    assert_same_run(run(), tmp_path / "resumed", stages=(NAME,))


def test_export_to_a_published_layout_leaves_the_second_output_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the second output of the model is left out"):
        written = export_run(run(), tmp_path / "repa", layout="repa")
    assert not [name for name in load_file(written) if "early" in name]
    assert WEIGHT in load_file(export_run(run(), tmp_path / "ours"))


# ---- sampling


def sample(out: Path, *options: str) -> np.ndarray:
    given = ["--num", "3", "--sampler", "euler", "--steps", "2", "--seed", "5", *options]
    assert main(["sample", str(run()), "--out", str(out), *given]) == 0
    with np.load(out / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"]


def test_guidance_by_the_second_output_is_applied_resumed_and_recorded(tmp_path: Path) -> None:
    plain = sample(tmp_path / "plain")
    guided = sample(tmp_path / "guided", "--early-guidance", "3")
    assert not np.array_equal(plain, guided)
    assert np.array_equal(guided, sample(tmp_path / "guided", "--early-guidance", "3")), "the same when repeated"
    settings = json.loads((tmp_path / "guided" / "samples.json").read_text())["settings"]
    assert settings["early_guidance"] == 3.0 and "early_interval" not in settings
    assert "early_guidance" not in json.loads((tmp_path / "plain" / "samples.json").read_text())["settings"]
    outside = sample(tmp_path / "outside", "--early-guidance", "3", "--early-interval", "0.6", "0.9")
    assert np.array_equal(outside, plain), "Euler's two steps evaluate at 1 and 0.5"


def test_pipeline_is_guided_as_the_settings_of_the_run_say(tmp_path: Path) -> None:
    loaded = load_model(run())
    guided = dataclasses.replace(loaded.config.sample, early_guidance=3.0, early_interval=(0.3, 1.0))
    loaded = loaded._replace(config=dataclasses.replace(loaded.config, sample=guided))
    header = read_header(find(run()))
    header["config"] = json.loads(to_json(loaded.config))
    pipe = SiTPipeline(InterpolantTransformer.of(loaded, header), InterpolantScheduler("heun"))
    pipe.set_progress_bar_config(disable=True)

    def expected(**changes: float) -> np.ndarray:
        settings = dataclasses.replace(guided, num=3, steps=3, sampler="heun", seed=5, labels=(1, 2, 3), **changes)
        (batch,) = Sampler.of(loaded, settings).sample()
        return batch.images

    options = {"num_inference_steps": 3, "seed": 5, "output_type": "np"}
    found = pipe([1, 2, 3], **options).images
    assert np.array_equal(found, expected()) and not np.array_equal(found, expected(early_guidance=1.0))
    both = pipe([1, 2, 3], guidance_scale=2.0, early_guidance=2.0, **options).images
    assert np.array_equal(both, expected(guidance_scale=2.0, early_guidance=2.0))
    assert np.array_equal(pipe([1, 2, 3], early_guidance=1.0, **options).images, expected(early_guidance=1.0))
    pipe.transformer.backbone.remove_early()
    with pytest.raises(ValueError, match="early_guidance is 3, and the model has no second output"):
        pipe([1, 2, 3], **options)


def test_sampler_without_a_second_output_refuses_early_guidance_and_applicable_settings_drop_it() -> None:
    model, settings = SiT((1, 4, 4), 3, width=16, depth=3, heads=2, patch=2), SampleConfig(early_guidance=2.0)
    with pytest.raises(ValueError, match="early_guidance is 2, and the model has no second output"):
        Sampler(model, identity("pixel"), settings, device="cpu")
    assert applicable_settings(settings, model).early_guidance == 1.0
    model.add_early(1)
    assert applicable_settings(settings, model) is settings
