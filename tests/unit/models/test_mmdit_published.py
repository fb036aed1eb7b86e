"""MMDiT checkpoints of REPA's code come in as the same network, and go out as they would have been written."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import load_file

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.fine_tuning import Init
from selftrans.interop.importing import import_run
from selftrans.models.mmdit import MMDiTConfig, build
from selftrans.models.mmdit_published import LAYOUTS
from selftrans.models.registry import find
from selftrans.models.spec import PublishedFile
from selftrans.recipes import recipe
from selftrans.sampling.conditioning import captions_of
from selftrans.train.given_weights import read_given
from selftrans.train.run import train
from selftrans.types import MASK, TEXT, Conditions
from tests.support import captioned, toy
from tests.support.published_files import adamw, save
from tests.support.published_mmdit import TINY, network, state
from tests.support.toy import quick  # noqa: F401


def brought(file, out, **given):
    """A file as a run, and what was printed."""
    output = []
    import_run(file, out, **{"autoencoder": "values", "say": output.append} | given)
    return out, "\n".join(output)


@torch.no_grad()
def off(model, weights):
    """Largest difference between our velocity and the formulas', relative to the largest value."""
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(3, *model.shape, generator=g), torch.randn(3, 5, model.conditions.width, generator=g)
    t = torch.tensor([0.0, 0.4, 1.0])
    expected = network(weights, x, t, text)
    found = model(x, t, {TEXT: text, MASK: torch.tensor([[True] * 2 + [False] * 3] * 3)}).v  # padding is attended to
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "heads": "repa"}, {"heads": "stage1"}, {"patch": 2}, {"depth": 3, "grid": 4}]
)
def test_imported_network_equals_the_formulas(tmp_path, options):
    sizes = TINY | options
    raw, ema = (state(**sizes, seed=k) for k in (1, 2))
    content = {"model": raw, "ema": ema, "opt": None, "args": None, "steps": 7}
    run, output = brought(save(tmp_path / "a.pt", content), tmp_path / "run")
    assert ("its projectors are left out" in output) == ("heads" in options)
    for weights, theirs in (("raw", raw), ("ema", ema)):
        found = load_model(run, weights=weights)
        assert off(found.model, theirs) < 1e-5
    own = {"width": 32 * sizes["depth"], "depth": sizes["depth"], "heads": sizes["depth"], "patch": sizes["patch"]}
    assert found.config.model == MMDiTConfig(**own, qk_norm="qk_norm" in options, zero_init=False)
    assert found.step == 7 and not found.model.null_set
    text = found.model.conditions
    assert (text.tokens, text.width, text.encoder) == (77, 768, "openai/clip-vit-large-patch14")


