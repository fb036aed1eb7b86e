"""Checkpoints of adapters: their size, the full model that they stand for, and files that do not belong together."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from selftrans.checkpoints import format as checkpoint
from selftrans.checkpoints.adapted import full_weights
from selftrans.checkpoints.load import load_model
from selftrans.config import from_json
from selftrans.train.run import train
from tests.support import fine_tuning, toy
from tests.support.toy import quick  # noqa: F401 - a fixture

TABLE = "y_embedder.embedding_table.weight"


def test_checkpoint_holds_what_is_trained():
    run = fine_tuning.adapted()
    base = load_file(run / "init.safetensors")
    width, depth, rank = 32, 3, 2
    layers = {"attn.qkv": 3 * width, "attn.proj": width, "mlp.fc1": 4 * width, "mlp.fc2": width}
    inner = {"mlp.fc2": 4 * width}
    expected = {
        f"blocks.{k}.{layer}.lora_{side}.default.weight": (rank, inner.get(layer, width))
        if side == "A"
        else (out, rank)
        for k in range(depth)
        for layer, out in layers.items()
        for side in "AB"
    } | {TABLE: (3, width)}
    for stage in ("stage1", "stage2"):
        folder = toy.checkpoint(run, stage)
        for file in ("student", "ema"):
            held = load_file(folder / f"{file}.safetensors")
            assert {name: tuple(tensor.shape) for name, tensor in held.items()} == expected
        moments = [name for name in load_file(folder / "optimizer.safetensors") if name.startswith("student.")]
        assert len(moments) == 3 * len(expected)
    count = sum(a * b for a, b in expected.values())
    stages = json.loads((run / "run.json").read_text())["stages"]
    for stage in stages:
        memory = stage["memory"]
        heads = memory["gradients"] - 4 * count
        assert heads > 0 and memory["optimizer"] == 2 * memory["gradients"]
        frozen = 4 * sum(tensor.numel() for name, tensor in base.items() if name != TABLE)
        constants = 4 * (16 * width + 128)  # positions of 16 tokens, rates of the time embedding
        assert memory["weights"] == frozen + 4 * count + heads + constants
        assert memory["average"] == 4 * count + constants
    assert "teacher" not in stages[0]["memory"]
    assert 0 < stages[1]["memory"]["teacher"] < frozen + constants + 4 * 3 * width  # truncated


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_loaded_model_equals_base_plus_adapters(weights):
    run = fine_tuning.adapted()
    base, found = load_file(run / "init.safetensors"), load_model(run, weights=weights).model.state_dict()
    held = load_file(toy.checkpoint(run) / ("ema.safetensors" if weights == "ema" else "student.safetensors"))
    for name, tensor in found.items():
        layer = name.removesuffix(".weight")
        a, b = (held.get(f"{layer}.lora_{side}.default.weight") for side in "AB")
        expected = held.get(name, base[name]).double()
        if a is not None:
            expected = expected + 4.0 / 2 * b.double() @ a.double()
            assert not torch.equal(tensor, base[name])
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_merged_model_is_the_one_that_was_trained(tmp_path, monkeypatch):
    from selftrans.train.trainer import Trainer

    last = {}
    original = Trainer.train_step

    def step(self, *args):
        original(self, *args)
        last["average"] = self.ema.model

    monkeypatch.setattr(Trainer, "train_step", step)
    train(fine_tuning.tuned({"lora.rank": 4, "train.steps": 3}), tmp_path, quiet=True)
    x, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected, found = last["average"](x, t, labels).v, load_model(tmp_path).model(x, t, labels).v
        start = load_model(tmp_path / "init.safetensors").model(x, t, labels).v
    assert (found - expected).abs().max() < 1e-5 and (found - start).abs().max() > 1e-3


def test_hash_of_equal_adapters_differs_on_other_frozen_weights(tmp_path):
    run = fine_tuning.adapted()
    one, other = load_model(run, stage="stage1"), load_model(run)
    assert one.source["weights"] != other.source["weights"]
    assert other.source["weights"] != checkpoint.weights_sha256(toy.checkpoint(run) / "ema.safetensors")


def test_file_without_its_run_and_damaged_headers_are_named(tmp_path):
    file = toy.checkpoint(fine_tuning.adapted()) / "ema.safetensors"
    shutil.copy(file, tmp_path / "ema.safetensors")
    with pytest.raises(
        ValueError, match=r"holds adapters alone, .*; give the run, or what `selftrans export` makes of it"
    ):
        load_model(tmp_path / "ema.safetensors")
    header, named = checkpoint.read_header(file), load_file(file)
    for adapters in ({}, None, [1]):
        save_file(
            named, tmp_path / "b.safetensors", metadata={checkpoint.KEY: json.dumps(header | {"adapters": adapters})}
        )
        with pytest.raises(ValueError, match="does not say which weights its adapters belong to"):
            load_model(tmp_path / "b.safetensors")
    config = from_json(json.dumps(header["config"]))
    base = fine_tuning.adapted() / "init.safetensors"
    with pytest.raises(ValueError, match=r"its settings have no lora.rank"):
        full_weights(file, base, config.override({"lora.rank": None}))
    save_file(named | {TABLE: torch.zeros(9, 9)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c.safetensors cannot be used: .*embedding_table.* does not belong"):
        full_weights(tmp_path / "c.safetensors", base, config)


def test_run_with_adapters_is_accepted_by_every_command_that_takes_a_run(tmp_path):
    """As the weights that another run starts from, and as its teacher."""
    given, config = fine_tuning.adapted(), fine_tuning.tuned({"train.steps": 1}, init=fine_tuning.adapted())
    train(config, tmp_path / "again", quiet=True)
    toy.assert_same(load_file(tmp_path / "again/init.safetensors"), dict(load_model(given).model.state_dict()))
    taught = {"method": "self_transcendence", "stage2.teacher": str(given), "train.steps": 1}
    train(fine_tuning.tuned(taught), tmp_path / "taught", quiet=True)
    state = json.loads((toy.checkpoint(tmp_path / "taught") / "state.json").read_text())
    expected = load_model(given, stage="stage1", weights="raw").source
    assert state["teacher"]["weights"] == expected["weights"] and state["teacher"]["path"] == expected["path"]
