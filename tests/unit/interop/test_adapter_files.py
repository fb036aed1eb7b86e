"""Adapters in peft's format: peft loads them onto the base model, and has the model that is sampled."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from selftrans.checkpoints.load import find, load_model
from selftrans.cli.main import main
from selftrans.interop.adapter_files import for_diffusers
from selftrans.interop.exporting import export_run
from selftrans.models import lora
from tests.support import diffusers_models, fine_tuning, toy
from tests.support.toy import quick  # noqa: F401 - a fixture


def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 8, 8, generator=g), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])


def test_peft_loads_the_exported_adapters(tmp_path, capsys):
    run, out = fine_tuning.adapted(), tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--adapters"]) == 0
    assert "adapters of the ema weights, layout peft" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base, expected = load_model(run / "init.safetensors").model, load_model(run).model
    loaded = peft.PeftModel.from_pretrained(base, out)
    with torch.no_grad():
        found = loaded.base_model.model(*inputs()).v
        assert (found - expected(*inputs()).v).abs().max() < 1e-5
        assert (found - load_model(run / "init.safetensors").model(*inputs()).v).abs().max() > 1e-3
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4) and len(settings["target_modules"]) == 12
    assert settings["modules_to_save"] == ["y_embedder.embedding_table"]
    (out / "pytorch_lora_weights.safetensors").write_bytes(b"of an earlier export in diffusers' layout")
    assert main(["export", str(run), "--out", str(out), "--adapters"]) == 0  # again, over an earlier export
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_export_merges_by_default(tmp_path):
    run = fine_tuning.adapted()
    file = export_run(run, tmp_path / "out")
    toy.assert_same(load_file(file), dict(load_model(run).model.state_dict()))
    made, was = load_model(tmp_path / "out"), load_model(run)
    toy.assert_same(made.model.state_dict(), was.model.state_dict())
    assert made.classes == was.classes == fine_tuning.SECOND
    export_run(run, tmp_path / "repa", layout="repa")  # published layouts hold the merged weights, too


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        (fine_tuning.first, ["--adapters"], "holds a complete model, no adapters; leave out --adapters"),
        (fine_tuning.adapted, ["--adapters", "--layout", "sit"], "adapters have no layout 'sit'"),
        (fine_tuning.adapted, ["--adapters", "--layout", "diffusers"], "embedding_table.weight was trained in full"),
    ],
)
def test_wrong_exports_are_refused(tmp_path, capsys, run, more, message):
    assert main(["export", str(run()), "--out", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("x")
    assert main(["export", str(fine_tuning.adapted()), "--out", str(tmp_path / "full"), "--adapters"]) == 1
    assert "is not an export of adapters" in capsys.readouterr().err


def test_what_a_weights_file_does_not_hold(tmp_path, capsys):
    file = str(find(fine_tuning.adapted()))
    assert main(["export", file, "--out", str(tmp_path / "stage"), "--adapters", "--stage", "stage7"]) == 1
    assert "not of stage7" in capsys.readouterr().err and not (tmp_path / "stage").exists()
    assert main(["export", file, "--out", str(tmp_path / "raw"), "--adapters", "--weights", "raw"]) == 0
    assert "holds the moving average alone (ema), which is used" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_diffusers_loads_the_adapters_of_its_own_transformers(tmp_path, family):
    adapted, plain = diffusers_models.tiny(family).eval(), diffusers_models.tiny(family).eval()
    lora.add_adapters(adapted, 3, 0.5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    trained = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    save_file(for_diffusers(trained, 0.5), tmp_path / "pytorch_lora_weights.safetensors")
    given = diffusers_models.inputs(plain, family)
    with torch.no_grad():
        before = plain(*given).v
        plain.net.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        expected, found = adapted(*given).v, plain(*given).v
    assert (found - expected).abs().max() < 1e-5 and (found - before).abs().max() > 1e-2


def test_layout_of_diffusers_needs_a_transformer_of_diffusers():
    with pytest.raises(ValueError, match="this model is no transformer of diffusers; use --layout peft"):
        for_diffusers({"blocks.0.fc.lora_A.default.weight": torch.zeros(1, 1)}, 1.0)
