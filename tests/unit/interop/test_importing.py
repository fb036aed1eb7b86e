"""Import of published checkpoints: every layout, same optimiser state, no code executed, no weights lost."""

import argparse
import builtins
import json
import os
import re
import shlex
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.config import from_json
from selftrans.storage import sha256_file
from selftrans.train.run import train
from tests.support import published_files, toy
from tests.support.importing import HEADS, inputs, off, run_import
from tests.support.published_files import TINY, Assembled, options, save, state
from tests.support.toy import quick  # noqa: F401 - a fixture

# ---- layouts


def wrapped(named):
    """Names as saved with DistributedDataParallel around torch.compile, and with compiled blocks."""
    return {f"module._orig_mod.{k.replace('blocks.1.', 'blocks.1._orig_mod.')}": v for k, v in named.items()}


def legacy(named):
    """Names of early REPA files: block 2 is the first after the projector."""
    return {k.replace("blocks.2.", "decoder_blocks.0."): v for k, v in named.items()}


PAIR = {"args": options("repa", encoder_depth=2), "steps": 7}
LAYOUTS = {
    "sit": (None, lambda m, e: e, "a guess"),
    "sit, learn_sigma": ({"learn_sigma": True}, lambda m, e: e, "those of SIT, a guess: its last layer"),
    "sit training": (None, lambda m, e: {"model": m, "ema": e, "args": options("sit")}, "those of SIT, from its stored opt"),
    "repa": ({"projectors": "repa"}, lambda m, e: {"model": m, "ema": e, **PAIR}, "those of REPA, from its stored opt"),
    "repa, ema alone": ({"projectors": "repa"}, lambda m, e: {"ema": e}, "those of REPA, since it holds projectors"),
    "repa, legacy": ({"projectors": "repa"}, lambda m, e: {"model": legacy(m), "ema": legacy(e), "steps": 7}, "those of REPA"),
    "stage 1": ({"projectors": "stage1", "qk_norm": True}, lambda m, e: {"model": m, "ema": e, **PAIR}, "those of REPA"),
    "stage 2": ({"projectors": "stage2", "qk_norm": True}, lambda m, e: {"model": m, "ema": e, **PAIR}, "those of REPA"),
    "qk-norm alone": ({"qk_norm": True}, lambda m, e: e, "those of REPA, a guess"),
    "compiled, in DDP": ({"projectors": "repa"}, lambda m, e: {"model": wrapped(m), "ema": wrapped(e)}, "those of REPA"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_every_layout_is_imported(tmp_path, kind, form):
    more, arrange, reason = LAYOUTS[kind]
    raw, ema = (state(**TINY, **(more or {}), seed=k) for k in (1, 2))
    content = arrange(raw, ema)
    file = tmp_path / f"a.{form}"
    if form == "pt":
        save(file, content)
    elif "ema" not in content:
        save_file(content, file)
    else:
        save_file({f"{k}.{n}": t for k in ("model", "ema") if k in content for n, t in content[k].items()}, file)
        reason = reason.partition(",")[0] if "projectors" in (more or {}) else "time and sign"
    given = {"convention": "sit"} if kind == "sit training" and form == "safetensors" else {}
    run, output = run_import(file, tmp_path / "run", **given)
    assert reason in output
    flip = kind.startswith("sit")
    both = isinstance(content, dict) and "model" in content
    assert off(run, Assembled(ema, **TINY), TINY, flip=flip) < 1e-5
    assert off(run, Assembled(raw if both else ema, **TINY), TINY, weights="raw", flip=flip) < 1e-5
    stage = "stage1" if kind == "stage 1" else "vanilla"
    steps = 7 if form == "pt" and "steps" in content else 0
    assert [p.name for p in (run / stage / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    state_json = json.loads(next((run / stage / "checkpoints").glob("*/state.json")).read_text())
    assert state_json["imported"]["path"] == str(file) and state_json["imported"]["sha256"] == sha256_file(file)
    assert (run / "imported.json").exists() and from_json((run / "config.json").read_text()).method in (
        "vanilla",
        "structure",
    )


def test_unused_entries_are_listed_and_recorded(tmp_path):
    named = state(**TINY)
    others = {
        "epoch": 3,
        "optimizer": {"exp_avg": torch.zeros(2)},
        "scaler": {"scale": torch.ones(1)},
        "rng": {"cpu": torch.ones(3)},
    }
    content = {
        "model": named,
        "steps": torch.tensor(4),
        "best\x1b": 1.0,
        "scheduler_state": {"x": torch.ones(2)},
        **others,
    }
    run, output = run_import(save(tmp_path / "a.pt", content), tmp_path / "run")
    listed = "best\\x1b, scheduler_state, epoch, optimizer, scaler, rng"
    assert f"unused entries of the file: {listed}\n" in output and "it holds one set of weights" in output
    assert json.loads((run / "imported.json").read_text())["unused"] == listed
    assert load_model(run).step == 4 and "taken as 0" not in output
    file = save(tmp_path / "b.pt", {"ema": named, "steps": torch.tensor([4, 5])} | {f"x{k}": k for k in range(30)})
    run, output = run_import(file, tmp_path / "many")
    assert "x18, x19 and 11 more\n" in output and load_model(run).step == 0
    run, output = run_import(save(tmp_path / "c.pt", {"ema": named, "steps": 4}), tmp_path / "all")
    assert "unused entries" not in output and "unused" not in json.loads((run / "imported.json").read_text())


def test_single_state_dict_is_used_for_raw_and_ema(tmp_path):
    named = state(**TINY)
    file = save(tmp_path / "a.pt", {"state_dict": named, "epoch": 3, "steps": 4})
    run, output = run_import(file, tmp_path / "run", convention="repa")
    assert off(run, Assembled(named, **TINY), TINY) < 1e-5 and load_model(run).step == 4
    assert "it holds one set of weights" in output and "unused entries of the file: epoch" in output


@pytest.mark.parametrize("known", [["model"], ["ema"], ["model", "ema"], ["state_dict"], []])
@pytest.mark.parametrize("other", ["ema_model", "state_dict_ema", "model_state_dict"])
def test_weights_that_would_be_lost_are_refused_by_name(tmp_path, capsys, known, other):
    named = state(**TINY)
    file = save(tmp_path / "a.pt", dict.fromkeys([*known, other], named) | {"epoch": 3})
    assert main(["import", str(file), "--out", str(tmp_path / "run"), *HEADS]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"holds weights under {other}, which" in err and "model and ema" in err, err
    assert not (tmp_path / "run").exists()


def test_heads_are_omitted_or_written_to_a_separate_file(tmp_path):
    named = state(**TINY, projectors="repa")
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "steps": 3})
    run, output = run_import(file, tmp_path / "run")
    assert "left out (--keep-heads)" in output and not (run / "projectors.safetensors").exists()
    run, output = run_import(file, tmp_path / "kept", keep_heads=True)
    kept = load_file(run / "projectors.safetensors")
    heads = {k: v for k, v in named.items() if k.startswith("projectors")}
    toy.assert_same(kept, {f"{kind}.{k}": v for kind in ("raw", "ema") for k, v in heads.items()})
    assert not [k for k in load_file(toy.checkpoint(run, "vanilla") / "ema.safetensors") if "projector" in k]


def test_imported_stage_1_head_equals_the_published_one(tmp_path):
    """The published head with its unpatchify, compared with the imported head and `SiT.patchify` of the same picture."""

    sizes = TINY | {"channels": 4}
    named = state(**sizes, projectors="stage1", qk_norm=True)
    args = options("repa", encoder_depth=2, t_range=[0.4, 0.7], proj_coeff=0.25)
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "args": args, "steps": 5})
    run, _ = run_import(file, tmp_path / "run")
    config = from_json((run / "config.json").read_text())
    stage1 = config.sections["stage1"]
    assert config.method == "structure" and (stage1.block, stage1.weight, stage1.timestep_range) == (
        2,
        0.25,
        (0.4, 0.7),
    )
    assert (stage1.range_mode, stage1.head_width) == ("scale", 16)

    hidden = torch.randn(3, 16, 32)
    x = hidden
    for part in ("0", "2", "4"):
        x = torch.nn.functional.linear(x, named[f"projectors.{part}.weight"], named[f"projectors.{part}.bias"])
        x = torch.nn.functional.silu(x) if part != "4" else x
    x = torch.nn.functional.layer_norm(x, (32,), eps=1e-6)
    x = torch.nn.functional.linear(x, named["projectors_final.linear.weight"], named["projectors_final.linear.bias"])
    picture = torch.einsum("nhwpqc->nchpwq", x.reshape(3, 4, 4, 2, 2, 4)).reshape(3, 4, 8, 8)

    from selftrans.methods.self_transcendence import StructureGuidance

    guidance = StructureGuidance(load_model(run).model, stage1)
    heads = load_file(toy.checkpoint(run, "stage1") / "heads.safetensors")
    guidance.load_state_dict({k.removeprefix("guidances.0."): v for k, v in heads.items()}, strict=True)
    torch.testing.assert_close(guidance.head(hidden), guidance.patchify(picture), atol=1e-5, rtol=1e-5)


# ---- the optimiser


@pytest.mark.parametrize("convention", ["repa", "sit"])
def test_adamw_moments_follow_their_parameters(tmp_path, convention):
    """After one step exp_avg is a tenth of the gradient, in the assembled network and in the imported one."""
    named = state(**TINY, projectors="repa" if convention == "repa" else None)
    network, (x, t, labels) = Assembled(named, **TINY), inputs((1, 8, 8), 10)
    target = torch.randn_like(x)
    flip = convention == "sit"
    out = network(x, 1 - t if flip else t, labels)
    (out - (-target if flip else target)).square().mean().backward()
    gradients = {"final_layer.linear.weight": network.out.weight.grad, "final_layer.linear.bias": network.out.bias.grad}
    for k in (0, 2):
        layer = (network.time.linear_1, network.time.linear_2)[k // 2]
        gradients |= {f"t_embedder.mlp.{k}.{part}": getattr(layer, part).grad for part in ("weight", "bias")}
    others = {k: torch.randn_like(v) for k, v in named.items() if k not in gradients and k != "pos_embed"}
    _, optimizer = published_files.adamw(named, [others | gradients])
    content = {"model": named, "ema": named, "opt": optimizer, "args": options(convention)}
    run, output = run_import(save(tmp_path / "a.pt", content), tmp_path / "run")
    assert "starts from zero" not in output
    found = load_file(toy.checkpoint(run, "vanilla") / "optimizer.safetensors")
    assert {float(v) for k, v in found.items() if k.endswith(":step")} == {1.0} and load_model(run).step == 1
    for name, gradient in others.items():
        if name.startswith("projectors"):
            assert f"student.{name}:exp_avg" not in found
            continue
        torch.testing.assert_close(found[f"student.{name}:exp_avg"], 0.1 * gradient, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[f"student.{name}:exp_avg_sq"], 1e-3 * gradient.square(), rtol=1e-5, atol=0)

    model = load_model(run, weights="raw").model.requires_grad_(True)
    (model(x, t, labels).v - target).square().mean().backward()
    for name in gradients:
        own = model.get_parameter(name).grad
        torch.testing.assert_close(found[f"student.{name}:exp_avg"], 0.1 * own, atol=1e-7, rtol=1e-3)
        if name != "t_embedder.mlp.0.weight" or not flip:
            torch.testing.assert_close(found[f"student.{name}:exp_avg_sq"], 1e-3 * own.square(), atol=1e-10, rtol=1e-2)
    squares = found["student.t_embedder.mlp.0.weight:exp_avg_sq"]
    assert (squares >= 0).all()  # converted as if frequencies were independent; the sum of each pair is kept
    own = 1e-3 * model.t_embedder.mlp[0].weight.grad.square()
    pairs = [x.unflatten(1, (2, 128)).sum(dim=1) for x in (squares, own)]
    torch.testing.assert_close(*pairs, atol=1e-10, rtol=1e-2)


@pytest.mark.parametrize("damage", ["shape", "count", "missing", "nan", "kind", "step"])
def test_mismatched_optimiser_state_is_dropped(tmp_path, damage):
    named = state(**TINY)
    _, optimizer = published_files.adamw(named, [{k: torch.ones_like(v) for k, v in named.items() if k != "pos_embed"}])
    moments = optimizer["state"][3]
    match damage:
        case "shape":
            moments["exp_avg"] = torch.zeros(2)
        case "count":
            optimizer["param_groups"][0]["params"].pop()
        case "missing":
            del optimizer["state"][3]
        case "nan":
            moments["exp_avg_sq"] = moments["exp_avg_sq"] * float("nan")
        case "kind":
            optimizer["state"] = [1, 2]
        case "step":
            moments["step"] = torch.tensor(float("inf"))
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "opt": optimizer, "steps": 9})
    run, output = run_import(file, tmp_path / "run")
    assert "the optimiser starts from zero: its optimiser state does not match" in output
    assert load_file(toy.checkpoint(run, "vanilla") / "optimizer.safetensors") == {} and load_model(run).step == 9


