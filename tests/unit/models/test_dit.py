"""DiT: noise of the DDPM schedule turned into our velocity, against closed forms and diffusers' DDPMScheduler; in and out."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.config import from_json, to_json
from selftrans.flow import PATHS
from selftrans.methods.objective import Objective
from selftrans.models.dit import DIT_SIZES, DiT, DiTConfig, log_ratios, timestep, to_schedule, velocity
from selftrans.models.registry import find
from selftrans.models.sit import SiT, SiTConfig
from selftrans.recipes import recipe
from selftrans.sampling.samplers import guided, ode, sde
from selftrans.types import Batch, Output
from tests.support import published_files, toy
from tests.support.published_files import TINY, Assembled, state
from tests.support.toy import quick  # noqa: F401 - a fixture

SIZES = {"width": 32, "depth": 3, "heads": 2, "patch": 2}
SCHEDULER = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def column(x):
    return x.view(-1, 1, 1, 1)


def gaussian_noise(x, step, std, schedule="linear"):
    """E[noise | x] at a (fractional) step of the schedule, for data from N(0, std²)."""
    table = log_ratios(schedule)
    low = step.double().floor().long().clamp(0, len(table) - 2)
    ratio = torch.exp(table[low] + (step.double() - low) * (table[low + 1] - table[low]))
    abar = 1 / (1 + ratio.square())
    return column(torch.sqrt(1 - abar) / (abar * std**2 + 1 - abar)) * x


def gaussian_velocity(path, x, t, std):
    """E[v | z_t = x] for data from N(0, std²)."""
    a, s, da, ds = (column(f(t)) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    return (da * a * std**2 + ds * s) / (a**2 * std**2 + s**2) * x


@pytest.fixture
def gaussian(monkeypatch):
    """A DiT whose network is the exact noise of N(0, std²)."""

    def make(path, std, schedule="linear"):
        def network(self, x, step, cond, *, taps=(), stop=False):
            return Output(gaussian_noise(x, step, std, schedule), {})

        monkeypatch.setattr(SiT, "forward", network)
        return DiT((1, 4, 4), 0, path=PATHS[path], schedule=schedule, **SIZES)

    return make


# ---- the schedule and the algebra


def test_schedule_equals_diffusers():
    abar = SCHEDULER.alphas_cumprod.double()
    torch.testing.assert_close(1 / (1 + torch.exp(2 * log_ratios())), abar, rtol=2e-5, atol=1e-7)  # theirs is float32


def test_cosine_schedule_equals_diffusers():
    abar = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    found = 1 / (1 + torch.exp(2 * log_ratios("cosine")))
    assert len(found) == 995 and abar[995] < 1 / (1 + torch.exp(2 * log_ratios()[-1]))  # its end is left out
    torch.testing.assert_close(found, abar[:995], rtol=1e-3, atol=1e-7)  # theirs is float32


def test_steps_of_the_table_are_found_and_what_lies_between_is_interpolated():
    table = log_ratios()
    k = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(timestep(table, table), k, rtol=0, atol=1e-9)
    between = timestep((table[1:] + table[:-1]) / 2, table)
    torch.testing.assert_close(between, k[:-1] + 0.5, rtol=0, atol=1e-9)
    ends = timestep(torch.tensor([-torch.inf, -9.0, 9.0, torch.inf], dtype=torch.float64), table)
    assert ends.tolist() == [0, 0, 999, 999]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_exact_noise_of_a_gaussian_is_its_exact_velocity(name, std):
    path = PATHS[name]
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    zt = torch.randn(97, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    scaled = zt / column(torch.sqrt(alpha**2 + sigma**2))
    step = timestep(torch.log(sigma / alpha), log_ratios())
    found = velocity(path, scaled, gaussian_noise(scaled, step, std), column(sigma / alpha), column(t))
    torch.testing.assert_close(found, gaussian_velocity(path, zt, t, std), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", PATHS)
def test_the_model_is_exact_inside_the_schedule_and_close_at_its_ends(gaussian, name, schedule):
    model, t = gaussian(name, 0.7, schedule), torch.linspace(0, 1, 201)
    zt = torch.randn(201, 1, 4, 4)
    found, expected = model(zt, t, torch.zeros(201, dtype=torch.long)).v, gaussian_velocity(PATHS[name], zt, t, 0.7)
    inside = (t > 0.011) & (t < 0.98)
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-3, atol=1e-3)
    assert torch.isfinite(found).all() and (found - expected).abs().max() < 0.1


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_sampling_with_exact_noise_gives_the_std_of_the_data(gaussian, name, sampler):
    path, model = PATHS[name], gaussian(name, 0.5)
    z = torch.randn(2000, 1, 4, 4, dtype=torch.float64)

    def sampled(flow):
        torch.manual_seed(1)
        return ode(flow, z, steps=50) if sampler == "ode" else sde(flow, z, steps=250, path=path)

    end = sampled(guided(model, torch.zeros(2000, dtype=torch.long)))
    exact = sampled(lambda zt, t: gaussian_velocity(path, zt, t.expand(2000), 0.5))
    assert (end - exact).std() < 0.01 * exact.std() and abs(end.mean().item()) < 0.02
    # the last step of the SDE adds no noise, so its samples lack some of the variance
    assert end.std().item() == pytest.approx(0.5, rel=0.02 if sampler == "ode" else 0.04)
    if sampler == "ode":  # the flow of a Gaussian is linear
        torch.testing.assert_close(end, 0.5 * z, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_agrees_with_diffusers_scheduler(name):
    """At whole steps: its prediction of z0 from the network's noise gives our velocity."""
    path, named = PATHS[name], state(**TINY, learn_sigma=True)
    model = DiT((1, 8, 8), 10, path=path, **SIZES)
    model.load_state_dict({k: v for k, v in named.items() if k != "pos_embed"})
    theirs, labels = Assembled(named, **TINY), torch.tensor([3])
    for k in (10, 300, 700):
        abar = SCHEDULER.alphas_cumprod[k]
        t = path.t_of_ratio(torch.sqrt((1 - abar) / abar))[None]
        x = torch.randn(1, 1, 8, 8)
        zt = x * torch.sqrt(path.alpha(t) ** 2 + path.sigma(t) ** 2)
        with torch.no_grad():
            noise = theirs(x, torch.tensor([float(k)]), labels)
            found = model(zt, t, labels).v
        z0 = SCHEDULER.step(noise, k, x).pred_original_sample
        torch.testing.assert_close(found, path.d_alpha(t) * z0 + path.d_sigma(t) * noise, rtol=2e-3, atol=2e-3)


