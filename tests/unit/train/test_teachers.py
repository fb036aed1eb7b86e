"""Which weights teach a stage, and how unsuitable ones are refused."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from selftrans.checkpoints.load import load_model
from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents
from selftrans.data.prepare import prepare
from selftrans.encoders.latent_space import UNSCALED
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import config_of_teacher, stages
from selftrans.train.resume import settings_before
from selftrans.train.run import train
from selftrans.train.teachers import (
    StoredFeatures,
    check_given,
    external_encoder,
    find_teacher,
    load_teacher,
    teacher_of,
    training_cost,
)
from tests.support import toy
from tests.support.toy import quick  # noqa: F401 - a fixture
from tests.support.vision import save_encoder

CPU = torch.device("cpu")


def spec(**changes):
    """The teacher of the second stage of a toy run."""
    return dataclasses.replace(stages(toy.toy())[1].teacher, **changes)


def test_teacher_is_the_last_checkpoint_of_the_earlier_stage():
    path = find_teacher(toy.finished(), spec())
    assert path == toy.checkpoint(toy.finished(), "stage1") / "student.safetensors"
    assert find_teacher(toy.finished(), spec(weights="ema")).name == "ema.safetensors"
    assert find_teacher(path, spec()) == path  # a weights file is used as it is


def test_teacher_of_a_stage_is_frozen_at_its_block_in_the_precision_of_the_run():
    config = toy.toy({"train.precision": "bf16"})
    first, second = stages(config)
    data = Dataset.open(toy.digits())
    assert teacher_of(config, first, str(toy.finished()), data, CPU) is None
    teacher = teacher_of(config, second, str(toy.finished()), data, CPU)
    assert isinstance(teacher, Frozen) and teacher.block == 2 and teacher.dtype == torch.bfloat16
    weights = toy.tensors(toy.finished(), "stage1")["student/blocks.0.mlp.fc1.weight"]
    assert torch.equal(dict(teacher.model.named_parameters())["blocks.0.mlp.fc1.weight"], weights.bfloat16())


def test_weights_of_another_stage_teach_with_a_warning_if_they_are_named():
    manifest = Dataset.open(toy.digits()).manifest
    for path, stage in ((toy.checkpoint(toy.finished(), "stage2"), "stage2"), (toy.vanilla() / "vanilla", "vanilla")):
        with pytest.warns(UserWarning, match=f"was trained in {stage}, not in stage1; it teaches as it is"):
            assert load_teacher(path, spec(), manifest).stage == stage
    with pytest.raises(
        ValueError, match=r"has no stage1: it holds vanilla; to be taught by that model as it is, give .*/vanilla$"
    ):
        load_teacher(toy.vanilla(), spec(), manifest)


def test_teacher_of_other_data_is_refused(tmp_path):
    manifest = Dataset.open(toy.prepared(tmp_path)).manifest
    with pytest.raises(
        ValueError, match=r"trained on latents \(1, 8, 8\) with 10 classes; expected \(3, 8, 8\) with 2 classes"
    ):
        load_teacher(toy.finished(), spec(), manifest)


def test_given_teacher_of_another_path_is_refused_and_of_another_autoencoder_warns():
    manifest = Dataset.open(toy.digits()).manifest
    teacher = load_teacher(toy.finished(), spec(), manifest)
    check_given(teacher, toy.toy(), manifest)
    with pytest.raises(
        ValueError, match=r"trained on the linear path, and train\.path is cosine.*--train\.path linear"
    ):
        check_given(teacher, toy.toy({"train.path": "cosine"}), manifest)
    with pytest.warns(UserWarning, match=r"names the autoencoder pixel\(.*\), the data other/vae"):
        check_given(teacher, toy.toy({"data.autoencoder": "other/vae"}), manifest)


def test_given_teacher_of_another_scale_is_refused_and_of_nearly_the_same_is_not():
    manifest = Dataset.open(toy.digits()).manifest
    teacher = load_teacher(toy.finished(), spec(), manifest)
    plain = dataclasses.replace(manifest, autoencoder="pixel", latent_space=UNSCALED)
    with pytest.raises(
        ValueError, match=r"the teacher .* was trained on pixel\(shift=.*the data are pixel, latents of another sc"
    ):
        check_given(teacher, toy.toy(), plain)
    near = dataclasses.replace(manifest, autoencoder="pixel(shift=-0.38,scale=1.31)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_given(teacher, toy.toy(), near)


def test_encoder_of_standardised_pixels_sees_pixels(tmp_path):
    source = toy.pictures(tmp_path / "pictures", side=16)
    plain, scaled = (
        Dataset.open(save(source, tmp_path / name, standardise=name == "scaled")) for name in ("plain", "scaled")
    )
    config, name = toy.toy({"model.patch": 4}), save_encoder(tmp_path / "encoder", "vit")
    features = [
        external_encoder(name, config, data, CPU, torch.float32).encode(data_latents(data, 4)[0])
        for data in (plain, scaled)
    ]
    torch.testing.assert_close(features[1], features[0], rtol=1e-4, atol=1e-5)
    assert features[0].std() > 0.1


def save(source, out, **options):
    prepare(source, out, progress=False, **options)
    return out


def test_cost_of_a_given_teacher_is_read_from_its_file():
    assert training_cost(spec()) is None
    cost = training_cost(spec(given=str(toy.finished())))
    assert cost["steps"] == 4 and cost["seconds"] > 0
    assert cost["tflops"] == pytest.approx(toy.log(toy.finished(), "stage1")[-1]["tflops"])


SMALL = {"stage2.teacher_width": 16, "stage2.teacher_depth": 2, "stage2.teacher_lr": 4e-3}


def test_teacher_of_its_own_size(tmp_path):
    run, config = tmp_path / "run", toy.toy(SMALL)
    report = train(config, run, quiet=True)
    teacher, student = (load_model(run, stage=stage) for stage in ("stage1", "stage2"))
    assert (teacher.model.width, teacher.model.depth, teacher.config.train.lr) == (16, 2, 4e-3)
    assert (student.model.width, student.model.depth, student.config.train.lr) == (32, 3, 1e-3)
    assert settings_before(run).model == config.model
    assert toy.log(run, "stage1")[-1]["lr"] == pytest.approx(4e-3) and toy.log(run, "stage2")[-1][
        "lr"
    ] == pytest.approx(1e-3)
    full = json.loads((toy.finished() / "run.json").read_text())["stages"]
    assert report["stages"][0]["tflops"] < full[0]["tflops"] / 2
    # the student's own part is the same; the teacher's forward passes and the head's width are smaller
    assert report["stages"][1]["tflops"] < full[1]["tflops"]
    assert (
        teacher_of(config, stages(config)[1], str(run), Dataset.open(toy.digits()), CPU).block == 1
    )  # 2/3 of two blocks


def test_run_with_a_small_teacher_continues_bit_for_bit_without_its_config_file(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(toy.toy(SMALL), whole, quiet=True)
    toy.copy(whole, parts)
    for name in ("stage2", "config.json"):  # it was stopped at the end of stage 1, and the file was lost
        (shutil.rmtree if (parts / name).is_dir() else Path.unlink)(parts / name)
    assert settings_before(parts).model == toy.toy().model  # not that of stage 1
    train(toy.toy(SMALL), parts, quiet=True)
    toy.assert_same_run(parts, whole)
    with pytest.raises(ValueError, match=r"stage2\.teacher_width was 16, is None"):
        train(toy.toy(), parts, quiet=True)


def test_size_of_the_teacher_needs_a_model_that_has_it_and_a_start_from_nothing():
    with pytest.raises(
        ValueError, match=r"stage2\.teacher_width is for models with a model\.width; diffusers-dit has none"
    ):
        stages(toy.toy({"model.name": "diffusers-dit"} | SMALL))
    with pytest.raises(ValueError, match=r"stage2\.teacher_width does not go with init\.path"):
        stages(toy.toy({"init.path": "run"} | SMALL))
    assert stages(toy.toy({"method": "structure"}))[0].settings == {}
    given = toy.toy({"init.path": "run", "stage2.teacher": "other", "stage2.teacher_width": 16})
    assert stages(given)[0].settings == {}  # no teacher is trained


@pytest.mark.parametrize(
    ("again", "teacher"), [(True, True), (3, 2), (1, 1), ((1, 3), (1,)), (False, False)], ids=lambda value: f"{value}"
)
def test_blocks_that_a_shallower_teacher_does_not_have_are_not_recomputed(again, teacher):
    config = toy.toy({"train.recompute": again, "stage2.teacher_depth": 2})
    assert config_of_teacher(config, stages(config)[1]).train.recompute == teacher
    assert config.train.recompute == again


def test_settings_that_all_stages_share_are_refused():
    with pytest.raises(
        ValueError, match=r"stage 'first' cannot have its own train\.batch_size: all stages of a run share it"
    ):
        dataclasses.replace(stages(toy.toy())[0], name="first", settings={"train.batch_size": 4})


def test_stored_features_are_missing_in_plain_data():
    with pytest.raises(ValueError, match="holds no features"):
        StoredFeatures(Dataset.open(toy.digits()))
