"""`selftrans autoencoder`: the folder that it makes, the latents that `prepare` makes with it, its figures and its errors."""

import errno
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from selftrans.cli.main import main
from selftrans.data.buckets import open_data
from selftrans.data.dataset import Dataset
from selftrans.data.prepare import prepare
from selftrans.data.views import split
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.evaluate.classifier import SmallClassifier
from selftrans.experiments import train_autoencoder as module
from selftrans.experiments.autoencoder_report import latent_statistics, reconstruction_figures, sheet
from selftrans.storage import lock_file
from selftrans.train.autoencoder_network import PerceptualDistance
from selftrans.train.signals import StopSignal
from tests.support import ratios, toy
from tests.support.toy import quick  # noqa: F401 - a fixture

SMALL = ["--factor=2", "--widths", "8", "8", "--no-attention", "--warmup=2", "--batch-size=8", "--checkpoint-every=20"]


def command(data, out, *options, steps=3):
    return ["autoencoder", str(data), f"--out={out}", *SMALL, f"--steps={steps}", *options]


def one_line(capsys):
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("selftrans: ")
    return line


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    SmallClassifier(8, 1, 10, width=8).save(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, classifier):
    """An autoencoder of the digits, with a perceptual term, after 40 steps."""
    out = tmp_path_factory.mktemp("vae") / "vae"
    options = ["--lr=5e-3", "--ema=0.9", "--held-out=60", f"--perceptual={classifier}", "--perceptual-weight=0.1"]
    words = command(toy.digits(), out, *options, steps=40)
    assert main(words) == 0
    return words, out, json.loads((out / "autoencoder.json").read_text())


def test_diffusers_loads_the_folder(made):
    from diffusers import AutoencoderKL

    _, out, report = made
    vae = AutoencoderKL.from_pretrained(out)
    assert (vae.config.in_channels, vae.config.latent_channels, vae.config.block_out_channels) == (1, 4, [8, 8])
    assert vae.config.latents_mean == report["latents"]["mean"] and vae.config.latents_std == report["latents"]["std"]
    averaged = load_file(out / "training" / "checkpoints" / "step-00000040" / "ema.safetensors")
    toy.assert_same(dict(vae.state_dict()), averaged)
    assert report["parameters"] == sum(p.numel() for p in vae.parameters())


def test_figures_are_those_of_the_folder_on_held_out_pictures(made, classifier):
    _, out, report = made
    _, held = split(open_data(toy.digits()), 60, seed=0)
    x = held.read(np.arange(len(held)))["moments"][:, 0].float()
    vae = load_autoencoder(str(out))
    y = vae.decode(vae.latent_space.mean(vae.encode(x).stack()))
    errors = ((x - y).double() / 2).flatten(start_dim=1)  # pictures in [0, 1]
    expected = {
        "pictures": 60,
        "psnr": float(np.mean([10 * np.log10(1 / float((e**2).mean())) for e in errors])),
        "l1": errors.abs().mean().item(),
        "perceptual": PerceptualDistance(SmallClassifier.load(classifier), 1)(x, y).mean().item(),
    }
    assert report["held_out"] == pytest.approx(expected, rel=1e-4)
    constant = -10 * ((x - x.mean()) / 2).square().mean().log10().item()
    assert report["held_out"]["psnr"] > constant + 2


def test_prepare_makes_latents_of_zero_mean_and_unit_variance(made, tmp_path):
    _, out, report = made
    assert main(["prepare", "digits", f"--out={tmp_path / 'latents'}", f"--autoencoder={out}", "--dtype=float32"]) == 0
    data = Dataset.open(tmp_path / "latents")
    assert data.manifest.shape == (4, 4, 4) == tuple(report["latent"]) and data.manifest.latent_space.stochastic
    moments = data.read(np.arange(len(data)))["moments"][:, 0]
    torch.manual_seed(0)
    z = data.manifest.latent_space.sample(moments)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 0.03 and (z.std(dim=(0, 2, 3)) - 1).abs().max() < 0.03
    std = moments.double().chunk(2, dim=1)[1]
    noise = std.square().mean(dim=(0, 2, 3)).sqrt()  # of all digits; the statistics leave the held-out ones out
    torch.testing.assert_close(torch.tensor(report["latents"]["posterior_std"]), noise.float(), rtol=0.02, atol=0)


