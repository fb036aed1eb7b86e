"""Folders of diffusers come in as the same network, and go out as diffusers loads them."""

import dataclasses
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.config import SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.encoders.text import load_text_encoder
from selftrans.interop.exporting import export_run
from selftrans.interop.importing import import_run
from selftrans.models.diffusers_published import FAMILIES, WEIGHTS, describe, from_pretrained
from selftrans.recipes import recipe
from selftrans.sampling.conditioning import conditioning_of
from selftrans.sampling.images import Sampler
from selftrans.train.run import train
from selftrans.types import TEXT, Conditions
from tests.support import captioned, toy
from tests.support.diffusers_models import TEXTS, inputs, original, tiny
from tests.support.toy import quick  # noqa: F401 - a fixture

#: settings that a released model may have, by our short names
RELEASED = {
    "dit": {"learn_sigma": True},
    "pixart": {"learn_sigma": True, "sizes": True, "interpolation": 2.0},
    "sd3": {"qk_norm": True, "dual": (1,), "positions": 9, "pooled": "none", "pooled_width": 7},
    "flux": {"guidance": 3.5, "pooled": "none", "pooled_width": 7},
}


def released(folder, family, **settings):
    """A folder as diffusers writes it, and the network in it."""
    model = tiny(family, **RELEASED[family] | settings)
    model.net.save_pretrained(folder)
    return model


@pytest.fixture(params=RELEASED)
def family(request):
    return request.param


def expected(model, family, x, t, cond):
    """The original's output, in the form of latents."""
    pooled = torch.zeros(len(x), 7) if family in ("sd3", "flux") else None
    out = original(
        model, family, x, t, cond, guidance=torch.full((len(x),), 3.5) if family == "flux" else None, pooled=pooled
    )
    if family == "flux":
        return diffusers.FluxPipeline._unpack_latents(out, 64, 64, 8)
    return out[:, :4]


def test_a_folder_becomes_the_same_network(tmp_path, family):
    theirs = released(tmp_path, family).eval()
    options = {"prediction": "v"} if family in ("dit", "pixart") else {}
    ours = from_pretrained(tmp_path, shape=(4, 8, 8), conditions=None if family == "dit" else TEXTS, **options).eval()
    x, t, cond = inputs(ours, family)
    torch.testing.assert_close(ours(x, t, cond).v, expected(theirs, family, x, t, cond), atol=1e-5, rtol=1e-5)


def test_released_dit_and_pixart_predict_noise(tmp_path):
    for family in ("dit", "pixart"):
        released(tmp_path / family, family)
        model = from_pretrained(tmp_path / family)
        assert model.prediction == "noise" and model.shape == (4, 8, 8)
    assert model.conditions == Conditions("text", tokens=120, width=24)


def test_import_and_export_change_nothing(tmp_path, family):
    theirs = released(tmp_path / "theirs", family)
    said = []
    import_run(tmp_path / "theirs" / WEIGHTS, tmp_path / "run", autoencoder="pixel", say=said.append)
    assert "time and sign are those of DIFFUSERS, from its config.json" in said
    loaded = load_model(tmp_path / "run")
    found = {k.removeprefix("net."): v for k, v in loaded.model.state_dict().items() if k.startswith("net.")}
    assert found.keys() == theirs.net.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in theirs.net.state_dict().items())
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "diffusers"])
    again = getattr(diffusers, FAMILIES[f"diffusers-{family}"].kind).from_pretrained(
        tmp_path / "out", use_safetensors=True
    )
    assert all(torch.equal(again.state_dict()[k], v) for k, v in theirs.net.state_dict().items())
    config, before = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "theirs"))
    assert {k: v for k, v in config.items() if k != "_selftrans"} == {
        k: v for k, v in before.items() if k != "_name_or_path"
    }


def test_a_trained_run_is_exported_and_imported_again(tmp_path, capsys):
    own = {"model.name": "diffusers-dit", "model.layers": 2, "model.heads": 2, "model.head_dim": 12, "model.patch": 2}
    kept = {key: value for key, value in toy.TOY.items() if not key.startswith("model.")}
    config = recipe("digits").override(
        own | kept | {"data.path": str(toy.digits()), "method": "vanilla", "train.steps": 2}
    )
    train(config.restricted(), tmp_path / "run", quiet=True)
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])  # a layout with another weights file
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "diffusers"])
    main(
        ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "diffusers"]
    )  # again is harmless
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS]
    net = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    assert "not expected" not in capsys.readouterr().err
    ours = load_model(tmp_path / "run").model
    x, t, labels = inputs(ours, "dit")
    torch.testing.assert_close(ours(x, t, labels).v, net(x, 1000 * t, labels).sample)
    main(["import", str(tmp_path / "out" / WEIGHTS), "--out", str(tmp_path / "back")])
    back = load_model(tmp_path / "back")
    assert back.config.model == config.model and back.model.prediction == "v"  # the release would predict noise
    assert back.autoencoder == toy.PIXELS  # with the scale of its data: plain pixels would be other pictures
    assert torch.equal(back.model(x, t, labels).v, ours(x, t, labels).v)
    main(["sample", str(tmp_path / "back"), "--out", str(tmp_path / "images"), "--num=2", "--steps=2"])


