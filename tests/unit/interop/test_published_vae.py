"""Autoencoders of latent diffusion become folders of diffusers: the same network, with the statistics of its latents."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.interop.published_vae import import_vae
from tests.support import toy
from tests.support.published_files import save
from tests.support.published_vae import TINY, Network, state
from tests.support.toy import quick  # noqa: F401 - a fixture

SIZES = {
    "attention at the lowest resolution": TINY,
    "without": TINY | {"attended": ()},
    "three resolutions": {"ch": 32, "mult": (1, 1, 2), "layers": 2, "z": 16, "attended": (1, 2)},
}
MEAN, STD = [0.5, -1.0, 2.0], [0.5, 2.0, 4.0]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("packed", ["lightning", "plain", "safetensors"])
def test_the_network_equals_the_formulas(tmp_path, kind, packed):
    named = state(**SIZES[kind])
    file = tmp_path / f"vae.{'safetensors' if packed == 'safetensors' else 'pt'}"
    if packed == "safetensors":
        save_file(named, file)
    else:  # what a training command keeps besides: a discriminator, a vision model, counts
        others = {
            "loss.discriminator.main.3.num_batches_tracked": torch.tensor(3),
            "foundation_model.model.w": STD_TENSOR,
        }
        save(
            file, {"state_dict": {**others, **named}, "epoch": 3, "global_step": 7} if packed == "lightning" else named
        )
    found = load_autoencoder(str(import_vae(file, tmp_path / "vae")))
    side = 4 * found.downsample
    assert found.downsample == 2 ** (len(SIZES[kind]["mult"]) - 1) and found.channels == SIZES[kind]["z"]
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = Network(named).encode(pixels)
    moments = found.encode(pixels)
    torch.testing.assert_close(moments.mean.double(), mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moments.std.double(), std, atol=1e-4, rtol=1e-4)
    z = torch.randn(2, found.channels, 4, 4)
    expected = Network(named).decode(z).clamp(-1, 1)
    assert (expected.abs() < 1).double().mean() > 0.3
    torch.testing.assert_close(found.decode(z).double(), expected, atol=1e-4, rtol=1e-4)
    assert found.latent_space.shift == 0 and found.latent_space.scale == 1 and found.latent_space.stochastic


STD_TENSOR = torch.tensor(STD)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "json"])
def test_latents_are_normalised_by_the_statistics(tmp_path, kind):
    """From the file of statistics through `prepare` to the latents of a model, and back to pixels."""
    stats = tmp_path / f"latents_stats.{kind}"
    tensors = {"mean": torch.tensor(MEAN).view(1, 3, 1, 1), "std": STD_TENSOR.view(1, 3, 1, 1)}
    if kind == "json":
        stats.write_text(json.dumps({"mean": MEAN, "std": STD}))
    elif kind == "pt":
        torch.save(tensors, stats)
    else:
        save_file(tensors, stats)
    named = state(**TINY)
    words = [
        "import-vae",
        str(save(tmp_path / "vae.pt", named)),
        f"--out={tmp_path / 'vae'}",
        f"--latent-stats={stats}",
    ]
    assert main(words) == 0
    pictures = toy.pictures(tmp_path / "pictures", side=8, count=2)
    prepared = ["prepare", str(pictures), f"--out={tmp_path / 'data'}", f"--autoencoder={tmp_path / 'vae'}"]
    assert main([*prepared, "--dtype=float32"]) == 0
    space = Dataset.open(tmp_path / "data").manifest.latent_space
    assert space.shift == tuple(MEAN) and space.scale == tuple(1 / x for x in STD)
    found = load_autoencoder(str(tmp_path / "vae"))
    assert found.latent_space == space
    raw = torch.randn(2, 3, 4, 4)
    latents = space.mean(torch.cat([raw, torch.ones_like(raw)], dim=1))
    torch.testing.assert_close(latents, (raw - tensors["mean"]) / tensors["std"])
    torch.testing.assert_close(
        found.decode(latents).double(), Network(named).decode(raw).clamp(-1, 1), atol=1e-4, rtol=1e-4
    )


def test_a_run_on_normalised_latents_is_trained_and_sampled(tmp_path, quick):  # noqa: F811 - the fixture
    """LightningDiT on latents of 16 channels: the images are what the autoencoder decodes of its samples."""
    stats = tmp_path / "stats.json"
    stats.write_text(json.dumps({"mean": [3.0] * 16, "std": [0.5] * 16}))
    vae = import_vae(save(tmp_path / "vae.pt", state(**TINY | {"z": 16})), tmp_path / "vae", latent_stats=stats)
    pictures = toy.pictures(tmp_path / "pictures", side=8, count=4)
    assert main(["prepare", str(pictures), f"--out={tmp_path / 'data'}", f"--autoencoder={vae}"]) == 0
    flags = toy.flags({"model.name": "LightningDiT-S/1"})
    words = ["train", "lightningdit_imagenet_b1", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}", *flags]
    assert main([*words, "--train.precision=fp32"]) == 0
    loaded = load_model(tmp_path / "run")
    assert loaded.model.shape == (16, 4, 4) and loaded.autoencoder == str(vae.resolve())
    made = ["sample", str(tmp_path / "run"), f"--out={tmp_path / 'made'}", "--num=2", "--steps=2"]
    assert main(made) == 0 and len(list((tmp_path / "made").rglob("*.png"))) == 2


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), r"holds no autoencoder of latent diffusion; it holds 1 \(x\)"),
        (lambda s: s.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda s: s.pop("decoder.mid.attn_1.q.bias"), r"missing: 1 \(decoder.mid_block.attentions.0.to_q.bias\)"),
        (lambda s: s.update({"encoder.down.0.block.0.temb_proj.weight": torch.zeros(2, 2)}), "unknown: 1"),
        (lambda s: s.update({"encoder.norm_out.weight": torch.zeros(5)}), r"\(5,\) instead of \(64,\)"),
        (
            lambda s: s.update({"quant_conv.bias": torch.full((6,), torch.nan)}),
            "quant_conv.bias holds values that are not",
        ),
        (lambda s: s.update({"quant_conv.bias": torch.zeros(6, dtype=torch.long)}), "not a plain floating-point"),
        (
            lambda s: s.update({"encoder.mid.attn_1.q.weight": torch.zeros(64, 64, 0, 0)}),
            r"\(64, 0\) instead of \(64, 64\)",
        ),
        (lambda s: s.update({"encoder.conv_in.weight": torch.zeros(32, 0, 3, 3)}), "conv_in.weight is missing, or no"),
        (
            lambda s: s.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(0, 32, 3, 3)}),
            "is missing, or no conv",
        ),
        (lambda s: s.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(7, 32, 3, 3)}), "diffusers can build"),
    ],
)
def test_files_that_are_no_autoencoder_are_refused(tmp_path, capsys, change, message):
    named = state(**TINY)
    change(named)
    file = save(tmp_path / "vae.pt", named or {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        import_vae(file, tmp_path / "vae")
    assert main(["import-vae", str(file), f"--out={tmp_path / 'vae'}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "vae").exists()


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"mean": MEAN}, "std should be 3 finite numbers"),
        ({"mean": MEAN[:2], "std": STD}, "mean should be 3 finite numbers"),
        ({"mean": MEAN, "std": [1.0, 0.0, 1.0]}, "std should be above zero"),
        ({"mean": [1.0, float("nan"), 1.0], "std": STD}, "mean should be 3 finite"),
        ({"mean": ["1", 2, 3], "std": STD}, "mean should be 3 finite"),
        ({"mean": [10**400, 2, 3], "std": STD}, "mean should be 3 finite"),
        ([], "holds no object; give json with mean and std"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, stats, message):
    file, path = save(tmp_path / "vae.pt", state(**TINY)), tmp_path / "stats.json"
    path.write_text(json.dumps(stats))
    with pytest.raises(ValueError, match=message):
        import_vae(file, tmp_path / "vae", latent_stats=path)
    assert not (tmp_path / "vae").exists()


def test_nothing_is_unpickled_and_nothing_overwritten(tmp_path, capsys):
    vae, stats = save(tmp_path / "vae.pt", state(**TINY)), tmp_path / "stats.pt"
    torch.save({"mean": torch.zeros(3), "std": Evil()}, stats)
    assert main(["import-vae", str(vae), f"--out={tmp_path / 'vae'}", f"--latent-stats={stats}"]) == 1
    stats.write_bytes(pickle.dumps(Evil()))
    assert main(["import-vae", str(vae), f"--out={tmp_path / 'vae'}", f"--latent-stats={stats}"]) == 1
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        import_vae(vae, tmp_path / "vae")