def test_statistics_are_exact_for_known_posteriors():
    class Known:
        """Mean: the picture, and the picture + 3; standard deviations 0.5 and 2."""

        config = type("", (), {"latent_channels": 2})

        def eval(self):
            pass

        def encode(self, x):
            mean, log_variance = torch.cat([x, x + 3], dim=1), torch.ones_like(x) * 2 * np.log(2)
            parameters = torch.cat([mean, -log_variance, log_variance], dim=1)
            return type("", (), {"latent_dist": type("", (), {"parameters": parameters})})

    data = open_data(toy.digits())
    found = latent_statistics(Known(), data, torch.device("cpu"))
    x = data.read(np.arange(len(data)))["moments"][:, 0].double()
    mean, variance = x.mean().item(), x.var(correction=0).item()
    assert found["mean"] == pytest.approx([mean, mean + 3]) and found["pictures"] == 1797
    assert found["std"] == pytest.approx([(variance + 0.25) ** 0.5, (variance + 4) ** 0.5])
    assert found["posterior_std"] == pytest.approx([0.5, 2.0])


def test_pages(made):
    _, out, report = made
    page = (out / "report.html").read_text()
    for text in (f"{report['held_out']['psnr']:.2f} dB", "posterior_std", "[8, 8]", "data:image/png"):
        assert text in page
    assert "<script" not in page and "http" not in page
    with Image.open(out / "reconstructions.png") as picture:  # 32 digits in 8 columns, each over its reconstruction
        assert picture.size == (8 * 66 + 2, 8 * 66 + 2)


def test_sheet_alternates_originals_and_reconstructions(made):
    _, out, _ = made
    from diffusers import AutoencoderKL

    data = open_data(toy.digits())
    picture = sheet(
        AutoencoderKL.from_pretrained(out), data, torch.device("cpu"), 10
    )  # 8, and 2 on a second pair of lines
    rows = np.arange(10) * 1797 // 10
    x = data.read(rows)["moments"][:, 0, 0].float().numpy()
    for i in (0, 7, 8, 9):
        top, left = 2 + i // 8 * 2 * 66, 2 + i % 8 * 66
        shown = picture[top : top + 64 : 8, left : left + 64 : 8, 0] / 127.5 - 1
        assert np.abs(shown - x[i]).max() < 0.01
        below = picture[top + 66 : top + 130 : 8, left : left + 64 : 8, 0] / 127.5 - 1
        assert 0.01 < np.abs(below - x[i]).mean() < 0.6
    assert (picture[2 + 2 * 66 :, 2 + 2 * 66 :] == 255).all()


def test_repeating_the_command_changes_nothing_and_mends_what_is_damaged(made, monkeypatch, capsys):
    words, out, _ = made
    before, calls = toy.tree(out), []
    monkeypatch.setattr(module, "latent_statistics", lambda *a: calls.append(a) or latent_statistics(*a))
    assert main(words) == 0 and toy.tree(out) == before and not calls
    assert "held-out pictures: PSNR" in capsys.readouterr().out
    weights = out / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert main(words) == 0 and toy.tree(out) == before and len(calls) == 1


