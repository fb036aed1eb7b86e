"""Adapters: against peft's own merge, which layers they are on, and how little is trained, averaged and saved."""

import copy
import re
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from selftrans.models import lora
from selftrans.models.registry import MODELS
from selftrans.models.sit import SiT
from selftrans.train.ema import EMA
from selftrans.types import Conditions
from tests.support.graphs_only import graphs_only  # noqa: F401 - a fixture
from tests.support.toy import quick  # noqa: F401 - a fixture

SIZES = {"width": 32, "depth": 2, "heads": 2, "patch": 2}
OF_TEXT = {"mmdit", "diffusers-pixart", "diffusers-sd3", "diffusers-flux"}


def model():
    made = SiT((1, 8, 8), 10, **SIZES)
    for parameter in made.parameters():  # gates and output start at zero, and would hide everything
        nn.init.normal_(parameter, std=0.2)
    return made


def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 8, 8, generator=g), torch.linspace(0, 1, 4), torch.tensor([0, 3, 10, 9])


def adapted(**options):
    """A model with adapters whose B is not zero, and the state dict of the model without adapters."""
    made = model()
    before = copy.deepcopy(made.state_dict())
    lora.add_adapters(made, 3, 2.0, **options)
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return made, before


SELF = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
CROSS = tuple(f"attn{k}.{part}" for k in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0"))
FEED, FEED_TEXT = ("ff.net.0.proj", "ff.net.2"), ("ff_context.net.0.proj", "ff_context.net.2")
JOINT = tuple(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out"))
JOINT += tuple(f"attn.add_{part}_proj" for part in "qkv")
#: family -> ends of the names of its layers of attention and MLP
DEFAULTS = {
    "sit": SELF,
    "dit": SELF,
    "lightningdit": ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"),
    "mmdit": tuple(f"{part}.{layer}" for part in ("x_block", "context_block") for layer in SELF),
    "diffusers-dit": (*CROSS[:4], *FEED),
    "diffusers-pixart": (*CROSS, *FEED),
    "diffusers-sd3": (*JOINT, *FEED, *FEED_TEXT),
    "diffusers-flux": (*JOINT, *FEED, *FEED_TEXT, "proj_mlp", "proj_out"),
}


@pytest.mark.parametrize("name", MODELS)
def test_default_targets_are_attention_and_mlp_of_every_block(name):
    family = MODELS[name]
    config = family.Config()
    conditions = Conditions("text", tokens=7, width=48) if name in OF_TEXT else Conditions("labels", 10)
    with torch.device("meta"):
        built = family.build(config, (4, 32, 32), conditions)
    targets = lora.default_targets(built)
    ends = {re.fullmatch(r"(net\.)?\w*blocks\.\d+\.(.*)", target)[2] for target in targets}
    assert ends == set(DEFAULTS[name])
    for k, block in enumerate(built.repeated()):
        inside = {id(part) for part in block.modules()}
        assert any(id(built.get_submodule(target)) in inside for target in targets), f"block {k + 1}"


def test_targets_are_full_names_or_ends():
    made = model()
    assert lora.chosen_targets(made, ("qkv", "final_layer.linear")) == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "final_layer.linear",
    ]
    for wrong in ("kv", "attn", "x_embedder.proj", "to_q"):  # part of a word, no layer, a convolution, nothing
        names = "mlp.0, .*attn.qkv, attn.proj, mlp.fc1, mlp.fc2, adaLN_modulation.1, .*final_layer.linear"
        with pytest.raises(ValueError, match=f"'{wrong}' matches no linear layer; there are .*{names}"):
            lora.chosen_targets(made, ("qkv", wrong))


def test_model_starts_as_it_was_and_merges_as_peft_does():
    made = model()
    with torch.no_grad():
        before = made(*inputs()).v
        lora.add_adapters(made, 3, 2.0)
        assert torch.equal(made(*inputs()).v, before)
    made, base = adapted()
    trained = {name: p.detach() for name, p in made.named_parameters() if p.requires_grad}
    found = lora.merged(base, trained, 2.0)
    expected = {}
    for name, layer in made.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.merge()
            expected[f"{name}.weight"] = layer.base_layer.weight
    assert len(expected) == 8
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected.get(name, base[name]), rtol=1e-6, atol=1e-6)
    assert all(not torch.equal(found[name], base[name]) for name in expected)


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("compiled", [False, True])
def test_only_adapters_and_what_is_new_have_gradients(compiled):
    table = "y_embedder.embedding_table.weight"
    made, _ = adapted(trained=[table])
    if compiled:
        from selftrans.models.compiling import compile_model

        compile_model(made)
    made(*inputs()).v.square().sum().backward()
    with_gradient = {name for name, p in made.named_parameters() if p.grad is not None}
    assert with_gradient == lora.trained_names(made)
    pattern = r"blocks\.[01]\.(attn\.(qkv|proj)|mlp\.fc[12])\.lora_[AB]\.default\.weight"
    assert len(with_gradient) == 17 and all(name == table or re.fullmatch(pattern, name) for name in with_gradient)


def test_average_shares_the_frozen_weights():
    made, _ = adapted()
    ema = EMA(made, 0.5)
    student, average = dict(made.named_parameters()), dict(ema.model.named_parameters())
    trained = lora.trained_names(made)
    assert {name for name in student if student[name] is not average[name]} == trained
    old = {name: student[name].detach().clone() for name in trained}
    with torch.no_grad():
        for name in trained:
            student[name].add_(1.0)
    ema.update(100)
    for name in trained:
        torch.testing.assert_close(average[name].detach(), old[name] + 0.5)


def test_adapters_of_another_model_are_refused():
    made, base = adapted()
    trained = {name: p.detach() for name, p in made.named_parameters() if p.requires_grad}
    a = "blocks.0.attn.qkv.lora_A.default.weight"
    with pytest.raises(ValueError, match=r"the adapter of blocks.0.attn.qkv is incomplete"):
        lora.merged(base, {k: v for k, v in trained.items() if k != a}, 1.0)
    with pytest.raises(ValueError, match=r"the adapter of blocks.0.attn.qkv.weight does not belong"):
        lora.merged(base, trained | {a: torch.zeros(3, 7)}, 1.0)
    with pytest.raises(ValueError, match=r"new.weight .*does not belong to the weights"):
        lora.merged(base, {"new.weight": torch.zeros(1)}, 1.0)
    with pytest.raises(ValueError, match=r"lora.rank 33 is more than the 32"):
        lora.add_adapters(model(), 33, 1.0)


def test_import_of_the_package_does_not_load_peft():
    assert "import peft" not in Path(lora.__file__).read_text().split("def add_adapters")[0]
