"""Runs that start from given weights: what is kept, that every stage starts there, and that nothing else is read again."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.data.dataset import Dataset
from selftrans.fine_tuning import Init
from selftrans.interop.importing import import_run
from selftrans.train.given_weights import read_given
from selftrans.train.initial_weights import resolve_init
from selftrans.train.run import train
from selftrans.train.signals import Interrupted, StopSignal
from selftrans.train.trainer import Trainer
from tests.support import captioned, fine_tuning, published_files, toy
from tests.support.fine_tuning import FIRST, SECOND, data, first, tuned
from tests.support.published_files import TINY, options, state
from tests.support.toy import quick  # noqa: F401 - a fixture

TABLE = "y_embedder.embedding_table.weight"
BOTH = {"method": "self_transcendence", "stage1.steps": 2, "stage2.until_step": 3}


def report(run):
    return json.loads((run / "run.json").read_text())


def starts(monkeypatch):
    """Name of each stage -> copies of student and average before its first step."""
    seen = {}
    original = Trainer.train_step

    def step(self, *args):
        models = (self.objective.student, self.ema.model)
        if self.step == 0:
            seen[self.stage.name] = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
        return original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", step)
    return seen


def test_rows_of_equal_class_names_and_all_that_fits_are_kept(tmp_path, monkeypatch, capsys):
    source = load_model(first()).model.state_dict()
    seen = starts(monkeypatch)
    train(tuned(BOTH), tmp_path)
    written = load_file(tmp_path / "init.safetensors")
    for name, tensor in written.items():
        if name != TABLE:
            assert torch.equal(tensor, source[name]), name
    table, old = written[TABLE], source[TABLE]  # dog, fox, null; cat, dog, eel, null
    assert torch.equal(table[0], old[1]) and torch.equal(table[2], old[3])
    assert not (table[1] == old).all(dim=1).any() and 0 < table[1].abs().max() < 0.2  # N(0, 0.02²), as from scratch
    assert list(seen) == ["stage1", "stage2"]
    for models in seen.values():
        for model in models:
            toy.assert_same(model, written)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"kept {len(written) - 1} of {len(written)} tensors; 1 ({TABLE}): 3 -> 2 classes, 1 of them kept by name"
        in said
    )
    found = report(tmp_path)["init"]
    assert (
        found["path"] == str(load_model(first()).source["path"])
        and found["sha256"] == load_model(first()).source["sha256"]
    )
    assert (found["kept"], found["tensors"], found["new_rows"]) == (len(written) - 1, len(written), [TABLE])
    assert found["classes"] == {"before": 3, "now": 2, "kept": 1} and found["weights"] == "ema"
    assert json.loads((tmp_path / "config.json").read_text())["init"]["path"] == str(first())
    assert load_model(tmp_path / "init.safetensors").classes == SECOND  # a complete weights file of the new model


def test_raw_weights_and_equal_classes(tmp_path):
    train(tuned({"data.path": str(data(FIRST)), "init.weights": "raw", "train.steps": 1}), tmp_path, quiet=True)
    toy.assert_same(
        load_file(tmp_path / "init.safetensors"), dict(load_model(first(), weights="raw").model.state_dict())
    )
    assert report(tmp_path)["init"]["new_rows"] == []


def test_larger_latents_keep_everything_and_other_channels_do_not(tmp_path, capsys):
    train(tuned({"data.path": str(data(SECOND, side=16)), "train.steps": 1}), tmp_path / "larger")
    assert "latents 3x8x8 -> 3x16x16" in capsys.readouterr().out and report(tmp_path / "larger")["init"]["new"] == []
    train(tuned({"data.path": str(toy.digits()), "train.steps": 1}), tmp_path / "grey", quiet=True)
    new = ["x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"]
    assert report(tmp_path / "grey")["init"]["new"] == new
    assert load_model(tmp_path / "grey").model.shape == (1, 8, 8)


@pytest.mark.parametrize("lora", [{}, {"lora.rank": 2, "train.precision": "bf16", "train.recompute": True}])
def test_stopped_at_every_step_without_the_given_run(tmp_path, monkeypatch, lora):
    """Uninterrupted = stopped at every step, with the run that it started from removed after the first."""
    source = toy.copy(first(), tmp_path / "source")
    config = tuned(BOTH | lora | {"train.preview_every": 2}, init=source)
    train(config, uninterrupted := tmp_path / "uninterrupted", quiet=True)
    monkeypatch.setattr(StopSignal, "asked", lambda self, accelerator: True)
    for _ in range(1 + 3):
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", quiet=True)
        shutil.rmtree(source, ignore_errors=True)
    train(config, tmp_path / "run", quiet=True)
    toy.assert_same_run(tmp_path / "run", uninterrupted)
    found = [report(run)["init"] for run in (tmp_path / "run", uninterrupted)]
    assert found[0] == found[1]


def test_run_killed_before_its_settings_are_written_begins_again(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("selftrans.train.run.record", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tuned(init=first() / "vanilla"), tmp_path, quiet=True)
    assert (tmp_path / "init.safetensors").exists()
    monkeypatch.undo()
    train(tuned({"train.steps": 1}), tmp_path, quiet=True)  # from another path: nothing was trained yet
    assert report(tmp_path)["init"]["path"].startswith(str(first()))


def test_full_run_needs_no_initial_weights_once_a_stage_has_a_checkpoint(tmp_path):
    train(tuned({"train.steps": 2}), tmp_path, quiet=True)
    (tmp_path / "init.safetensors").unlink()
    train(tuned({"train.steps": 3}), tmp_path, quiet=True)
    assert report(tmp_path)["student_steps"] == 3 and report(tmp_path)["init"]["kept"]


def test_published_file_starts_a_run_as_its_import_does(tmp_path, capsys):
    raw, ema = (state(**TINY, seed=k) for k in (1, 2))
    file = published_files.save(tmp_path / "a.pt", {"model": raw, "ema": ema, "args": options("repa"), "steps": 4})
    grey = {"data.path": str(toy.digits()), "train.steps": 1}
    with pytest.raises(ValueError, match=r"width 32, not a published size; set its number .* with --init.heads"):
        train(tuned(grey, init=file), tmp_path / "run")
    train(tuned(grey | {"init.heads": 2}, init=file), tmp_path / "run")
    said = capsys.readouterr().out
    assert "a.pt (ema weights, step 4; model SiT-S/2, width 32, depth 3, heads 2, patch 2" in said
    assert "; time and sign: repa, from its stored options)" in said
    import_run(file, tmp_path / "imported", heads=2, say=lambda _: None)
    expected = dict(load_model(tmp_path / "imported").model.state_dict())
    toy.assert_same(load_file(tmp_path / "run/init.safetensors"), expected)  # ten classes without names: the same ten
    assert report(tmp_path / "run")["init"]["new_rows"] == []
    train(tuned({"train.steps": 1}, init=tmp_path / "imported"), tmp_path / "other", quiet=True)
    assert report(tmp_path / "other")["init"]["classes"] == {"before": 10, "now": 2, "kept": 0}


@pytest.mark.parametrize("convention", ["repa", "sit"])
def test_convention_of_a_plain_state_dict_can_be_given(tmp_path, convention):
    file = tmp_path / "a.safetensors"
    save_file(state(**TINY), file)
    found = [
        read_given(Init(path=str(file), convention=convention, heads=2)).tensors["t_embedder.mlp.0.weight"],
        import_run(file, tmp_path / "imported", convention=convention, heads=2, say=lambda _: None),
    ]
    assert torch.equal(found[0], load_file(found[1] / "ema.safetensors")["t_embedder.mlp.0.weight"])


def test_null_of_text_is_that_of_the_data(tmp_path, capsys):
    """Adapters on a model of text, for captions of another encoder of the same width with another empty caption."""
    base = captioned.config({"method": "vanilla", "train.steps": 1})
    train(base, tmp_path / "base", quiet=True)
    encoder = captioned.save_text_encoder(tmp_path / "encoder", seed=1)
    path = captioned.prepared(tmp_path / "other", encoder=encoder)
    given = {
        "init.path": str(tmp_path / "base"),
        "lora.rank": 2,
        "data.path": str(path),
        "train.steps": 2,
        "stage1.steps": 1,
    }
    with pytest.warns(UserWarning, match=r"were trained on text of the encoder .* the data have text of .*encoder"):
        train(captioned.config(given), tmp_path / "run")
    assert "text of 12x16 by" in capsys.readouterr().out
    null = Dataset.open(str(path)).null()
    for file in ("init.safetensors", "stage2"):
        model = load_model(tmp_path / "run" / file).model
        found = model.null(null)
        assert torch.equal(found["text"], null["text"]) and torch.equal(found["mask"], null["mask"])
    before = load_model(tmp_path / "base").model
    assert not torch.equal(before.null(null)["text"], null["text"])
    assert report(tmp_path / "run")["init"]["new"] == [] == report(tmp_path / "run")["init"]["new_rows"]


def test_settings_of_the_model_are_those_of_the_weights(tmp_path):
    assert tuned().model.width == 64  # the recipe's
    config, given = resolve_init(tuned(), None, tmp_path)
    assert (config.model.width, config.model.depth, config.model.heads) == (32, 3, 2) and given.classes == FIRST
    assert resolve_init(tuned({"model.depth": 3}), None, tmp_path)[0] == config


WRONG = {
    "missing": ({}, "no-such-run", "no-such-run does not exist; expected a run directory"),
    "width": ({"model.width": 48}, None, r"model.width is 48, but the weights .* are those of a model of width 32"),
    "depth": ({"model.depth": 5}, None, "model.depth is 5, but"),
    "family": ({"model.name": "LightningDiT-B/1"}, None, "model.name is LightningDiT-B/1, but"),
    "path": (
        {"train.path": "cosine"},
        None,
        "trained on the linear path, and train.path is cosine.*--train.path linear",
    ),
    "stage": ({"init.stage": "stage1"}, None, "has no stage1: it holds vanilla"),
    "rank 0": ({"lora.rank": 0}, None, "lora.rank must be above zero, not 0"),
    "negative rank": ({"lora.rank": -3}, None, "lora.rank must be above zero, not -3"),
    "rank too large": ({"lora.rank": 100}, None, "lora.rank 100 is more than the 32 of the largest layer"),
    "alpha": ({"lora.rank": 1, "lora.alpha": -1.0}, None, "lora.alpha must be above zero"),
    "targets": (
        {"lora.rank": 1, "lora.targets": ("to_q",)},
        None,
        "'to_q' matches no linear layer; there are .*attn.qkv",
    ),
    "sharded": ({"lora.rank": 1, "train.shard": True}, None, "train.shard does not go with lora.rank"),
    "nothing to adapt": ({"lora.rank": 1, "init.path": None}, None, "lora.rank 1 needs weights to adapt; give --init"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, kind):
    dotted, init, message = WRONG[kind]
    with pytest.raises(ValueError, match=message) as caught:
        train(tuned(dotted, init=init) if init else tuned(dotted), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "run").glob("*") if path.suffix in (".json", ".safetensors")]


def test_weights_of_labels_do_not_start_a_run_on_text(tmp_path):
    settings = tuned({"data.path": str(captioned.prepared(tmp_path / "data")), "train.steps": 1})
    with pytest.raises(
        ValueError, match=r"of a model of 3 classes, the data have text of .*; give weights of a model of text"
    ):
        train(settings, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    bad = state(**TINY, qk_norm=True)
    bad["blocks.1.mlp.fc1.bias"][0] = np.nan
    file = published_files.save(tmp_path / "a.pt", {"model": bad, "ema": bad, "args": options("repa")})
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.bias holds values that are not finite"):
        train(tuned(init=file), tmp_path / "run", quiet=True)


def test_other_initial_weights_are_refused_when_a_run_continues(tmp_path, capsys):
    train(tuned({"train.steps": 1}), tmp_path / "run", quiet=True)
    other = toy.copy(first(), tmp_path / "other")
    for given, was in ((str(other), "is .*other"), (None, "is None")):
        with pytest.raises(ValueError, match=f"started with other settings: init.path was [^;]*, {was}; use those"):
            train(tuned({"train.steps": 2, "init.path": given}), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"lora.rank was None, is 2"):
        train(tuned({"train.steps": 2, "lora.rank": 2}), tmp_path / "run", quiet=True)
    raw = state(**TINY)
    file = published_files.save(tmp_path / "a.pt", {"model": raw, "ema": raw, "args": options("repa")})
    import_run(file, tmp_path / "imported", heads=2, say=lambda _: None)
    with pytest.raises(ValueError, match="holds imported weights, from which it starts; leave out --init"):
        train(tuned({"data.path": str(toy.digits())}), tmp_path / "imported", quiet=True)


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_damaged_initial_weights_of_adapters_are_named(tmp_path, damage):
    run = toy.copy(fine_tuning.adapted(), tmp_path / "run")
    file = run / "init.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink() if damage == "removed" else file.write_bytes(content)
    with pytest.raises(ValueError, match=r"holds adapters alone, .* is not that file; give the run"):
        load_model(run)
    settings = BOTH | {"lora.rank": 2, "lora.alpha": 4.0, "train.steps": 5}
    with pytest.raises(ValueError, match=r"init.safetensors is missing or damaged"):
        train(tuned(settings), run, quiet=True)


def test_command_line(tmp_path, capsys):
    words = ["train", "digits", "--data", str(data(SECOND)), "--out", str(tmp_path / "run"), "--init", str(first())]
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in fine_tuning.TUNED.items() if not k.startswith("stage")]
    assert main([*words, *flags, "--lora.rank", "2", "--lora.targets", "qkv", "fc1", "--init.stage", "vanilla"]) == 0
    assert "M trained)" in (said := capsys.readouterr().out) and "memory without activations" in said
    names = load_file(toy.checkpoint(tmp_path / "run", "vanilla") / "student.safetensors")
    assert {n.split(".lora")[0].split(".", 2)[-1] for n in names if "lora" in n} == {"attn.qkv", "mlp.fc1"}
    again = ["train", "digits", "--out", str(tmp_path / "again"), *toy.flags({"method": "vanilla", "train.steps": 1})]
    assert main([*again, "--lora.alpha", "2", "--init.weights", "raw"]) == 0
    said = capsys.readouterr().err
    assert "init.weights is ignored: without --init" in said and "lora.alpha is ignored: without lora.rank" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.width=64"], "model.width is 64, but the weights .* are those of a model of width 32"),
        (["--model.depth", "6"], "model.depth is 6, but"),
        (["--model.qk-norm=False"], "model.qk_norm is False, but .* of qk_norm True"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_typed_options_count_also_where_they_are_the_defaults_of_the_recipe(tmp_path, capsys, command, words, message):
    """The same settings, if not typed, are replaced by those of the weights."""
    own = ["--methods=vanilla", "--features=values"] if command == "compare" else ["--method=vanilla"]
    begin = [command, "digits", "--data", str(data(SECOND)), "--out", str(tmp_path / "run"), *own]
    assert main([*begin, "--init" if command == "train" else "--init.path", str(first()), *words]) == 1
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1, err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_run_is_continued_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(first().parent)
    one = tuned({"train.steps": 1}, init=first().name)  # a relative path
    train(one, tmp_path / "run", quiet=True)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["init"]["path"] == str(first().resolve())
    stored["init"]["path"] = first().name  # as older versions kept it
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
    assert train(tuned({"train.steps": 2}, init=first().name), tmp_path / "old", quiet=True)["student_steps"] == 2
    monkeypatch.chdir(tmp_path)
    elsewhere = os.path.relpath(first(), tmp_path)
    assert train(tuned({"train.steps": 2}, init=elsewhere), tmp_path / "run", quiet=True)["student_steps"] == 2
