"""Every recipe runs at toy size through overrides only; its docstring gives the command; published settings."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from selftrans.cli.main import main
from selftrans.config import from_json
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import BUILT_IN
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.open_source import open_source
from selftrans.flow import shifted
from selftrans.methods.guidance import Frozen
from selftrans.methods.registry import stages
from selftrans.recipes import RECIPES, ignored, recipe
from selftrans.types import Conditions
from tests.support import captioned, toy
from tests.support.toy import quick  # noqa: F401 - a fixture

#: the same overrides for every recipe
OVERRIDES = (
    "--train.steps 4 --train.batch-size 8 --train.checkpoint-every 2 --model.width 64 --model.patch 4 --model.depth 4"
)
SMALL = ["--log.preview-images=2", "--log.preview-steps=1", "--stage1.head-width=16", "--stage2.head-width=16"]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return toy.prepared(tmp_path_factory.mktemp("pixels"), side=32)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """4x32x32 moments, mean and deviation, by a small variational autoencoder."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(2, 2),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    pictures = toy.pictures(folder / "pictures", side=64, count=4)
    argv = ["prepare", str(pictures), f"--out={folder / 'data'}", f"--autoencoder={folder / 'vae'}", "--flip"]
    assert main(argv) == 0
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    assert manifest["shape"] == [4, 32, 32] and manifest["latent_space"]["stochastic"] and manifest["copies"] == 2
    return folder / "data"


def begin(name, tmp_path, data):
    extra = [] if data is None else ["--data", str(data)]
    assert main(["train", name, "--out", str(tmp_path / "run"), *extra, *OVERRIDES.split(), *SMALL]) == 0
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert config.recipe == name and config.sections["stage1"].steps == 2
    assert config.sections["stage2"].until_step == recipe(name).sections["stage2"].until_step
    for stage, steps in {"stage1": 2, "stage2": 4}.items():
        assert toy.checkpoint(tmp_path / "run", stage).name == f"step-0000000{steps}"
        picture = np.asarray(Image.open(tmp_path / "run" / stage / "previews" / f"step-0000000{steps}.png"))
        assert picture.shape[0] > 32
    return config


def test_digits_need_no_prepared_data(tmp_path):
    config = begin("digits", tmp_path, None)
    assert config.data.path is None and (tmp_path / "run" / "data" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagefolder"])
def test_recipe_trains_on_prepared_pixels(tmp_path, pixels, name):
    begin(name, tmp_path, pixels)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("sit_imagenet")])
def test_recipe_trains_on_the_latents_of_an_autoencoder(tmp_path, latents, name):
    config = begin(name, tmp_path, latents)
    assert config.train.precision == "bf16" and config.sections["stage2"].scale == 30.0


@pytest.mark.parametrize(("family", "dtype"), [("t5", "bfloat16"), ("bert", "float16")])
def test_own_captioned_pictures_from_folder_to_samples(tmp_path, family, dtype):
    """Every command with a T5, whose encoder is loaded without its decoder, and with a BERT."""
    encoder = captioned.save_text_encoder(tmp_path / "encoder", family)
    pictures, data, run = (
        captioned.pictures(tmp_path / "pictures", count=8, side=16),
        tmp_path / "data",
        tmp_path / "run",
    )
    assert main(["prepare", str(pictures), f"--out={data}", f"--text={encoder}", f"--text-dtype={dtype}"]) == 0
    argv = ["train", "imagefolder_t2i", f"--data={data}", f"--out={run}", "--stage1.block=1", "--stage1.steps=2"]
    assert main([*argv, *OVERRIDES.split(), *SMALL]) == 0
    config = from_json((run / "config.json").read_text())
    assert config.model.masked and config.sections["stage2"].teacher_weights == "ema"
    assert (
        main(["sample", str(run), f"--out={tmp_path / 'made'}", "--num=2", "--steps=2", "--prompts", "a", "the"]) == 0
    )
    with np.load(tmp_path / "made" / "samples.npz") as made:
        assert made["arr_0"].shape == (2, 16, 16, 3) and made["arr_1"].tolist() == [0, 1]


def test_settings_for_own_captions_are_the_published_ones_scaled():
    ours, published = recipe("imagefolder_t2i"), recipe("mmdit_coco")
    for name in ("batch_size", "lr", "betas", "weight_decay", "ema", "drop", "clip"):
        assert getattr(ours.train, name) == getattr(published.train, name), name
    half, whole = (stages(config) for config in (ours, published))
    assert half[0].steps == ours.train.steps // 2 and half[1].teacher.weights == whole[1].teacher.weights
    words, taps = Conditions("text", tokens=8, width=16), []
    for config, (first, second) in ((ours, half), (published, whole)):
        with torch.device("meta"):
            student, teacher = (config.build_model((4, 32, 32), words) for _ in range(2))
            frozen = Frozen(teacher, second.teacher.block(student.depth))
            guided = [*first.guide(student, None), *second.guide(student, frozen)]
        taps.append(
            [
                guided[0].taps[0] * 24 / student.depth,
                guided[1].taps[0] * 24 / student.depth,
                frozen.block * 24 / student.depth,
            ]
        )
        assert guided[1].config.until_step == pytest.approx(config.train.steps / 3, rel=0.02)
    assert taps[0] == taps[1] == [4, 12, 16]