def test_the_published_size_and_its_recipe_are_known():
    """Names and shapes of the full size; nothing reads the weights, which take no memory."""
    with torch.device("meta"):
        named = state(24, 2, 4, 16, 768, seed=None)
    named["pos_embed"] = get_2d_sincos_pos_embed(768, 16, base_size=16, output_type="pt")[None].float()
    file = PublishedFile(Path("a.pt"), {"ema": named}, None, {}, None, None, [])
    found = find("MMDiT-B/2").reader(file, None, None)
    assert (found.name, found.recipe, found.shape) == ("MMDiT-B/2", "mmdit_coco", (4, 32, 32))
    assert found.config == recipe("mmdit_coco").model and found.conditions.tokens == 77


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=str)
def test_export_of_an_import_is_the_same_file(tmp_path, options):
    weights = state(**TINY, **options)
    run, _ = brought(save(tmp_path / "a.pt", weights), tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--layout", "repa"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], x) for name, x in weights.items() if name != "pos_embed")
    torch.testing.assert_close(written.pop("pos_embed"), weights["pos_embed"], atol=1e-6, rtol=0)
    assert list(LAYOUTS["repa"].tensors(load_model(run).model)) == list(weights)  # the numbers of their optimiser
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["arguments"] == {
        "input_size": 16, "patch_size": 1, "in_channels": 2, "depth": 2, "qk_norm": "rms" if options else None,
        "encoder_depth": 1, "z_dims": [],
    }  # fmt: skip
    again, output = brought(tmp_path / "out" / "model.safetensors", tmp_path / "again")
    assert off(load_model(again).model, weights) < 1e-5 and "those of REPA" in output


def test_moments_of_the_optimiser_follow_their_parameters_past_the_positions(tmp_path):
    weights = state(**TINY, heads="repa")
    parameters = {name: x for name, x in weights.items() if name != "pos_embed"}
    g = torch.Generator().manual_seed(5)
    gradients = {name: torch.randn(x.shape, generator=g) for name, x in parameters.items()}
    trained, optimizer = adamw(parameters, [gradients], lr=2e-4, betas=(0.9, 0.9))
    content = {"model": weights | trained, "ema": weights, "opt": optimizer}
    run, output = brought(save(tmp_path / "a.pt", content), tmp_path / "run")
    assert "from zero" not in output and load_model(run).step == 1
    found = load_file(next((run / "vanilla" / "checkpoints").glob("*/optimizer.safetensors")))
    for name in ("joint_blocks.1.x_block.mlp.fc2.weight", "final_layer.linear.bias", "context_embedder.weight"):
        torch.testing.assert_close(found[f"student.{name}:exp_avg"], 0.1 * gradients[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[f"student.{name}:exp_avg_sq"], 0.1 * gradients[name] ** 2, rtol=1e-5, atol=0)
    assert not [name for name in found if "pos_embed" in name or "null" in name or "projectors" in name]


def test_weights_are_given_to_a_run(tmp_path):
    """`--init FILE`: the network under our names; the null caption is that of the data."""
    weights = state(**TINY)
    given = read_given(Init(path=str(save(tmp_path / "a.pt", {"ema": weights}))))
    assert given.model.width == 64 and given.shape == (2, 16, 16) and given.conditions.kind == "text"
    assert all(torch.equal(given.tensors[name], x) for name, x in weights.items() if name != "pos_embed")


def test_an_import_is_trained_further_and_teaches_on_captions_of_any_encoder(tmp_path, quick):  # noqa: F811
    """No file says which encoder made its text: the data say it, and what the empty caption is."""
    encoder = captioned.save_text_encoder(tmp_path / "encoder", "t5")
    data = captioned.prepared(tmp_path, encoder=encoder, tokens=77, side=16, count=8, standardise=False)
    weights = state(**TINY | {"channels": 3, "text": 16})
    run, _ = brought(save(tmp_path / "a.pt", {"ema": weights, "steps": 3}), tmp_path / "run", autoencoder="pixel")
    held = load_model(run)
    own = {
        "data.path": str(data),
        "train.steps": 4,
        "train.batch_size": 2,
        "train.accumulate": 1,
        "train.precision": "fp32",
    }
    config = held.config.override(own | {"train.preview_every": 0, "log.tensorboard": False})
    train(config, run, quiet=True)
    continued, null = load_model(run), Dataset.open(data).null()
    assert continued.step == 4 and continued.model.conditions == Dataset.open(data).manifest.conditions
    assert all(torch.equal(x, null[name]) for name, x in continued.model.null(null).items())
    again, _ = brought(tmp_path / "a.pt", tmp_path / "teacher", autoencoder="pixel")
    taught = config.override(
        {
            "method": "self_transcendence",
            "stage2.teacher": str(again),
            "stage2.head_width": 4,
            "stage2.timestep_range": None,
        }
        | {"train.steps": 1}
    )
    train(taught, tmp_path / "taught", quiet=True)
    assert toy.log(tmp_path / "taught")[-1]["self"] > 0
    assert captions_of(Dataset.open(data), held.model.conditions).null is not None
    other = dataclasses.replace(continued.model.conditions, sha256="0" * 64)
    assert not other.fits(continued.model.conditions) and other.fits(held.model.conditions)


NAN = torch.full((64,), float("nan"))
LAST = "joint_blocks.1.context_block"


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"joint_blocks.0.x_block.attn.qkv.bias": None}, [], "missing: 1 (joint_blocks.0.x_block.attn.qkv.bias)"),
        ({f"{LAST}.attn.proj.weight": torch.zeros(64, 64)}, [], f"unknown: 1 ({LAST}.attn.proj.weight)"),
        ({f"{LAST}.adaLN_modulation.1.bias": torch.zeros(384)}, [], "(384,) instead of (128,)"),
        ({"y_embedder.mlp.0.weight": torch.zeros(64, 9)}, [], "unknown: 1 (y_embedder.mlp.0.weight)"),
        ({"context_embedder.weight": None}, [], "is not an MMDiT: context_embedder.weight is missing"),
        ({"pos_embed": torch.zeros(1, 256, 64)}, [], "pos_embed is not the fixed table"),
        ({"pos_embed": torch.zeros(1, 200, 64)}, [], "200 tokens"),
        ({"x_embedder.proj.weight": torch.zeros(96, 2, 1, 1)}, [], "set its number of attention heads with --heads"),
        ({"x_embedder.proj.weight": torch.zeros(0, 2, 1, 1)}, [], "square latents"),
        ({"final_layer.linear.bias": NAN[:2]}, [], "final_layer.linear.bias holds values that are not finite"),
        ({}, ["--heads=4"], "has 2 attention heads; omit --heads 4"),
        ({}, ["--convention=sit"], "omit --convention sit"),
        ({}, ["--name=MMDiT-B/2"], "is not MMDiT-B/2: it has width 64, depth 2, heads 2, patch 1"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, capsys, changes, words, message):
    weights = {name: x for name, x in (state(**TINY) | changes).items() if x is not None}
    file = save(tmp_path / "a.pt", weights)
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--autoencoder=values", *words]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("config", "shape", "text", "message"),
    [
        ({}, (2, 8, 8), 768, "latents of 16x16 patches, and this model latents of 8x8"),
        ({"heads": 4}, (2, 16, 16), 768, "as many heads as blocks, and this model width 64, depth 2, heads 4"),
        ({}, (2, 16, 16), 384, "text of 768 channels, and this model text of 384"),
        ({"masked": True}, (2, 16, 16), 768, "model.masked"),
    ],
)
def test_models_that_the_published_class_cannot_build_are_not_exported(config, shape, text, message):
    config = dataclasses.replace(MMDiTConfig(width=64, depth=2, heads=2, patch=1), **config)
    model = build(config, shape, Conditions("text", tokens=3, width=text))
    with pytest.raises(ValueError, match=message):
        LAYOUTS["repa"].arguments(model, config)