@pytest.mark.parametrize("family", ["pixart", "sd3", "flux"])
def test_both_stages_train_on_captions_and_are_exported(tmp_path, family):
    own = {"model.name": f"diffusers-{family}", "model.layers": 2, "model.heads": 2, "model.head_dim": 12}
    own |= {"model.single_layers": 1} if family == "flux" else {}
    config = captioned.config(own | {"stage1.steps": 2, "train.steps": 2, "train.accumulate": 1})
    train(config, tmp_path / "run", quiet=True)
    for stage, term in {"stage1": "structure", "stage2": "self"}.items():
        assert toy.log(tmp_path / "run", stage)[-1][term] > 0
    ours, null = load_model(tmp_path / "run").model, Dataset.open(captioned.shared()).null()
    assert all(torch.equal(part, null[name]) for name, part in ours.null(null).items())
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "diffusers"])
    back = from_pretrained(tmp_path / "out").eval()
    x, t = torch.randn(1, *ours.shape), torch.rand(1)
    assert back.conditions == ours.conditions
    # not to the bit: weights lie at other offsets in the two files, and a kernel may round by the alignment in memory
    torch.testing.assert_close(back(x, t, null).v, ours(x, t, null).v, rtol=1e-5, atol=1e-7)


def test_null_text_of_an_imported_model_is_unknown(tmp_path):
    released(tmp_path / "theirs", "sd3")
    import_run(tmp_path / "theirs" / WEIGHTS, tmp_path / "run", autoencoder="pixel", say=lambda _: None)
    model = load_model(tmp_path / "run").model
    example = model.conditions.example()
    assert model.conditions.tokens == 333
    with pytest.raises(ValueError, match="no null condition yet"):
        model.null(example)
    model.use_null(example)
    assert model.null(example)[TEXT].shape == (1, 333, 24)


def test_an_imported_model_of_text_is_sampled_and_its_null_comes_from_the_encoder(tmp_path):
    """config.json names neither the encoder nor the empty caption: both come from the encoder that is given."""
    encoder = captioned.save_text_encoder(tmp_path / "encoder")
    model = tiny("sd3", conditions=Conditions("text", tokens=12, width=16))
    assert not model.null_set
    settings = SampleConfig(num=2, steps=1, sampler="heun", prompts=("a red square",), guidance_scale=2.0)
    conditioning = conditioning_of(model.conditions, settings, text_encoder=encoder)
    sampler = Sampler(model, load_autoencoder("values"), settings, device="cpu", conditioning=conditioning)
    assert next(sampler.sample()).images.shape == (2, *model.shape) and model.null_set
    expected = load_text_encoder(encoder, 12).encode([""])
    assert all(torch.equal(x, expected[name]) for name, x in model.null(expected).items())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("dit", {"norm_type": "ada_norm"}, "has norm_type ada_norm; only ada_norm_zero is supported"),
        ("dit", {"activation_fn": "geglu"}, "has activation_fn geglu; only gelu-approximate is supported"),
        ("dit", {"num_layers": "2"}, r"does not describe a DiTTransformer2DModel \(config\.json\.layers should be"),
        ("dit", {"num_layers": 10**9}, r"model\.layers must be from 1 to"),
        ("dit", {"out_channels": 7}, "has out_channels 7; only 4 is supported"),
        ("pixart", {"caption_channels": None}, "caption_channels is None; expected the width of the text"),
        ("pixart", {"sample_size": 0}, "does not describe a PixArtTransformer2DModel"),
        ("sd3", {"qk_norm": "layer_norm"}, "has qk_norm layer_norm; only rms_norm is supported"),
        ("sd3", {"dual_attention_layers": 3}, "does not describe a SD3Transformer2DModel"),
        ("flux", {"axes_dims_rope": [4, 4]}, r"config\.json\.axes should be"),
        ("flux", {"patch_size": 2}, "has patch_size 2; only 1 is supported"),
        ("flux", {"_selftrans": {"model": {"layers": 2}}}, r"does not describe a FluxTransformer2DModel \('shape'\)"),
        ("flux", {"_selftrans": 3}, "does not describe a FluxTransformer2DModel"),
    ],
)
def test_settings_that_are_not_supported_are_refused(family, changes, message):
    raw = json.loads(tiny(family, **RELEASED[family]).net.to_json_string())
    describe(f"diffusers-{family}", raw, "x/config.json")
    with pytest.raises(ValueError, match=message):
        describe(f"diffusers-{family}", raw | changes, "x/config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not the config.json of a model"),
        (lambda f: (f / "config.json").write_text("[]"), "is of none of the classes DiTTransformer2DModel,"),
        (lambda f: (f / "config.json").unlink(), "is of none of the classes"),
        (lambda f: (f / WEIGHTS).write_bytes(b"nothing"), "cannot be loaded by diffusers"),
        (lambda f: torch.save({}, f / "diffusion_pytorch_model.bin") or (f / WEIGHTS).unlink(), "cannot be loaded"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    released(tmp_path, "dit")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    released(tmp_path, "dit")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="is of quantised weights"):
        from_pretrained(tmp_path)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path, capsys):
    released(tmp_path / "theirs", "dit")
    file = tmp_path / "theirs" / WEIGHTS
    named = load_file(file)
    save_file({k: v for k, v in named.items() if "transformer_blocks.2." not in k}, file)
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) != 0
    assert "by its config.json, is not as expected: missing: " in capsys.readouterr().err
    (tmp_path / "theirs" / "config.json").unlink()
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--convention", "diffusers"]) != 0
    assert "is no transformer of diffusers with its config.json next to it" in capsys.readouterr().err


def test_other_models_have_no_such_layout(tmp_path):
    with pytest.raises(ValueError, match="model sit has no layout 'diffusers'"):
        export_run(toy.vanilla(), tmp_path / "out", layout="diffusers")


def test_every_family_has_its_settings_in_arguments():
    """`_selftrans` holds all settings, so that none is lost in an export."""
    for name, family in FAMILIES.items():
        own = dataclasses.asdict(family.Config(name=name))
        assert {"layers", "heads", "head_dim", "patch"} <= own.keys() and json.dumps(own)
