"""LightningDiT against the papers' formulas in float64, and published sizes."""

import itertools
import math

import pytest
import torch

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.config import from_json, to_json
from selftrans.models.compiling import compile_model
from selftrans.models.layers import rotate
from selftrans.models.lightning import (
    LIGHTNING_SIZES,
    OPTIONS,
    LightningBlock,
    LightningConfig,
    LightningDiT,
    build,
    rotation_table,
)
from selftrans.models.sit import SiT
from selftrans.recipes import recipe
from selftrans.train.run import train
from selftrans.types import Conditions
from tests.support import published_lightning as published
from tests.support import toy
from tests.support.diffusers_blocks import randomised
from tests.support.label_models import inputs
from tests.support.toy import quick  # noqa: F401 - a fixture

SIZES = {"width": 32, "depth": 3, "heads": 2, "patch": 1}
#: every combination of the five options
COMBINATIONS = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product([False, True], repeat=5)]
OFF = {"qk_norm": False, "swiglu": False, "rope": False, "rms_norm": False, "shift": True}


def named(options):
    return "+".join(key if value else f"no_{key}" for key, value in options.items())


def tiny(shape=(2, 4, 4), num_classes=10, **options):
    torch.manual_seed(0)
    return LightningDiT(shape, num_classes, **{**SIZES, **options})


# ---- against the formulas


@pytest.mark.parametrize("options", COMBINATIONS, ids=named)
def test_block_equals_the_formulas_in_float64(options):
    width, heads, grid = 48, 3, (4, 5)
    block = randomised(LightningBlock(width, heads, **{k: v for k, v in options.items() if k != "rope"}, mlp_ratio=4.0))
    block = block.double()
    weights = {f"b.{name}": tensor for name, tensor in block.state_dict().items()}
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 20, width, generator=g, dtype=torch.float64)
    c = torch.randn(2, width, generator=g, dtype=torch.float64)
    table = rotation_table(width // heads, grid) if options["rope"] else None
    with torch.no_grad():
        found = block(x, c, table)
        expected = published.block(weights, "b", x, c, heads, grid, options["rope"])
    assert (found - x).abs().max() > 0.1 and (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (16, 16)])
def test_rotation_is_multiplication_by_complex_numbers(grid):
    d = 16
    x = torch.randn(2, 3, grid[0] * grid[1], d, dtype=torch.float64)
    turn = torch.exp(1j * published.angle_table(d, grid))
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    assert (rotate(x, rotation_table(d, grid)) - expected).abs().max() < 1e-12


def test_attention_scores_depend_on_relative_positions():
    grid = (5, 6)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    table = rotation_table(16, grid)
    scores = rotate(q.expand(30, 16), table) @ rotate(k.expand(30, 16), table).T  # (T, T)
    scores = scores.view(*grid, *grid)
    assert torch.allclose(scores[0, 0, 1, 2], scores[3, 3, 4, 5]) and torch.allclose(
        scores[2, 4, 0, 1], scores[4, 5, 2, 2]
    )
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


@pytest.mark.parametrize(
    "options", [published.RELEASED, {**published.RELEASED, "qk_norm": True, "shift": False}], ids=named
)
@pytest.mark.parametrize(("shape", "patch"), [((32, 4, 4), 1), ((4, 8, 8), 2), ((2, 6, 4), 2)])
def test_model_equals_the_formulas(options, shape, patch):
    model = randomised(tiny(shape, patch=patch, **options)).eval()
    x, t, labels = inputs(model)
    weights = {**model.state_dict(), "pos_embed": model.pos_embed}
    with torch.no_grad():
        expected = published.network(weights, x, t, labels, heads=2, rope=options["rope"])
        found = model(x, t, labels).v
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_without_its_options_it_is_a_sit(qk_norm):
    ours = randomised(tiny(**{**OFF, "qk_norm": qk_norm}))
    sit = SiT(ours.shape, 10, **SIZES, qk_norm=qk_norm)
    sit.load_state_dict(ours.state_dict())
    x, t, y = inputs(ours)
    torch.testing.assert_close(ours(x, t, y).v, sit(x, t, y).v, atol=1e-6, rtol=1e-6)


# ---- published sizes


def test_the_number_of_parameters_is_the_published_one():
    """Their training log of LightningDiT-XL/1 on f16d32 says 675.26M, with the table of positions."""
    with torch.device("meta"):
        model = LightningDiT((32, 16, 16), 1000, **LIGHTNING_SIZES["LightningDiT-XL/1"])
    assert f"{(sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()) / 1e6:.2f}" == "675.26"