def test_half_precision_keeps_the_schedule():
    model = DiT((1, 8, 8), 10, **SIZES)
    was = model.ratios.clone()
    assert torch.equal(model.to(torch.bfloat16).ratios, was) and model.ratios.dtype == torch.int32
    torch.testing.assert_close(model.ratios.view(torch.float32).double(), log_ratios(), rtol=1e-6, atol=1e-6)


# ---- a family of its own


@pytest.mark.parametrize("name", DIT_SIZES)
def test_every_published_size_builds_and_runs(name):
    with torch.device("meta"):
        config = DiTConfig(name=name)
        config.check()
        model = find(name).build(config, (4, 32, 32), find_conditions())
        out = model(torch.empty(2, 4, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.long), taps=(model.depth,))
    assert out.v.shape == (2, 4, 32, 32) and out.feats[model.depth].shape[1] == model.tokens
    assert model.final_layer.linear.out_features == 8 * model.patch**2


def find_conditions():
    from selftrans.types import Conditions

    return Conditions("labels", 1000)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = DiT((4, 32, 32), 1000, **DIT_SIZES[f"DiT-{size}/2"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_names_choose_the_family_and_its_settings():
    config = recipe("digits").override({"model.name": "DiT-S/2"})
    assert type(config.model) is DiTConfig and not config.model.qk_norm and config.model.width is None
    assert type(config.override({"model.name": "SiT-S/2"}).model) is SiTConfig
    with pytest.raises(ValueError, match=r"'DiT-S/1' is unknown"):
        DiTConfig(name="DiT-S/1").check()


@pytest.mark.parametrize("name", PATHS)
def test_the_run_sets_the_path(name):
    model = toy.toy({"model.name": "DiT-S/8", "train.path": name}).build_model((4, 8, 8), find_conditions())
    assert model.path is PATHS[name]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", PATHS)
def test_its_loss_is_the_squared_error_of_its_noise(name, schedule):
    """As it is published, without the variance; so the error is not divided by alpha, which would leave the noisy end alone."""
    torch.manual_seed(0)
    model = DiT((1, 4, 4), 2, path=PATHS[name], schedule=schedule, **SIZES)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    objective = Objective(model, path=PATHS[name], drop=0.0)
    batch = Batch(torch.randn(16, 1, 4, 4), torch.randint(2, (16,)))
    d = objective.draw(batch, t=torch.linspace(0.02, 0.98, 16))
    table = log_ratios(schedule).float()
    scaled, step = to_schedule(PATHS[name], d.zt, d.t, table)
    noise = SiT.forward(model, scaled, step, d.cond).v
    expected = (noise - d.noise).square().mean()
    assert expected > 0.1
    torch.testing.assert_close(objective(d, 0)[0], expected, rtol=1e-4, atol=0)


def test_runs_from_before_the_choice_keep_the_loss_of_the_velocity():
    raw = json.loads(to_json(recipe("digits").override({"model.name": "DiT-S/2"}).restricted()))
    assert raw["train"].pop("loss") == "own"
    assert from_json(json.dumps(raw)).train.loss == "velocity"
    raw["model"] = {"name": "SiT-S/2"}
    assert from_json(json.dumps(raw)).train.loss == "own", "which is that of the velocity"


def test_features_stop_and_truncation_are_those_of_the_network():
    model = DiT((1, 8, 8), 10, **SIZES)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 10])
    full, early = model(x, t, y, taps=(2,)), model(x, t, y, taps=(2,), stop=True)
    assert early.v is None and torch.equal(full.feats[2], early.feats[2])
    assert torch.equal(model.truncated(2)(x, t, y, taps=(2,), stop=True).feats[2], full.feats[2])
    network = SiT.forward(model, x / torch.sqrt((1 - t) ** 2 + t**2).view(-1, 1, 1, 1), step_of(t), y, taps=(2,))
    torch.testing.assert_close(network.feats[2], full.feats[2], rtol=1e-4, atol=1e-4)