def test_full_disk_at_the_end_leaves_the_folder_as_it_was(made, tmp_path, monkeypatch, capsys):
    words, out, _ = made
    copy = toy.copy(out, tmp_path / "copy")
    longer = [word.replace(str(out), str(copy)).replace("--steps=40", "--steps=41") for word in words]

    def full(tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = (
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "autoencoder.json",
        "reconstructions.png",
        "report.html",
    )
    monkeypatch.setattr(module, "save", full)
    assert main(longer) == 1
    assert "cannot be written (No space left on device); free disk space" in one_line(capsys)
    assert all((copy / name).read_bytes() == (out / name).read_bytes() for name in kept)
    monkeypatch.undo()
    assert main(longer) == 0 and json.loads((copy / "autoencoder.json").read_text())["steps"] == 41


def test_stop_signal_ends_with_a_checkpoint_and_status_75(tmp_path, monkeypatch, capsys):
    def stopped(self):
        self.received = signal.SIGTERM
        return self

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "__enter__", stopped)
        assert main(command(toy.digits(), tmp_path / "a")) == 75
    assert "stopped by SIGTERM at step 1; checkpoint written" in one_line(capsys)
    assert not (tmp_path / "a" / "config.json").exists()
    assert main(command(toy.digits(), tmp_path / "a")) == 0 == main(command(toy.digits(), tmp_path / "b"))
    toy.assert_same(*(load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in "ab"))


def test_colour_pictures_of_several_shapes(tmp_path):
    assert main(command(ratios.shared(), tmp_path / "vae")) == 0
    assert main(["prepare", str(toy.pictures(tmp_path / "wide", side=6)), f"--out={tmp_path / 'data'}", "--resolution=6x10",
                 f"--autoencoder={tmp_path / 'vae'}"]) == 0  # fmt: skip
    assert Dataset.open(tmp_path / "data").manifest.shape == (4, 3, 5)


def test_bad_input(tmp_path, capsys, made, classifier):
    pictures = toy.pictures(tmp_path / "pictures", side=6)
    prepare(pictures, tmp_path / "six", progress=False)
    latents = tmp_path / "latents"
    prepare("digits", latents, autoencoder=str(made[1]), progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    out, first = tmp_path / "out", "first `selftrans prepare SOURCE --out PIXELS`, without --autoencoder"
    cases = [
        (command(pictures, out), f"pictures is not a folder of prepared data; {first}"),
        (command(tmp_path / "absent", out), f"absent is not a folder of prepared data; {first}"),
        (command(latents, out), "holds latents by"),
        (command(tmp_path / "six", out, "--factor=4", "--widths", "8", "8", "8"), "pictures of 6x6 in"),
        (command(tmp_path / "six", out, f"--perceptual={classifier}"), "the classifier is of pictures of 1 channels"),
        (command(toy.digits(), out, "--perceptual=absent.safetensors"), "no classifier file at absent.safetensors"),
        (command(toy.digits(), out, "--factor=3"), "--factor 3 is not a power of two"),
        (command(toy.digits(), tmp_path / "full"), "full exists and holds something else; choose another --out"),
        (command(toy.digits(), made[1]), "was started with other settings: "),
    ]
    for words, message in cases:
        assert main(words) == 1, message
        assert message in one_line(capsys)
    assert not out.exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_two_commands_never_train_in_one_folder(made, capsys):
    words, out, _ = made
    with lock_file(out / "training" / ".lock"):
        assert main(words) == 1
    assert "training is in use by process" in one_line(capsys)


def test_links_in_the_folder_are_not_followed(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "training").symlink_to(tmp_path / "elsewhere")
    assert main(command(toy.digits(), tmp_path / "vae")) == 1
    assert "vae exists and holds something else" in one_line(capsys) and not list((tmp_path / "elsewhere").iterdir())


def test_perfect_reconstruction_has_a_finite_psnr():
    class Identity:
        def eval(self):
            pass

        def encode(self, x):
            parameters = torch.cat([x, torch.zeros_like(x)], dim=1)
            return type("", (), {"latent_dist": type("", (), {"parameters": parameters})})

        def decode(self, z):
            return type("", (), {"sample": z})

    found = reconstruction_figures(Identity(), open_data(toy.digits()), torch.device("cpu"))
    assert found == {"pictures": 1797, "psnr": pytest.approx(100), "l1": 0}