def test_recipe_trains_on_latents_with_captions(tmp_path, latents):
    encoder = captioned.save_text_encoder(tmp_path / "encoder")
    pictures = captioned.pictures(tmp_path / "pictures", count=8, side=64)
    argv = ["prepare", str(pictures), f"--out={tmp_path / 'data'}", f"--autoencoder={latents.parent / 'vae'}"]
    assert main([*argv, f"--text={encoder}"]) == 0
    blocks = ["--stage1.steps=2", "--stage2.student-block=2", "--stage2.teacher-block=3", "--train.preview-every=0"]
    argv = ["train", "mmdit_coco", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *blocks]
    assert main([*argv, *OVERRIDES.split(), *SMALL]) == 0
    config = from_json((tmp_path / "run" / "config.json").read_text())
    assert config.recipe == "mmdit_coco" and config.train.precision == "bf16"
    for stage, steps in {"stage1": 2, "stage2": 4}.items():
        assert toy.checkpoint(tmp_path / "run", stage).name == f"step-0000000{steps}"


def test_digits_from_sentences_need_no_prepared_data(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "digits_t2i", replace(BUILT_IN["digits_t2i"], store="ids"))  # tokens take minutes
    config = begin("digits_t2i", tmp_path, None)
    dataset = Dataset.open(tmp_path / "run" / "data")
    assert config.data.path is None and len(dataset) == 1797
    assert dataset.captions([0]) == [list(open_source("digits_t2i", captions=CaptionSource()).captions[0])]
    conditions = dataset.manifest.conditions
    assert (conditions.kind, conditions.encoder, conditions.tokens, conditions.width) == ("text", "minilm", 32, 384)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("digits")])
def test_other_recipes_require_data(tmp_path, capsys, name):
    assert main(["train", name, "--out", str(tmp_path / "run")]) == 1
    assert "needs --data DIR, a directory made by `selftrans prepare`" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_docstring_of_a_recipe_gives_its_command(name):
    text = inspect.getdoc(RECIPES[name])
    assert f"selftrans train {name} " in text and "--out " in text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    ("name", "size", "until"),
    [("s2", "S", 100_000), ("b2", "B", 100_000), ("l2", "L", 50_000), ("xl2", "XL", 50_000)],
)
def test_published_settings(name, size, until):
    config = recipe(f"sit_imagenet_{name}")
    assert config.model.name == f"SiT-{size}/2" and config.model.qk_norm
    train, stage2 = config.train, config.sections["stage2"]
    assert (train.steps, train.batch_size, train.lr, train.betas) == (400_000, 256, 1e-4, (0.9, 0.999))
    assert (train.weight_decay, train.clip, train.ema, train.warmup) == (0.0, 1.0, 0.9999, 0)
    assert (stage2.scale, stage2.weight, stage2.timestep_range, stage2.until_step) == (30.0, 0.5, (0.4, 0.7), until)
    assert (config.sections["stage1"].weight, config.sections["stage1"].timestep_range) == (0.5, (0.4, 0.7))
    assert (config.sample.sampler, config.sample.steps) == ("sde", 250)
    assert (
        config.sections["stage1"].target == "velocity"
        and stage2.teacher_weights == "raw"
        and stage2.target_norm == "none"
    )
    first, second = stages(config)
    assert first.steps == 200_000 and second.teacher.weights == "raw"
    table = {"S": (2, 6, 8), "B": (2, 6, 8), "L": (2, 12, 16), "XL": (2, 14, 18)}  # block s of each stage, and k
    depth = config.model.sizes()["depth"]
    with torch.device("meta"):
        student, teacher = (config.build_model((4, 32, 32), Conditions("labels", 1000)) for _ in range(2))
        guided = [*first.guide(student, None), *second.guide(student, Frozen(teacher, second.teacher.block(depth)))]
    assert (guided[0].taps[0], guided[1].taps[0], guided[1].teacher.block) == table[size]


