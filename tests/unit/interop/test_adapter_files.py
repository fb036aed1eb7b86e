"""Adapters in peft's format: peft loads them onto the base model, and has the model that is sampled."""

import json

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.interop.adapter_files import for_diffusers
from selftrans.interop.exporting import export_run
from selftrans.models import lora
from selftrans.types import Backbone
from tests.support import fine_tuning, toy
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
    assert main(["export", str(run), "--out", str(out), "--adapters"]) == 0  # again, over an earlier export


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


class Holder(Backbone):
    """A transformer of diffusers where the backbones hold it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
        )  # fmt: skip

    def repeated(self):
        return list(self.net.transformer_blocks)


def test_diffusers_loads_the_adapters_of_its_own_transformers(tmp_path):
    holder, plain = Holder().eval(), Holder().eval()
    lora.add_adapters(holder, 3, 0.5)
    for parameter in holder.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([100.0, 700.0]),
    }
    trained = {name: p.detach() for name, p in holder.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in trained} == {"attn", "ff", "ff_context"}  # no layer of the conditioning
    save_file(for_diffusers(trained, 0.5), tmp_path / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        before = plain.net(**given).sample
        plain.net.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        expected, found = holder.net(**given).sample, plain.net(**given).sample
    assert (found - expected).abs().max() < 1e-5 and (found - before).abs().max() > 1e-2
    with pytest.raises(ValueError, match="this model is no transformer of diffusers"):
        for_diffusers({"blocks.0.fc.lora_A.default.weight": torch.zeros(1, 1)}, 1.0)
