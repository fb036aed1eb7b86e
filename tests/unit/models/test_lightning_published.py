"""LightningDiT's checkpoints come in as the same network, and go out as they would have been written."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.interop.importing import import_run
from selftrans.models.lightning import OPTIONS, LightningConfig, build
from selftrans.models.lightning_published import LAYOUTS, rope_tables
from selftrans.recipes import recipe
from selftrans.train.run import train
from selftrans.types import Conditions
from tests.support import published_files, toy
from tests.support.published_lightning import RELEASED, TINY, network, settings, state
from tests.support.toy import quick  # noqa: F401 - a fixture

#: combinations that no SiT has
COMBINATIONS = [
    options
    for values in itertools.product([False, True], repeat=5)
    if (options := dict(zip(OPTIONS, values, strict=True))) | {"qk_norm": False}
    != {"qk_norm": False, "swiglu": False, "rope": False, "rms_norm": False, "shift": True}
]


def named(options):
    return "+".join(key if value else f"no_{key}" for key, value in options.items())


def brought(file, out, **given):
    """A file as a run, and what was printed."""
    output = []
    import_run(file, out, **{"heads": 2, "autoencoder": "pixel", "say": output.append} | given)
    return out, "\n".join(output)


def inputs(shape, classes=10, n=4):
    g = torch.Generator().manual_seed(3)
    t = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(n - 2, generator=g)])
    return torch.randn(n, *shape, generator=g), t, torch.tensor([0, classes, 3, 7])


@torch.no_grad()
def off(model, weights, *, flip, heads=2):
    """Largest difference between our velocity and the published network's in its time, relative to the largest value."""
    x, t, labels = inputs(model.shape)
    rope = "feat_rope.freqs_cos" in weights
    expected = network(weights, x, 1 - t if flip else t, labels, heads=heads, rope=rope)
    expected = -expected if flip else expected
    return ((model(x, t, labels).v - expected).abs().max() / expected.abs().max()).item()


# ---- in


@pytest.mark.parametrize("options", COMBINATIONS, ids=named)
def test_imported_network_equals_the_formulas(tmp_path, options):
    raw, ema = (state(**TINY, **options, seed=k) for k in (1, 2))
    content = {"model": raw, "ema": ema, "opt": None, "config": settings()}
    run, output = brought(published_files.save(tmp_path / "a.pt", content), tmp_path / "run")
    assert "those of SIT, as in LightningDiT's code" in output and "config" not in output
    for weights, theirs in (("raw", raw), ("ema", ema)):
        found = load_model(run, weights=weights)
        assert off(found.model, theirs, flip=True) < 1e-5
        config = LightningConfig(width=32, depth=3, heads=2, patch=1, **options)
        assert found.config.model == config


@pytest.mark.parametrize("convention", ["sit", "repa"])
def test_the_time_may_be_given(tmp_path, convention):
    weights = state(**TINY)
    run, output = brought(published_files.save(tmp_path / "a.pt", weights), tmp_path / "run", convention=convention)
    assert off(load_model(run).model, weights, flip=convention == "sit") < 1e-5 and "from --convention" in output


def test_a_published_size_is_known_by_its_name(tmp_path):
    sizes = {"width": 384, "depth": 12, "heads": 6, "patch": 1, "channels": 32, "side": 4, "classes": 1000}
    weights = {f"module.{name}": tensor for name, tensor in state(**sizes, learn_sigma=True).items()}
    file = published_files.save(tmp_path / "a.pt", {"ema": weights})
    run, output = brought(file, tmp_path / "run", heads=None, name="LightningDiT-S/1", autoencoder="pixel")
    found = load_model(run)
    assert found.config.model == LightningConfig("LightningDiT-S/1") and found.model.shape == (32, 4, 4)
    assert "LightningDiT-S/1, latents 32x4x4" in output
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    assert off(found.model, weights, flip=True, heads=6) < 1e-5
    with pytest.raises(ValueError, match="not LightningDiT-B/1"):
        brought(file, tmp_path / "other", heads=None, name="LightningDiT-B/1")
    with pytest.raises(ValueError, match="--autoencoder"):
        brought(file, tmp_path / "other", heads=None, autoencoder=None)


