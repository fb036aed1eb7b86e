"""A run as a pipeline of diffusers: the pictures of `selftrans sample`, and folders that are read as data."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import selftrans
from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.data.prepare import prepare
from selftrans.interop import SiTPipeline
from selftrans.sampling.images import Sampler
from selftrans.sampling.streams import image_noise
from selftrans.train.run import train
from tests.support import text_runs, toy
from tests.support.toy import quick  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    assert main(["export", str(toy.finished()), "--out", str(out), "--layout", "pipeline"]) == 0
    return out


def load(folder, **options):
    pipe = SiTPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(source, **settings):
    (batch,) = Sampler.load(source, settings).sample()
    return batch.images


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_pictures_are_those_of_sample_bit_for_bit(exported, sampler):
    options = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.9), "seed": 3}
    expected = sampled(toy.finished(), num=4, steps=3, sampler=sampler, labels=(1, 7, 3, 10), **options)
    pipe = load(exported)
    pipe.scheduler = type(pipe.scheduler)(sampler)
    found = pipe([1, 7, 3, 10], num_inference_steps=3, output_type="np", **options).images
    assert np.array_equal(found, expected)
    noise = image_noise(np.arange(4), (1, 8, 8), 3)()
    again = pipe([1, 7, 3, 10], num_inference_steps=3, latents=noise, output_type="np", **options).images
    assert np.array_equal(again, expected)


def test_velocity_is_scaled_as_in_the_settings_of_the_run(tmp_path, quick):  # noqa: F811
    run, out = tmp_path / "run", tmp_path / "pipeline"
    train(toy.toy({"method": "vanilla", "train.steps": 1, "sample.velocity_scale": 1.25}), run, quiet=True)
    assert main(["export", str(run), "--out", str(out), "--layout", "pipeline"]) == 0
    expected = sampled(run, num=2, steps=2, labels=(1, 7), seed=3)
    assert not np.array_equal(sampled(run, num=2, steps=2, labels=(1, 7), seed=3, velocity_scale=1.0), expected)
    assert np.array_equal(load(out)([1, 7], num_inference_steps=2, seed=3, output_type="np").images, expected)


def test_folder_of_a_run_holds_json_and_safetensors_without_its_paths(exported):
    files = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "SiTPipeline"
    data = str(toy.digits().parent).encode()
    assert not [file for file in files if data in (exported / file).read_bytes()]
    names = load_file(exported / files[3])
    ema = load_model(toy.finished()).model.state_dict()
    toy.assert_same({name.removeprefix("backbone."): x for name, x in names.items()}, ema)


def test_folder_is_accepted_in_place_of_a_run(exported, tmp_path):
    was, now = load_model(toy.finished()), load_model(exported)
    assert was.source["weights"] == now.source["weights"] and (now.step, now.stage) == (was.step, was.stage)
    toy.assert_same(dict(selftrans.load(exported).state_dict()), dict(was.model.state_dict()))
    expected = sampled(toy.finished(), num=2, steps=2, sampler="ode")
    assert np.array_equal(sampled(exported, num=2, steps=2, sampler="ode"), expected)
    assert main(["export", str(exported), "--out", str(tmp_path / "file")]) == 0
    toy.assert_same(dict(load_model(tmp_path / "file").model.state_dict()), dict(was.model.state_dict()))


def test_pipeline_is_saved_again_as_it_was(exported, tmp_path):
    load(exported).save_pretrained(tmp_path / "again")
    assert toy.tree(tmp_path / "again") == toy.tree(exported)
    with pytest.raises(ValueError, match="as safetensors only"):
        load(exported).save_pretrained(tmp_path / "other", safe_serialization=False)


def test_run_of_latents_has_its_vae_next_to_it(tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae of mine")
    prepare(
        toy.pictures(tmp_path / "pictures", side=16),
        tmp_path / "data",
        autoencoder=str(tmp_path / "vae of mine"),
        progress=False,
    )
    train(
        toy.toy({"data.path": str(tmp_path / "data"), "method": "vanilla", "train.steps": 2}),
        tmp_path / "run",
        quiet=True,
    )
    pipe = SiTPipeline.from_run(tmp_path / "run")
    pipe.save_pretrained(tmp_path / "out")
    expected = sampled(tmp_path / "run", num=3, steps=2, sampler="heun")
    (tmp_path / "vae of mine").rename(tmp_path / "gone")
    found = load(tmp_path / "out")
    assert isinstance(found.vae, AutoencoderKL) and expected.std() > 0
    images = found([0, 1, 0], num_inference_steps=2, seed=0, output_type="np")
    found.scheduler = type(found.scheduler)("heun")
    images = found([0, 1, 0], num_inference_steps=2, seed=0, output_type="np").images
    assert np.array_equal(images, expected)
    assert np.array_equal(sampled(tmp_path / "out", num=3, steps=2, sampler="heun"), expected)
    assert str(tmp_path).encode() not in b"".join(toy.tree(tmp_path / "out").values())


def test_run_of_text_has_its_encoder_and_tokeniser_next_to_it(tmp_path):
    run, out, prompts = text_runs.finished(), tmp_path / "out", ["a red square", "the square is blue"]
    expected = sampled(run, num=2, steps=2, sampler="heun", prompts=tuple(prompts), guidance_scale=2.0)
    SiTPipeline.from_run(run).save_pretrained(out)
    files = toy.tree(out)
    assert {"text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/tokenizer.json"} <= set(files)
    assert {name.rpartition(".")[2] for name in files} == {"json", "safetensors"}
    assert str(toy.place("captioned").parent).encode() not in b"".join(files.values())
    pipe = load(out)
    pipe.scheduler = type(pipe.scheduler)("heun")
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 0, "output_type": "np"}
    assert np.array_equal(pipe(prompt=prompts, **options).images, expected)
    three = pipe(prompt=prompts, num_images=3, output_type="pil", num_inference_steps=2, seed=0)
    assert len(three.images) == 3 and three.images[0].mode == "RGB"
    again = sampled(out, num=2, steps=2, sampler="heun", prompts=tuple(prompts), guidance_scale=2.0)
    assert np.array_equal(again, expected)
    for wrong in ({"class_labels": 1}, {}):
        with pytest.raises(ValueError, match="give a prompt, and no class_labels"):
            pipe(**wrong)


def test_pictures_arrays_or_latents_are_returned(exported):
    pipe = load(exported)
    options = {"num_inference_steps": 2, "seed": 0}
    (picture,) = pipe(3, **options).images
    assert picture.size == (8, 8) and picture.mode == "L"
    assert np.array_equal(np.asarray(picture), pipe(3, output_type="np", **options).images[0, ..., 0])
    assert pipe(3, output_type="latent", return_dict=False, **options)[0].shape == (1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    assert len(pipe([1, 2], num_images=4, num_inference_steps=2, generator=generator).images) == 4


def test_reduced_precision_and_schedulers_of_diffusers(exported):
    options = {"num_inference_steps": 8, "output_type": "latent", "latents": torch.randn(2, 1, 8, 8)}
    full = load(exported)
    full.scheduler = type(full.scheduler)("euler")
    expected = full([1, 2], **options).images
    theirs = load(exported, scheduler=FlowMatchEulerDiscreteScheduler())
    assert (theirs([1, 2], **options).images - expected).abs().max() < 0.05
    half = load(exported, torch_dtype=torch.bfloat16)
    half.scheduler = type(half.scheduler)("euler")
    found = half([1, 2], **options).images
    assert found.dtype == torch.float32 and half.transformer.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 < expected.std()


class NoisyScheduler(FlowMatchEulerDiscreteScheduler):
    """Draws noise with the generator of `step`, which the stochastic sampling of diffusers 0.35 does not."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        (moved,) = super().step(model_output, timestep, sample, return_dict=False)
        return (moved + torch.randn(moved.shape, generator=generator),)