# ---- continued training


def published_form(run, stage, args):
    """A run in the published layout: its names, order and numbering."""
    found = checkpoint.newest(run / stage / "checkpoints")
    student, ema, heads, moments = (found.tensors(name) for name in ("student", "ema", "heads", "optimizer"))
    order = list(state(**TINY, qk_norm=True, projectors="stage1" if heads else None))
    back = {"projectors.0": "0.0", "projectors.2": "0.2", "projectors.4": "0.4", "projectors_final.linear": "2"}
    positions = state(**TINY)["pos_embed"]

    def named(source, of):
        out = {}
        for name in order:
            layer, _, part = name.rpartition(".")
            key = f"guidances.0.head.{back[layer]}.{part}" if layer in back else f"{of}{name}"
            if name == "pos_embed":
                out[name] = positions
            else:  # with one channel, the order of cells is the same
                out[name] = source[key]
        return out

    objective = {f"student.{k}": v for k, v in student.items()} | heads
    states = {}
    for i, name in enumerate(order):
        layer, _, part = name.rpartition(".")
        key = f"guidances.0.head.{back[layer]}.{part}" if layer in back else f"student.{name}"
        if name != "pos_embed":
            states[i] = {m: moments[f"{key}:{m}"] for m in ("step", "exp_avg", "exp_avg_sq")}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(range(len(order)))}]
    return {
        "model": named(objective, "student."),
        "ema": named({f"student.{k}": v for k, v in ema.items()} | heads, "student."),
        "opt": {"state": states, "param_groups": groups},
        "args": args,
        "steps": found.step,
    }