def step_of(t):
    return timestep(torch.log(t.double() / (1 - t.double())), log_ratios())


# ---- published files


def imported(tmp_path, content, *words):
    """The run of a file, or the status of the command."""
    file = published_files.save(tmp_path / "DiT.pt", content)
    return main(["import", str(file), "--out", str(tmp_path / "run"), "--heads", "2", *words])


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("evidence", ["convention", "options"])
def test_import_and_export_leave_files_unchanged(tmp_path, capsys, learn_sigma, evidence):
    raw, ema = (state(**TINY, learn_sigma=learn_sigma, seed=k) for k in (1, 2))
    args = argparse.Namespace(model="DiT-XL/2") if evidence == "options" else None
    words = ["--convention", "dit"] if evidence == "convention" else []
    assert imported(tmp_path, {"model": raw, "ema": ema, "opt": None, "args": args}, *words) == 0
    printed = capsys.readouterr()
    assert "those of DIT, from" in printed.out and "may be a DiT checkpoint" not in printed.err
    found = load_model(tmp_path / "run")
    assert type(found.model) is DiT and found.config.model.learn_sigma == learn_sigma
    for weights, named in (("ema", ema), ("raw", raw)):
        toy.assert_same(
            load_model(tmp_path / "run", weights=weights).model.state_dict(),
            {k: v for k, v in named.items() if k != "pos_embed"},
        )
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "dit"]
    assert main(export) == 0
    back, described = (
        load_file(tmp_path / "out/model.safetensors"),
        json.loads((tmp_path / "out/config.json").read_text()),
    )
    assert back.keys() == ema.keys() and all(torch.equal(back[k], ema[k]) for k in ema if k != "pos_embed")
    torch.testing.assert_close(back["pos_embed"], ema["pos_embed"], rtol=0, atol=1e-6)
    assert described["arguments"]["learn_sigma"] == learn_sigma and described["arguments"]["num_heads"] == 2
    again = ["import", str(tmp_path / "out/model.safetensors"), "--out", str(tmp_path / "again"), "--heads", "2"]
    assert main(again) == 0 and "those of DIT, from its header" in capsys.readouterr().out
    toy.assert_same(load_model(tmp_path / "again").model.state_dict(), found.model.state_dict())


