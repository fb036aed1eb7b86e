"""Products in eight bits: which layers, with what settings, and what is refused. torchao is replaced where it is absent."""

import dataclasses
import sys
import types

import pytest
import torch

from selftrans.config import RunConfig, Train
from selftrans.fine_tuning import Init, Lora
from selftrans.models.routing import Route
from selftrans.train import fp8
from tests.support.label_models import inputs, tiny

CPU = torch.device("cpu")
LAYERS = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@dataclasses.dataclass(frozen=True)
class Settings:
    recipe: str
    emulate: bool = False

    @classmethod
    def from_recipe_name(cls, name):
        return cls(name)


@pytest.fixture
def converted(monkeypatch):
    """Stands in for torchao, and keeps the arguments of its calls."""
    asked = []

    def convert(module, *, module_filter_fn, config):
        names = [name for name, part in module.named_modules() if module_filter_fn(part, name)]
        asked.append((names, config))

    package = types.ModuleType("torchao.float8")
    package.Float8LinearConfig, package.convert_to_float8_training = Settings, convert
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", package)
    return asked


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_attention_and_mlp_are_converted_and_emulated_on_a_cpu(scaling, converted):
    model = tiny("SiT", depth=1)  # 48 channels, a multiple of 16
    with pytest.warns(UserWarning, match=r"train.fp8 is emulated on this device"):
        fp8.convert(model, scaling, CPU, 4)
    assert converted == [(LAYERS, Settings(scaling, emulate=True))]


def test_layers_of_other_sizes_are_not_converted(converted):
    model = tiny("SiT", depth=1, width=40)  # qkv 120, mlp 160: its inputs are no multiple of 16
    with pytest.raises(ValueError, match=r"train.fp8 needs blocks with linear layers of multiples of 16 channels"):
        fp8.convert(model, "rowwise", CPU, 4)
    assert converted == []


def test_nothing_is_imported_without_the_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    model = tiny("SiT")
    before = [type(module) for module in model.modules()]
    fp8.convert(model, "none", CPU, 4)
    assert [type(module) for module in model.modules()] == before


def test_without_torchao_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"train.fp8 needs torchao \(.*\): pip install 'selftrans\[fp8\]'"):
        fp8.convert(tiny("SiT"), "rowwise", CPU, 4)


def test_an_older_gpu_is_refused(monkeypatch, converted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"train.fp8 needs a GPU of compute capability 8.9 or later, not NVIDIA A100"):
        fp8.convert(tiny("SiT"), "rowwise", torch.device("cuda"), 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.convert(tiny("SiT", depth=1), "rowwise", torch.device("cuda"), 4)
    assert converted == [(LAYERS, Settings("rowwise"))]


@pytest.mark.parametrize(
    ("samples", "kept", "layer"), [(4, None, None), (6, None, "0"), (8, 0.5, None), (4, 0.5, "1"), (16, 0.75, None)]
)
def test_rows_of_a_micro_batch_are_a_multiple_of_16_on_a_gpu(samples, kept, layer, monkeypatch, converted):
    """4 tokens a sample, of which a route keeps 2 or 1 in the second block of three."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = tiny("SiT", depth=3)
    assert model.tokens == 4
    model.route = Route(kept, 2, 2) if kept else None
    if layer is None:
        fp8.convert(model, "rowwise", torch.device("cuda"), samples)
        return
    tokens = 2 if kept else 4
    with pytest.raises(
        ValueError, match=rf"blocks.{layer}.* has {samples} x {tokens} .* a multiple of {16 // tokens}$"
    ):
        fp8.convert(model, "rowwise", torch.device("cuda"), samples)
    assert converted == []


@pytest.mark.parametrize("train", [{"precision": "fp32"}, {"precision": "fp16"}, {"precision": "bf16", "shard": True}])
def test_other_precisions_and_sharding_are_refused(train):
    with pytest.raises(ValueError, match=r"train.fp8 rowwise goes with train.precision bf16 and without train.shard"):
        RunConfig("digits", train=Train(fp8="rowwise", **train)).check()


def test_adapters_are_refused():
    config = RunConfig("digits", init=Init(path="run"), lora=Lora(rank=2))
    config = dataclasses.replace(config, train=Train(fp8="rowwise", precision="bf16"))
    with pytest.raises(ValueError, match=r"train.fp8 does not go with lora.rank"):
        config.check()


def test_with_torchao_parameters_stay_and_outputs_are_close():
    pytest.importorskip("torchao", reason="an optional package")
    model = tiny("SiT", shape=(2, 8, 8)).requires_grad_(True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y = inputs(model)
    before, names = list(model.parameters()), list(model.state_dict())
    expected = model(x, t, y).v
    with pytest.warns(UserWarning, match="emulated"):
        fp8.convert(model, "tensorwise", CPU, 4)
    found = model(x, t, y).v
    found.sum().backward()
    assert list(model.state_dict()) == names and all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    assert all(p.grad is not None for p in model.parameters())