SETTINGS = {
    "model.patch": 2,
    "train.steps": 6,
    "train.checkpoint_every": 6,
    "train.times": "uniform",
    "train.lr": 1e-3,
    "train.ema": 0.995,
    "stage1.range_mode": "scale",
}


@pytest.mark.parametrize(("method", "stage"), [("vanilla", "vanilla"), ("structure", "stage1")])
def test_run_converted_to_published_layout_and_back_continues_identically(tmp_path, capsys, method, stage):
    """6 steps, or 4 steps, export, import, and 2 steps by the printed command: bit-identical in state and log."""
    settings = SETTINGS | {"method": method, "data.path": str(toy.plain_digits())}
    train(toy.toy(settings), tmp_path / "uninterrupted", quiet=True)
    train(toy.toy(settings | {"train.steps": 4}), tmp_path / "half", quiet=True)
    file = save(
        tmp_path / "0000004.pt",
        published_form(tmp_path / "half", stage, options("repa", encoder_depth=2, t_range=(0.4, 0.7))),
    )
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 0
    printed = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("to train on: "))
    typed = shlex.split(printed.removeprefix("to train on: "))
    assert typed[:4] == ["selftrans", "train", "imagefolder", "--data"]
    typed[typed.index("DIR")] = str(toy.plain_digits())
    own = ["train.", "log."]
    more = [f for f in toy.flags(settings) if any(f.startswith(f"--{o}") for o in own)]
    assert main([*typed[1:], *more]) == 0
    toy.assert_same(toy.tensors(tmp_path / "run", stage), toy.tensors(tmp_path / "uninterrupted", stage))
    last, its = toy.log(tmp_path / "run", stage)[-1], toy.log(tmp_path / "uninterrupted", stage)[-1]
    assert last.pop("tflops") == pytest.approx(its.pop("tflops") / 3), (
        "what the steps before have cost is not known here"
    )
    assert last == its
    assert main([*typed[1:], *more]) == 0  # and again: nothing to do
    kept = json.loads((toy.checkpoint(tmp_path / "run", stage) / "state.json").read_text())
    assert kept["imported"]["path"] == str(file)


