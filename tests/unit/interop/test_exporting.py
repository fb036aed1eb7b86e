"""A run's weights in one file, in selftrans's layout or in a published one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from selftrans.checkpoints.load import EXPORTED, find, load_model
from selftrans.cli.main import main
from selftrans.interop.exporting import export_run
from selftrans.interop.importing import import_run
from selftrans.storage import directory_lock, temporary_for
from tests.support import published_files, toy
from tests.support.published_files import TINY, Assembled, options, state
from tests.support.toy import quick  # noqa: F401 - a fixture

quiet = {"say": lambda _: None}


SCALED = "pixel(shift=0.5,scale=2.0)"  #: not what is assumed of one channel


def a_run(tmp_path, *, qk_norm=False, **more):
    """A run with random weights, different for raw and ema."""
    raw, ema = (state(**TINY | more, qk_norm=qk_norm, seed=k) for k in (1, 2))
    file = published_files.save(tmp_path / "a.pt", {"model": raw, "ema": ema, "args": options("repa"), "steps": 4})
    import_run(file, tmp_path / "run", heads=2, autoencoder=SCALED, **quiet)
    return tmp_path / "run", raw, ema


def inputs(classes=10, channels=1):
    g = torch.Generator().manual_seed(5)
    return torch.randn(5, channels, 8, 8, generator=g), torch.linspace(0, 1, 5), torch.tensor([0, 3, classes, 1, 9])


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_selftrans_layout_is_accepted_in_place_of_a_run(tmp_path, capsys, weights):
    run, out = toy.finished(), tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--weights", weights]) == 0
    assert [p.name for p in sorted(out.iterdir())] == ["config.json", "model.safetensors"]
    file = out / "model.safetensors"
    made, was = load_model(file), load_model(run, weights=weights)
    toy.assert_same(made.model.state_dict(), was.model.state_dict())
    assert (
        made._replace(model=None, source={}) == was._replace(model=None, source={})
        and made.source["weights"] == was.source["weights"]
        and made.weights == weights
    )
    assert not [name for name in load_file(file) if "head" in name or "guidance" in name]
    assert json.loads((out / "config.json").read_text())["config"]["model"]["width"] == 32
    for place in (file, out):
        made = tmp_path / f"made by {place.name}"
        assert main(["sample", str(place), "--out", str(made), "--num", "2", "--steps", "1", "--sampler", "ode"]) == 0


def test_exported_stages_can_teach_and_stage_2_with_a_warning(tmp_path, capsys):
    for stage, said in (("stage1", False), ("stage2", True)):
        out = tmp_path / stage
        assert main(["export", str(toy.finished()), "--out", str(out), "--weights", "raw", "--stage", stage]) == 0
        words = ["train", "digits", "--data", str(toy.digits()), "--out", str(tmp_path / f"by-{stage}")]
        assert main([*words, "--teacher", str(out), *toy.flags({"train.steps": 2})]) == 0
        assert ("was trained in stage2, not in stage1" in capsys.readouterr().err) == said


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("layout", "qk_norm"), [("repa", False), ("repa", True), ("sit", False)])
def test_published_layout_is_the_same_network_in_its_convention(tmp_path, layout, qk_norm, channels):
    """The exported file, loaded by name into a network assembled from parts of diffusers."""
    run, _, _ = a_run(tmp_path, qk_norm=qk_norm, channels=channels)
    file = export_run(run, tmp_path / "out", layout=layout)
    network = Assembled(load_file(file), **TINY | {"channels": channels})
    x, t, labels = inputs(channels=channels)
    with torch.no_grad():
        expected = load_model(run).model(x, t, labels).v
        found = -network(x, 1 - t, labels) if layout == "sit" else network(x, t, labels)
    assert (expected - found).abs().max() < 1e-5 < expected.abs().max()
    described = json.loads((tmp_path / "out/config.json").read_text())
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": channels, "hidden_size": 32, "depth": 3, "num_heads": 2}
    assert sizes.items() <= described["arguments"].items() and described["arguments"]["num_classes"] == 10
    assert (
        described["time"].startswith("t = 0 is noise" if layout == "sit" else "t = 0 is data")
        and described["step"] == 4
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_repa_import_and_export_are_inverse(tmp_path, qk_norm):
    run, raw, ema = a_run(tmp_path, qk_norm=qk_norm)
    for weights, named in (("raw", raw), ("ema", ema)):
        found = load_file(export_run(run, tmp_path / weights, weights=weights, layout="repa"))
        assert sorted(found) == sorted(named)
        assert torch.allclose(found.pop("pos_embed"), named["pos_embed"], atol=1e-6)
        toy.assert_same(found, {name: named[name] for name in found})


@pytest.mark.parametrize("layout", ["repa", "sit"])
def test_export_and_import_are_inverse(tmp_path, layout):
    """Bit-identical, except for the time layer, which is equal up to rounding."""
    run, _, _ = a_run(tmp_path)
    file, lines = export_run(run, tmp_path / "out", layout=layout), []
    import_run(file, tmp_path / "back", heads=2, say=lines.append)
    assert f"those of {layout.upper()}, from its header" in lines[0]
    loaded = [load_model(place) for place in (run, tmp_path / "back")]
    assert loaded[0].autoencoder == loaded[1].autoencoder == SCALED
    was, now = (each.model.state_dict() for each in loaded)
    turned = "t_embedder.mlp.0.weight"
    assert (was[turned] - now[turned]).abs().max() < (1e-9 if layout == "repa" else 2e-7)
    for tensors in (was, now):
        tensors.pop(turned)
    toy.assert_same(was, now)
    x, t, labels = inputs()
    with torch.no_grad():
        a, b = (load_model(place).model(x, t, labels).v for place in (run, tmp_path / "back"))
    assert (a - b).abs().max() < 1e-5


def test_published_layout_is_not_accepted_as_a_run(tmp_path):
    run, _, _ = a_run(tmp_path)
    file = export_run(run, tmp_path / "out", layout="repa")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"layout": "repa", "autoencoder": "pixel(shift=0.5,scale=2.0)", "format": "pt"}
    with pytest.raises(ValueError, match="no entry 'selftrans' in its header"):
        load_model(file)
    assert file.stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666


def test_sit_layout_refuses_qk_norm(tmp_path, capsys):
    assert main(["export", str(toy.finished()), "--out", str(tmp_path / "out"), "--layout", "sit"]) == 1
    assert "QK-norm, which the original SiT lacks" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["export"], ["export", "--layout", "pipeline"], ["push", "me/digits", "--license", "mit", "--dry-run"]]
)
def test_weights_of_another_stage_are_refused(tmp_path, capsys, words):
    command, *options = words
    file = str(find(toy.finished()))
    assert main([command, file, *options, "--out", str(tmp_path / "out"), "--stage", "stage1"]) == 1
    assert "holds weights of stage2, not of stage1" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_export_replaces_only_an_earlier_export(tmp_path, capsys):
    out = tmp_path / "out"
    for weights in ("ema", "raw"):
        assert main(["export", str(toy.vanilla()), "--out", str(out), "--weights", weights]) == 0
        toy.assert_same(
            load_file(out / "model.safetensors"), load_model(toy.vanilla(), weights=weights).model.state_dict()
        )
    run = toy.copy(toy.vanilla(), tmp_path / "run")
    before = toy.tree(run)
    assert main(["export", str(run), "--out", str(run)]) == 1
    assert "exists and is not an export" in capsys.readouterr().err and toy.tree(run) == before
    before = toy.tree(out)
    assert main(["export", str(tmp_path / "absent"), "--out", str(out)]) == 1
    assert "does not exist" in capsys.readouterr().err and toy.tree(out) == before


def refuse_as_full(path, *_, **__):
    raise ValueError(f"{path} cannot be written (No space left on device); free disk space or choose another folder")


def test_full_disk_leaves_no_folder_and_keeps_an_earlier_export(tmp_path, capsys, monkeypatch):
    run, earlier, new = str(toy.vanilla()), tmp_path / "earlier", tmp_path / "a" / "new"
    export_run(str(toy.finished()), earlier)
    before = toy.tree(earlier)
    capsys.readouterr()
    for name in ("checkpoints.format.write_tensors", "interop.exporting.sync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"selftrans.{name}", refuse_as_full)
            assert main(["export", run, "--out", str(new)]) == 1
            assert main(["export", run, "--out", str(earlier)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"selftrans: {new}/") and said.count("No space left on device") == said.count("\n") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["earlier"] and toy.tree(earlier) == before


def test_what_a_killed_export_left_is_removed_unless_another_one_runs(tmp_path):
    out, run = tmp_path / "out", str(toy.finished())
    export_run(run, out)
    whole = toy.tree(out)
    left = temporary_for(out / EXPORTED)
    left.write_text("of a killed process")
    with directory_lock(out):
        export_run(run, out)
    assert left.exists()
    export_run(run, out)
    assert toy.tree(out) == whole


def test_autoencoder_that_is_not_on_this_machine_is_named_by_import(tmp_path):
    run, _, _ = a_run(tmp_path)
    file = export_run(run, tmp_path / "out", layout="repa")
    vae = tmp_path / "vae"
    save_file(load_file(file), file, {"layout": "repa", "autoencoder": str(vae), "format": "pt"})
    with pytest.raises(ValueError, match="/vae, which is not on this machine; give --autoencoder"):
        import_run(file, tmp_path / "back", heads=2, **quiet)
    assert not (tmp_path / "back").exists()
    import_run(file, tmp_path / "back", heads=2, autoencoder=SCALED, **quiet)
    assert load_model(tmp_path / "back").autoencoder == SCALED
