"""Which weights teach a stage, and how unsuitable ones are refused."""

import dataclasses
import warnings

import pytest
import torch

from selftrans.data.dataset import Dataset
from selftrans.data.decoded import data_latents
from selftrans.data.prepare import prepare
from selftrans.encoders.latent_space import LatentSpace
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import stages
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


def test_weights_of_another_stage_are_refused():
    path = toy.checkpoint(toy.finished(), "stage2")
    with pytest.raises(
        ValueError, match=r"holds weights of 'stage2'; expected a teacher trained in stage1, or imported"
    ):
        load_teacher(path, spec(), Dataset.open(toy.digits()).manifest)


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
        ValueError, match=r"trained on the linear path, the student's train\.path is cosine.*--train\.path linear"
    ):
        check_given(teacher, toy.toy({"train.path": "cosine"}), manifest)
    with pytest.warns(UserWarning, match=r"names the autoencoder pixel\(.*\), the data other/vae"):
        check_given(teacher, toy.toy({"data.autoencoder": "other/vae"}), manifest)


def test_given_teacher_of_another_scale_is_refused_and_of_nearly_the_same_is_not():
    manifest = Dataset.open(toy.digits()).manifest
    teacher = load_teacher(toy.finished(), spec(), manifest)
    plain = dataclasses.replace(manifest, autoencoder="pixel", latent_space=LatentSpace())
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


def test_stored_features_are_missing_in_plain_data():
    with pytest.raises(ValueError, match="holds no features"):
        StoredFeatures(Dataset.open(toy.digits()))