@pytest.fixture
def imported(tmp_path):
    """A REPA file of the digits' size as a run."""
    named = state(**TINY, qk_norm=True, projectors="repa")
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "args": options("repa"), "steps": 5})
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_sampling_analysing_and_exporting_an_imported_run(tmp_path, imported, capsys):
    made = tmp_path / "samples"
    assert main(["sample", str(imported), "--out", str(made), "--num", "4", "--steps", "2", "--sampler", "ode"]) == 0
    record = json.loads((made / "samples.json").read_text())
    assert record["settings"]["source"]["imported"]["path"].endswith("a.pt") and len(list(made.rglob("*.png"))) == 4
    words = [
        "analyse",
        str(imported),
        "--out",
        str(tmp_path / "maps"),
        "--data",
        str(toy.plain_digits()),
        "--samples",
        "40",
    ]
    assert main([*words, "--timesteps", "0.4"]) == 0
    assert main(["evaluate", str(made), "--reference", "digits", "--features", "digits"]) == 0
    assert main(["export", str(imported), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("part", ["run", "stage", "file"])
def test_imported_model_can_teach(tmp_path, capsys, imported, part):
    source = {
        "run": imported,
        "stage": imported / "vanilla",
        "file": toy.checkpoint(imported, "vanilla") / "student.safetensors",
    }
    words = [
        "train",
        "digits",
        "--data",
        str(toy.plain_digits()),
        "--out",
        str(tmp_path / "student"),
        "--teacher",
        str(source[part]),
    ]
    assert main([*words, *toy.flags({"train.steps": 2})]) == 0
    kept = json.loads((toy.checkpoint(tmp_path / "student", "stage2") / "state.json").read_text())
    assert kept["teacher"]["imported"]["path"].endswith("a.pt")
    report = json.loads((tmp_path / "student/run.json").read_text())
    assert "what the teacher's training took is unknown" in capsys.readouterr().out
    assert report["teacher"]["steps"] == 5 and [s["stage"] for s in report["stages"]] == ["stage2"]


def test_teacher_of_another_path_is_refused(tmp_path, capsys):
    named = state(**TINY)
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "args": options("sit", path_type="GVP")})
    run, _ = run_import(file, tmp_path / "run")
    words = ["train", "digits", f"--data={toy.plain_digits()}", f"--out={tmp_path / 'student'}", f"--teacher={run}"]
    words += [word for word in toy.taught_flags() if "train.steps" not in word] + ["--train.steps=2"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "was trained on the cosine path, and train.path is linear" in err, err
    assert not list((tmp_path / "student").glob("*.json")), "nothing is written before"
    assert main([*words, "--train.path=cosine"]) == 0
    assert "autoencoder" not in capsys.readouterr().err


def test_teacher_of_another_autoencoder_warns(tmp_path, capsys):
    named = state(**TINY)
    file = save(tmp_path / "a.pt", {"model": named, "ema": named, "args": options("repa")})
    run, _ = run_import(file, tmp_path / "run", autoencoder="example/vae")
    words = ["train", "digits", f"--data={toy.plain_digits()}", f"--out={tmp_path / 'student'}", f"--teacher={run}"]
    words += [word for word in toy.taught_flags() if "train.steps" not in word] + ["--train.steps=2"]
    assert main(words) == 0
    warnings = [text for text in capsys.readouterr().err.splitlines() if "warning: the teacher" in text]
    assert len(warnings) == 1 and "names the autoencoder example/vae, the data pixel" in warnings[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "structure"], "method was vanilla, is structure"),
        (["--model.depth", "4"], "model.depth was 3, is 4"),
        (["--train.path", "cosine"], "train.path was linear, is cosine"),
    ],
)
def test_settings_fixed_by_the_weights_cannot_change(imported, capsys, more, message):
    words = ["train", "imagefolder", "--data", str(toy.plain_digits()), "--out", str(imported), "--method", "vanilla"]
    model = ["--model.width", "32", "--model.depth", "3", "--model.heads", "2", "--model.patch", "2"]
    before = toy.tree(imported)
    assert main([*words, *model, *toy.flags({"train.steps": 9})[5:], *more]) == 1
    assert message in capsys.readouterr().err
    before.pop(".lock", None)
    assert {k: v for k, v in toy.tree(imported).items() if k != ".lock"} == before