def test_latents_of_va_vae_are_sampled_as_they_are(tmp_path):
    sizes = TINY | {"channels": 32}
    run, _ = brought(published_files.save(tmp_path / "a.pt", state(**sizes)), tmp_path / "run", autoencoder="values")
    assert main(["sample", str(run), "--out", str(tmp_path / "latents"), "--num=3", "--steps=2"]) == 0
    arrays = [np.load(path) for path in sorted((tmp_path / "latents").rglob("*.npy"))]
    assert [array.shape for array in arrays] in ([(3, 32, 4, 4)], [(32, 4, 4)] * 3)


def test_the_convention_of_noise_is_refused(tmp_path):
    file = published_files.save(tmp_path / "a.pt", state(**TINY))
    with pytest.raises(ValueError, match="omit --convention dit"):
        brought(file, tmp_path / "run", convention="dit")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [RELEASED, {**RELEASED, "rope": False, "qk_norm": True}], ids=named)
def test_heads_of_attention_are_read_from_the_tensors(tmp_path, options):
    sizes = TINY | {"heads": 4}
    file = published_files.save(tmp_path / "a.pt", state(**sizes, **options))
    run, _ = brought(file, tmp_path / "run", heads=None)
    assert load_model(run).config.model.heads == 4
    with pytest.raises(ValueError, match="omit --heads 2"):
        brought(file, tmp_path / "other", heads=2)


def test_heads_of_self_transcendence_are_left_out(tmp_path):
    weights = state(**TINY)
    heads = {k: v for k, v in published_files.state(**TINY, projectors="stage2").items() if k.startswith("projectors")}
    file = published_files.save(tmp_path / "a.pt", {"model": weights | heads, "ema": weights | heads, "steps": 3})
    run, output = brought(file, tmp_path / "run")
    assert "its projectors are left out" in output and "a guess" in output and load_model(run).step == 3
    assert off(load_model(run).model, weights, flip=True) < 1e-5


def test_moments_of_the_optimiser_follow_their_parameters_past_the_buffers(tmp_path):
    weights = state(**TINY)
    buffers = {name for name in weights if name.startswith("feat_rope")}
    parameters = {name: tensor for name, tensor in weights.items() if name not in buffers}
    g = torch.Generator().manual_seed(5)
    gradients = {k: torch.randn(v.shape, generator=g) for k, v in parameters.items() if k != "pos_embed"}
    trained, optimizer = published_files.adamw(parameters, [gradients], betas=(0.9, 0.95), lr=2e-4)
    everything = {name: trained.get(name, tensor) for name, tensor in weights.items()}
    content = {"model": everything, "ema": weights, "opt": optimizer, "config": settings()}
    run, output = brought(published_files.save(tmp_path / "a.pt", content), tmp_path / "run")
    assert "from zero" not in output and load_model(run).step == 1
    found = load_file(toy.checkpoint(run, "vanilla") / "optimizer.safetensors")
    for name in ("blocks.0.mlp.w12.weight", "blocks.2.norm1.weight", "y_embedder.embedding_table.weight"):
        torch.testing.assert_close(found[f"student.{name}:exp_avg"], 0.1 * gradients[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        found["student.final_layer.linear.bias:exp_avg"], -0.1 * gradients["final_layer.linear.bias"]
    )
    assert not [name for name in found if "feat_rope" in name or "pos_embed" in name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("blocks.1.norm2.weight"), r"missing: 1 \(blocks\.1\.norm2\.weight"),
        (lambda s: s.update({"blocks.0.mlp.w4.weight": torch.ones(2)}), "unknown: 1"),
        (lambda s: s.update({"blocks.0.mlp.w3.weight": torch.ones(32, 80)}), r"\(32, 80\) instead of \(32, 85\)"),
        (lambda s: s.update({"feat_rope.freqs_cos": torch.zeros(16, 16)}), "freqs_cos is not the fixed table"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 32)}), "pos_embed is not the fixed table"),
        (lambda s: s.pop("feat_rope.freqs_sin"), "missing: 1"),
        (lambda s: s.pop("y_embedder.embedding_table.weight"), "is not a LightningDiT: y_embedder"),
        (lambda s: s.update({"blocks.0.adaLN_modulation.1.bias": torch.tensor(1.0)}), "misshapen: 1"),
        (lambda s: s.update({"feat_rope.freqs_cos": torch.zeros(16, 0)}), "misshapen: 1"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, capsys, spoil, message):
    weights = state(**TINY)
    spoil(weights)
    file = published_files.save(tmp_path / "a.pt", weights)
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--heads=2", "--autoencoder=pixel"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        brought(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_path_and_prediction_are_read_from_the_settings_in_the_file(tmp_path):
    def bring(name, **transport):
        content = {"ema": state(**TINY), "config": settings(**transport)}
        return brought(published_files.save(tmp_path / f"{name}.pt", content), tmp_path / name)[0]

    assert load_model(bring("gvp", path_type="GVP")).config.train.path == "cosine"
    with pytest.raises(ValueError, match="predicts noise"):
        bring("noise", prediction="noise")
    with pytest.raises(ValueError, match="path VP"):
        bring("vp", path_type="VP")