def test_noise_of_other_schedulers_is_that_of_the_generator(exported):
    theirs = load(exported, scheduler=NoisyScheduler())
    first, again = (
        theirs([1], generator=torch.Generator().manual_seed(3), num_inference_steps=3, output_type="latent").images
        for _ in range(2)
    )
    assert torch.equal(first, again)


def test_folder_is_not_written_through_a_link(exported, tmp_path):
    folder, other = toy.copy(exported, tmp_path / "folder"), tmp_path / "other.json"
    other.write_text("{}")
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").symlink_to(other)
    SiTPipeline.from_run(toy.finished()).save_pretrained(folder)
    assert other.read_text() == "{}" and load(folder).transformer is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"class_labels": 11}, "label 11 is out of range: the model has 10 classes"),
        ({"prompt": "a cat"}, "prompts are for models of text, this one is of 10 classes"),
        ({}, "a model of 10 classes needs class_labels"),
        ({"class_labels": 1, "seed": 0, "generator": torch.Generator()}, "exclude each other"),
        (
            {"class_labels": 1, "num_images": 3, "latents": torch.zeros(2, 1, 8, 8)},
            "2 latents are given for 3 images; give one for each",
        ),
    ],
)
def test_wrong_conditions_are_refused(exported, wrong, message):
    with pytest.raises(ValueError, match=message):
        load(exported)(**wrong)


def test_nothing_that_a_folder_names_is_imported(exported, tmp_path, monkeypatch):
    folder = toy.copy(exported, tmp_path / "folder")
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    (folder / "pipeline.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": ["evil_module", "Model"], "vae": ["evil_module", "Model"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert len(load(folder)(1, num_inference_steps=2).images) == 1 and "evil_module" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "scheduler/scheduler_config.json").write_text('{"sampler": ["x"]}'), "holds no scheduler"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "holds no scheduler"),
        (lambda f: (f / "model_index.json").unlink(), "is no pipeline"),
        (lambda f: (f / "model_index.json").write_text("[" * 9000), "is no pipeline"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "of class 'FluxPipeline'"),
        (
            lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"x"),
            "not a selftrans weights",
        ),
    ],
)
def test_damaged_folders_are_one_line(exported, tmp_path, change, message):
    folder = toy.copy(exported, tmp_path / "folder")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_options_that_have_no_effect_are_refused(exported):
    with pytest.raises(ValueError, match="has no option custom_pipeline; parts are scheduler"):
        SiTPipeline.from_pretrained(exported, custom_pipeline="x")


def test_export_replaces_only_an_earlier_pipeline(exported, tmp_path, capsys):
    folder = toy.copy(exported, tmp_path / "out")
    words = ["export", str(toy.vanilla()), "--layout", "pipeline", "--out"]
    assert main([*words, str(folder)]) == 0 and load_model(folder).stage == load_model(toy.vanilla()).stage
    other = toy.pictures(tmp_path / "other")
    before = toy.tree(other)
    assert main([*words, str(other)]) == 1 and toy.tree(other) == before
    assert "exists and is not an export" in capsys.readouterr().err