def test_other_data_are_refused_in_one_line(tmp_path, imported, capsys):
    data = toy.prepared(tmp_path / "cats")
    words = ["train", "imagefolder", "--data", str(data), "--out", str(imported), "--method", "vanilla"]
    words += [
        "--model.name",
        "SiT-S/2",
        "--model.width",
        "32",
        "--model.depth",
        "3",
        "--model.heads",
        "2",
        "--model.patch",
        "2",
    ]
    assert main([*words, "--train.steps", "9"]) == 1
    assert "was trained on latents (1, 8, 8) with 10 classes, the data are (3, 8, 8) with 2" in capsys.readouterr().err


# ---- invalid files


class Evil:
    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def touch(path):
    return f"touch {shlex.quote(str(path))}"


@pytest.mark.parametrize("where", ["top", "args", "opt", "others"])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "posix.system"), (builtins.eval, "eval"), (builtins.exec, "exec")]
)
def test_code_in_a_file_is_refused_by_name_and_not_run(tmp_path, capsys, where, function, name):
    trap = tmp_path / "trap"
    code = touch(trap) if function is os.system else f"open({str(trap)!r}, 'w')"
    evil, named = Evil(function, code), state(**TINY)
    content = {
        "top": evil,
        "args": {"model": named, "ema": named, "args": argparse.Namespace(x=evil)},
        "opt": {"model": named, "ema": named, "opt": evil},
        "others": {**named, "zzz": evil},
    }[where]
    file = save(tmp_path / "a.pt", content)
    assert main(["import", str(file), "--out", str(tmp_path / "run"), *HEADS]) == 1
    out, err = capsys.readouterr()
    assert f"was refused, without running anything in it: it holds {name}, and only" in err and err.count("\n") == 1, (
        err
    )
    assert not trap.exists() and not (tmp_path / "run").exists() and out == ""
    torch.load(file, weights_only=False)  # the code would run if it were unpickled
    assert trap.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols_run_nothing_either(tmp_path, capsys, protocol):
    trap = tmp_path / "trap"
    torch.save({"ema": Evil(os.system, touch(trap))}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert main(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.count("\n") <= 2 and not trap.exists()


class Custom:
    pass


def test_unknown_class_in_a_file_is_named(tmp_path, capsys):
    file = save(tmp_path / "a.pt", {"ema": state(**TINY), "args": Custom()})
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 1
    assert f"it holds {Custom.__module__}.Custom" in capsys.readouterr().err


def rezipped(file, change):
    """The archive with its records rewritten by `change(name, bytes) -> (bytes, compression)`."""
    with zipfile.ZipFile(file) as source:
        records = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(file, "w") as target:
        for name, data in records.items():
            data, compression = change(name, data)
            target.writestr(zipfile.ZipInfo(name), data, compression)
    return file


def bomb(file):
    def blown(name, data):
        return data + bytes(1 << 24) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED

    return rezipped(file, blown)


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def shortened(file):
    """One record holds fewer values than the pickle claims."""
    return rezipped(file, lambda name, data: (data[:8] if name.endswith("/data/3") else data, zipfile.ZIP_STORED))


def flipped(file):
    """One flipped bit of a weight, as after a bad download."""
    with zipfile.ZipFile(file) as source:
        name = next(name for name in source.namelist() if name.endswith("/data/3"))
        weights = source.read(name)
    content = bytearray(file.read_bytes())
    content[content.index(weights) + 2] ^= 1
    file.write_bytes(content)
    return file


def unpickled(file):
    return rezipped(file, lambda name, data: (data[:-9] if name.endswith("data.pkl") else data, zipfile.ZIP_STORED))


def script(file):
    torch.jit.script(torch.nn.Linear(1, 1)).save(file)
    return file


def stored(content):
    return lambda file: save(file, content)


def written(data):
    def write(file):
        file.write_bytes(data)
        return file

    return write


DAMAGED = {
    "bomb": (bomb, "compressed"),
    "truncated": (truncated, "damaged or not a torch checkpoint"),
    "shortened": (shortened, "other sizes than its index"),
    "flipped": (flipped, "record a/data/3 has a wrong checksum"),
    "unpickled": (unpickled, "damaged or not a torch checkpoint"),
    "script": (script, "compressed|TorchScript|damaged"),
    "empty": (written(b""), "neither a torch checkpoint"),
    "text": (written(b"weights" * 100), "neither a torch checkpoint"),
    "zip of nothing": (written(b"PK\x05\x06" + bytes(18)), "neither|damaged"),
    "zip and garbage": (written(b"PK\x03\x04" + bytes(range(256)) * 9), "damaged"),
    "header of 2^62 bytes": (written((1 << 62).to_bytes(8, "little") + b"{}"), "neither a torch checkpoint"),
    "a list": (stored([1, 2]), "holds a list"),
    "a number": (stored({"ema": {"x": 3}}), "entry x is a int; expected a tensor"),
    "nothing": (stored({}), "no state dict"),
    "no model": (stored({"ema": {}}), "no state dict"),
    "integers": (stored({"x": torch.zeros(3, dtype=torch.long)}), "not a plain floating-point tensor"),
    "sparse": (stored({"x": torch.eye(3).to_sparse()}), "not a plain floating-point tensor"),
    "meta": (stored({"x": torch.empty(3, device="meta")}), "not a plain floating-point tensor"),
    "stretched": (stored({"pos_embed": torch.zeros(1).expand(1, 1 << 20, 1 << 20)}), "tensors claim"),
    "twice": (stored({"x": torch.zeros(1), "module.x": torch.zeros(1)}), "occur twice"),
    "another network": (stored({"conv.weight": torch.zeros(3)}), "is not a SiT: x_embedder.proj.weight"),
    "terminal": (stored({"\x1b[2J\n": torch.zeros(3)}), r"\\x1b\[2J"),
    "absent": (lambda f: f.unlink() if f.exists() else None, "is not a file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_refused_in_one_line_and_writes_nothing(tmp_path, capsys, kind):
    damage, message = DAMAGED[kind]
    out = tmp_path / "there"
    out.mkdir()
    file = save(tmp_path / "a.pt", {"model": state(**TINY), "ema": state(**TINY), "steps": 1})
    damage(file)
    before = toy.tree(tmp_path)
    assert main(["import", str(file), "--out", str(out), *HEADS]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err and str(file) in err, err
    assert re.search(message, err), err
    assert toy.tree(tmp_path) == before and out.is_dir()


# ---- existing files


def test_repeated_import_does_nothing_and_another_is_refused(tmp_path, capsys):
    files = [save(tmp_path / f"{k}.pt", state(**TINY, seed=k)) for k in range(2)]
    words = ["import", str(files[0]), "--out", str(tmp_path / "run"), *HEADS]
    assert main(words) == 0
    before = toy.tree(tmp_path / "run")
    assert main(words) == 0 and "holds this import already" in capsys.readouterr().out
    for other in ([*words, "--convention", "repa"], [words[0], str(files[1]), *words[2:]]):
        assert main(other) == 1 and "exists and is not empty" in capsys.readouterr().err
    assert toy.tree(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run" / "vanilla")
    assert main(words) == 1
    assert "holds this import without its checkpoint; remove it, or choose another --out" in capsys.readouterr().err


def test_existing_run_is_never_overwritten(tmp_path, capsys):
    run = toy.copy(toy.vanilla(), tmp_path / "run")
    before = toy.tree(run)
    file = save(tmp_path / "a.pt", state(**TINY))
    assert main(["import", str(file), "--out", str(run), *HEADS]) == 1
    assert "exists and is not empty" in capsys.readouterr().err and toy.tree(run) == before


def test_full_disk_leaves_no_partial_run(tmp_path, capsys, monkeypatch):
    file = save(tmp_path / "a.pt", state(**TINY))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selftrans.checkpoints.format.save_file", full)
    assert main(["import", str(file), "--out", str(tmp_path / "run"), *HEADS]) == 1
    said = (
        f"{tmp_path / 'run'} could not be written (No space left on device); free disk space or choose another folder"
    )
    assert capsys.readouterr().err == f"selftrans: {said}\n" and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_import_refuses_selftrans_weights(tmp_path, capsys):
    file = toy.checkpoint(toy.vanilla(), "vanilla") / "ema.safetensors"
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 1
    assert "is already a selftrans weights file" in capsys.readouterr().err


def test_unknown_convention_suggests_the_nearest(tmp_path, capsys):
    file = save(tmp_path / "a.pt", state(**TINY))
    assert main(["import", str(file), "--out", str(tmp_path / "run"), "--convention", "reppa"]) == 1
    assert (
        "--convention 'reppa' is unknown" in (err := capsys.readouterr().err) and "repa" in err and err.count("\n") == 1
    )