@pytest.mark.parametrize(("size", "billions"), [("1p0B", 1.0), ("1p6B", 1.6)])
def test_large_sizes_are_as_large_as_their_names(size, billions):
    with torch.device("meta"):
        model = LightningDiT((32, 16, 16), 1000, **LIGHTNING_SIZES[f"LightningDiT-{size}/1"])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize(
    ("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2730), (1152, 3072), (1536, 4096), (1792, 4778)]
)
def test_swiglu_is_two_thirds_as_wide(width, hidden):
    with torch.device("meta"):
        block = LightningBlock(width, 16, qk_norm=False, swiglu=True, rms_norm=True, shift=True, mlp_ratio=4.0)
    assert block.mlp.w12.weight.shape == (2 * hidden, width) and block.mlp.w3.weight.shape == (width, hidden)


@pytest.mark.parametrize("name", LIGHTNING_SIZES)
def test_every_size_builds_and_runs(name):
    for channels in (16, 32):
        with torch.device("meta"):
            model = LightningDiT((channels, 16, 16), 1000, **LIGHTNING_SIZES[name])
            x, labels = torch.empty(2, channels, 16, 16), torch.zeros(2, dtype=torch.long)
            v, feats = model(x, torch.empty(2), labels, taps=(model.depth,))
        assert v.shape == (2, channels, 16, 16)
        assert feats[model.depth].shape == (2, model.tokens, model.width) == (2, (16 // model.patch) ** 2, model.width)


def test_config_builds_its_size_and_its_options():
    config = LightningConfig("LightningDiT-S/2", depth=2, qk_norm=True, rope=False, shift=False)
    model = build(config, (4, 8, 8), Conditions("labels", 10))
    assert (model.width, model.depth, model.patch, model.rotations) == (384, 2, 2, None)
    assert config.blocks() == 2 and isinstance(model.blocks[0].attn.q_norm, torch.nn.RMSNorm)
    assert model.blocks[0].adaLN_modulation[1].out_features == 4 * 384
    run = toy.toy({"model.name": "LightningDiT-B/1", "model.rms_norm": False})
    assert from_json(to_json(run)).model == run.model and run.model.name == "LightningDiT-B/1"
    with pytest.raises(ValueError, match="LightningDiT-L/1"):
        LightningConfig("LightningDiT-L/3").check()
    with pytest.raises(ValueError, match=r"model\.depth"):
        LightningConfig(depth=0).check()
    with pytest.raises(ValueError, match="text"):
        build(config, (4, 8, 8), Conditions("text"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [published.RELEASED, {**OFF, "qk_norm": True, "shift": False}], ids=named)
def test_compiled_without_graph_breaks(options):
    model = randomised(tiny(**options))
    x, t, y = inputs(model)
    expected = model(x, t, y, taps=(2,))

    def off(a, b):
        return ((a - b).abs().max() / b.abs().max()).item()

    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y, taps=(2,))
    assert off(found.v, expected.v) < 1e-5 and off(found.feats[2], expected.feats[2]) < 1e-5
    compile_model(model)
    assert off(model(x, t, y).v, expected.v) < 1e-5


# ---- in a run


def test_both_stages_train_and_the_last_one_samples(tmp_path):
    own = {"model.name": "LightningDiT-S/1", "model.qk_norm": True, "data.path": str(toy.digits())}
    train(recipe("digits").override(own | toy.TOY).restricted(), tmp_path / "run", quiet=True)
    found = {stage: load_model(tmp_path / "run", stage=stage) for stage in ("stage1", "stage2")}
    for loaded in found.values():
        assert isinstance(loaded.model, LightningDiT) and loaded.model.tokens == 64
        assert loaded.config.model == LightningConfig("LightningDiT-S/1", width=32, depth=3, heads=2, qk_norm=True)
    assert not torch.equal(*(loaded.model.blocks[0].mlp.w12.weight for loaded in found.values()))
    for stage, term in {"stage1": "structure", "stage2": "self"}.items():
        lines = toy.log(tmp_path / "run", stage)
        assert math.isfinite(lines[-1]["loss"]) and lines[0][term] > 0
    main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "images"), "--num=4", "--steps=2"])
    assert len(list((tmp_path / "images").rglob("*.png"))) >= 4


def test_the_command_line_has_its_settings(tmp_path, capsys):
    flags = [
        "--model.name",
        "LightningDiT-S/1",
        "--model.rope",
        "False",
        *toy.flags({"method": "vanilla", "train.steps": 1}),
    ]
    main(["train", "digits", "--data", str(toy.digits()), "--out", str(tmp_path / "run"), *flags])
    model = load_model(tmp_path / "run").config.model
    assert isinstance(model, LightningConfig) and not model.rope and model.width == 32