@pytest.mark.parametrize(
    ("name", "size", "until", "taps"), [("b1", "B", 25_000, (2, 6, 8)), ("xl1", "XL", 12_500, (2, 14, 18))]
)
def test_published_settings_of_lightningdit(name, size, until, taps):
    config = recipe(f"lightningdit_imagenet_{name}")
    train, first, second = config.train, *stages(config)
    assert config.model.name == f"LightningDiT-{size}/1" and config.model.rope and not config.model.qk_norm
    assert (train.steps, train.batch_size, train.lr, train.betas) == (80_000, 1024, 2e-4, (0.9, 0.95))
    assert (train.times, train.ema, train.weight_decay, train.warmup) == ("logitnormal", 0.9999, 0.0, 0)
    assert train.cosine == 1.0 and first.steps == 40_000 and config.sections["stage2"].until_step == until
    assert (config.sample.sampler, config.sample.steps) == ("euler", 250)
    theirs = 1 - torch.linspace(
        0, 1, 11, dtype=torch.float64
    )  # their t is ours from 1 down; 0.3 as their inference has it
    theirs = 1 - (lambda t: 0.3 * t / (1 + (0.3 - 1) * t))(1 - theirs)
    ours = shifted(1 - torch.linspace(0, 1, 11, dtype=torch.float64), config.sample.time_shift)
    torch.testing.assert_close(ours, theirs)
    with torch.device("meta"):
        student, teacher = (config.build_model((32, 16, 16), Conditions("labels", 1000)) for _ in range(2))
        guided = [
            *first.guide(student, None),
            *second.guide(student, Frozen(teacher, second.teacher.block(student.depth))),
        ]
    assert student.tokens == 256 and (guided[0].taps[0], guided[1].taps[0], guided[1].teacher.block) == taps


def test_published_text_to_image_settings():
    config = recipe("mmdit_coco")
    assert config.model.sizes() == {"width": 768, "depth": 24, "heads": 24, "patch": 2}
    assert (config.model.qk_norm, config.model.masked, config.model.zero_init) == (False, False, False)
    train, stage1, stage2 = config.train, config.sections["stage1"], config.sections["stage2"]
    assert (train.steps, train.batch_size, train.lr, train.betas) == (150_000, 256, 2e-4, (0.9, 0.9))
    assert (train.weight_decay, train.warmup, train.clip, train.ema, train.drop) == (0.03, 5_000, 1.0, 0.9999, 0.1)
    assert (stage1.weight, stage1.timestep_range, stage1.target, stage1.head_width) == (0.5, None, "velocity", 2048)
    assert (stage2.scale, stage2.weight, stage2.timestep_range, stage2.until_step) == (5.0, 0.5, None, 50_000)
    assert (stage2.teacher_weights, stage2.target_norm, stage2.head_width) == ("ema", "none", 2048)
    sample = config.sample
    assert (sample.sampler, sample.steps, sample.guidance_scale) == ("sde", 250, 1.8)
    assert sample.guidance_interval == (0.0, 1.0)
    first, second = stages(config)
    assert (first.steps, second.steps, second.teacher.weights) == (150_000, 150_000, "ema")
    words = Conditions("text", tokens=77, width=768)
    with torch.device("meta"):
        student, teacher = (config.build_model((4, 32, 32), words) for _ in range(2))
        guided = [*first.guide(student, None), *second.guide(student, Frozen(teacher, second.teacher.block(24)))]
    assert (guided[0].taps[0], guided[1].taps[0], guided[1].teacher.block) == (4, 12, 16)


def test_sit_imagenet_is_the_largest_size():
    small, large = (toy.override(recipe(name), {"recipe": "x"}) for name in ("sit_imagenet", "sit_imagenet_xl2"))
    assert small == large


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        (
            "vanilla",
            {"stage2.scale": 3.0, "sra.block": 2},
            ["stage2.scale is ignored: method vanilla", "sra.block is ignored"],
        ),
        (
            "self_transcendence",
            {"repa.weight": 0.75},
            ["repa.weight is ignored: method self_transcendence does not use it"],
        ),
        (
            "self_transcendence",
            {"stage2.timestep_range": None, "stage2.range_mode": "scale"},
            ["stage2.range_mode is ignored"],
        ),
        (
            "self_transcendence",
            {"stage2.teacher": "x", "stage1.weight": 0.25},
            ["stage1.weight is ignored: --teacher takes"],
        ),
        ("structure", {"stage1.weight": 0.25}, []),
        ("vanilla", {"model.route_blocks": (2, 3)}, ["model.route_blocks is ignored: without model.route no token"]),
        ("vanilla", {"model.route_blocks": (2, 3), "model.route": 0.5}, []),
    ],
)
def test_ignored_settings_are_listed(method, changes, expected):
    sentences = ignored(toy.override(recipe("digits"), {"method": method} | changes))
    assert len(sentences) == len(expected)
    for sentence, start in zip(sorted(sentences, reverse=True), sorted(expected, reverse=True), strict=True):
        assert sentence.startswith(start)