def test_a_run_of_dit_is_sampled(tmp_path):
    assert imported(tmp_path, {"ema": state(**TINY, learn_sigma=True)}, "--convention", "dit") == 0
    words = ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "made"), "--num", "2", "--steps", "2"]
    assert main(words) == 0 and len(list((tmp_path / "made").rglob("*.png"))) == 2


@pytest.mark.parametrize("path", PATHS)
def test_the_path_of_the_run_is_chosen_at_import(tmp_path, path):
    content = {"ema": state(**TINY, learn_sigma=True)}
    assert imported(tmp_path, content, "--convention", "dit", "--path", path) == 0
    found = load_model(tmp_path / "run")
    assert found.config.train.path == path and found.model.path is PATHS[path]


def test_a_path_against_the_stored_options_is_refused(tmp_path, capsys):
    content = {"ema": state(**TINY), "args": published_files.options("sit", path_type="GVP")}
    assert imported(tmp_path, content, "--path", "linear") == 1
    assert "was trained on the path cosine, by its stored options; omit --path linear" in capsys.readouterr().err
    assert imported(tmp_path, content, "--path", "cosine") == 0


def test_moments_of_the_optimiser_are_imported(tmp_path):
    named = state(**TINY, learn_sigma=True)
    gradients = {k: torch.randn_like(v) for k, v in named.items() if k != "pos_embed"}
    _, optimizer = published_files.adamw(named, [gradients])
    content = {"model": named, "ema": named, "opt": optimizer, "args": None}
    assert imported(tmp_path, content, "--convention", "dit") == 0
    found = load_file(toy.checkpoint(tmp_path / "run", "vanilla") / "optimizer.safetensors")
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[f"student.{name}:exp_avg"], 0.1 * gradient, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[f"student.{name}:exp_avg_sq"], 1e-3 * gradient.square(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"projectors": "repa"}, "holds projectors, which DiT does not have"),
        ({"width": 64}, "misshapen"),
    ],
)
def test_files_that_are_no_dit_are_refused(tmp_path, capsys, content, message):
    named = state(**TINY | {k: v for k, v in content.items() if k != "width"})
    if "width" in content:
        named["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    assert imported(tmp_path, named, "--convention", "dit") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_qk_norm_is_not_exported(tmp_path, capsys):
    file = published_files.save(tmp_path / "a.pt", state(**TINY, qk_norm=True))
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--convention", "dit"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "dit"]) == 1
    assert "has no QK-norm" in capsys.readouterr().err


def test_an_imported_dit_teaches(tmp_path):
    assert imported(tmp_path, {"ema": state(**TINY, learn_sigma=True)}, "--convention", "dit") == 0
    out = tmp_path / "student"
    words = ["train", "digits", f"--data={toy.plain_digits()}", f"--out={out}", f"--teacher={tmp_path / 'run'}"]
    assert main([*words, *toy.taught_flags()]) == 0
    lines = toy.log(out)
    assert lines[0]["self"] > 0 and lines[-1]["step"] == 8
    kept = json.loads((toy.checkpoint(out, step=3) / "state.json").read_text())["teacher"]
    assert kept["imported"]["convention"] == "dit"


def test_a_dit_is_trained(tmp_path):
    words = [
        "train",
        "digits",
        f"--data={toy.plain_digits()}",
        f"--out={tmp_path}",
        "--method=vanilla",
        "--model.name=DiT-S/2",
    ]
    flags = [flag for flag in toy.flags() if not flag.startswith("--stage")]
    assert main([*words, *flags]) == 0
    assert type(load_model(tmp_path).model) is DiT and toy.log(tmp_path, "vanilla")[-1]["step"] == 8


def test_schedule_is_made_on_the_device_of_the_model(monkeypatch):
    """`transformers`, while it builds a model, replaces torch.linspace by one that is on the CPU unless a device is named."""
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **options: linspace(*args, **{"device": "cpu"} | options))
    with torch.device("meta"):
        assert log_ratios().is_meta