def test_a_file_without_its_options_is_read_as_sit(tmp_path):
    options = {"swiglu": False, "rope": False, "rms_norm": False}
    weights = state(**TINY, **options)
    run, _ = brought(published_files.save(tmp_path / "a.pt", weights), tmp_path / "run", convention="sit")
    assert load_model(run).config.model.name.startswith("SiT")
    assert off(load_model(run).model, weights, flip=True) < 1e-5


# ---- out


def test_rotary_tables_are_the_published_ones():
    for d, side in ((64, 16), (72, 16), (16, 5)):
        half = d // 2
        rates = 1.0 / 10_000 ** (torch.arange(0, half, 2).float() / half)
        line = (torch.arange(side)[:, None] * rates).repeat_interleave(2, dim=-1)  # (side, half)
        angles = torch.cat(
            [line[:, None].expand(side, side, half), line[None].expand(side, side, half)], dim=-1
        ).reshape(-1, d)
        tables = rope_tables(d, (side, side))
        torch.testing.assert_close(tables["feat_rope.freqs_cos"], angles.cos(), atol=2e-6, rtol=0)
        torch.testing.assert_close(tables["feat_rope.freqs_sin"], angles.sin(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", [RELEASED, {**RELEASED, "rope": False, "qk_norm": True, "shift": False}], ids=named)
def test_export_of_an_import_is_the_same_file(tmp_path, options):
    """Names, order and shapes exactly; values but for the rounding of the reflection, which goes through float32."""
    weights = state(**TINY, **options)
    file = published_files.save(tmp_path / "a.pt", weights)
    run, _ = brought(file, tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--layout", "lightningdit"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in weights.items()}
    assert list(LAYOUTS["lightningdit"].tensors(load_model(run).model)) == list(weights)
    inexact = {"t_embedder.mlp.0.weight", "pos_embed", *rope_tables(16, (4, 4))}
    assert all(torch.equal(written[k], v) for k, v in weights.items() if k not in inexact)
    for name in inexact & weights.keys():
        torch.testing.assert_close(written[name], weights[name], atol=1e-6, rtol=0)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["arguments"] == {
        "input_size": 4, "patch_size": 1, "in_channels": 2, "hidden_size": 32, "depth": 3, "num_heads": 2,
        "num_classes": 10, "learn_sigma": False, "use_qknorm": options["qk_norm"], "use_swiglu": True,
        "use_rope": options["rope"], "use_rmsnorm": True, "wo_shift": not options["shift"],
    }  # fmt: skip
    again, output = brought(tmp_path / "out" / "model.safetensors", tmp_path / "again")
    assert "from its header" in output and off(load_model(again).model, weights, flip=True) < 1e-5


def test_exported_run_is_the_published_network_and_imported_it_teaches(tmp_path):
    """Its export is the published network with our weights; imported, it is the teacher of another run."""
    own = {"model.name": "LightningDiT-S/1", "data.path": str(toy.plain_digits())} | toy.TOY
    train(recipe("digits").override(own | {"method": "structure"}).restricted(), tmp_path / "run", quiet=True)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "lightningdit"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert off(load_model(tmp_path / "run").model, weights, flip=True) < 1e-4
    save_file(weights, tmp_path / "plain.safetensors")
    run, _ = brought(tmp_path / "plain.safetensors", tmp_path / "again", heads=None)
    config = recipe("digits").override(own | {"stage2.teacher": str(run), "stage2.teacher_block": 2}).restricted()
    train(config, tmp_path / "taught", quiet=True)
    assert load_model(tmp_path / "taught").step == 8


def test_a_rectangular_model_has_no_published_layout():
    config = LightningConfig(width=32, depth=1, heads=2)
    model = build(config, (2, 4, 6), Conditions("labels", 10))
    with pytest.raises(ValueError, match="square latents, and this one 4x6"):
        LAYOUTS["lightningdit"].arguments(model, config)
