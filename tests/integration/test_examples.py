"""The scripts in examples/ run, and the code blocks of docs/extending.md run in their order."""

from __future__ import annotations

import copy
import importlib
import math
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from selftrans import Batch, Frozen, Objective, Stage1, Stage2
from selftrans.cli.main import main
from selftrans.methods import registry as methods
from selftrans.methods.self_transcendence import SelfGuidance, StructureGuidance
from selftrans.models import registry as models
from selftrans.train.flops import step_flops
from selftrans.types import Conditions
from tests.support.packages import importable
from tests.support.toy import quick  # noqa: F401

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
TOY = "--train.steps 2 --train.batch-size 8 --train.preview-every 0 --log.tensorboard False"


def blocks(language: str) -> list[str]:
    return [block for kind, block in BLOCKS if kind == language]


# ---- scripts


def test_own_loop_learns_and_samples(capsys):
    losses, samples = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))["main"](steps=40)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert samples.shape == (10, 1, 8, 8) and samples.isfinite().all()
    assert "stage 2  step  25  flow" in capsys.readouterr().out


def test_own_backbone_learns(capsys):
    losses = runpy.run_path(str(ROOT / "examples" / "own_backbone.py"))["main"](steps=40)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert capsys.readouterr().out.count("flow loss") == 4


# ---- docs/extending.md


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's Python blocks as my_method.py in the current directory, from which they can be imported."""
    (tmp_path / "my_method.py").write_text("\n\n".join(blocks("python")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with importable(tmp_path, drop=("my_method",)):
        torch.manual_seed(0)
        yield importlib.import_module("my_method")
    sys.modules.pop("my_method", None)


def step(student, guidances) -> float:
    """The loss of one training step, after checking that its gradient reaches the student."""
    latents, labels = torch.randn(4, *student.shape), torch.arange(4)
    loss, _ = Objective(student, guidances)(Batch(latents, labels), 0)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    return loss.item()


def test_backbone_of_the_page_is_the_example(module):
    example = (ROOT / "examples" / "own_backbone.py").read_text(encoding="utf-8")
    source = next(block for block in blocks("python") if "class Mixer" in block)
    assert source[source.index("class Mixer") :].strip() in example
    assert len([line for line in source[source.index("class Mixer") :].splitlines() if line.strip()]) <= 30


def test_backbones_of_the_page_train_and_teach(module):
    mixer = module.Mixer((1, 8, 8), Conditions("labels", 10))
    for student in (mixer, module.dit):
        assert math.isfinite(step(student, [StructureGuidance(student, Stage1(block=1, head_width=8))]))
        x, t, labels = torch.randn(2, *student.shape), torch.rand(2), torch.tensor([3, 4])
        early = student(x, t, labels, taps=(1,), stop=True)
        assert early.v is None and torch.equal(early.feats[1], student(x, t, labels, taps=(1, 2)).feats[1])
        teacher = Frozen(student, 2)
        assert math.isfinite(step(student, [SelfGuidance(student, teacher, Stage2(student_block=1, head_width=8))]))


def test_guidance_of_the_page_follows_the_average_as_it_moves(module):
    student = module.Mixer((1, 8, 8), Conditions("labels", 10))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    average = copy.deepcopy(student)
    objective = Objective(student, [module.FollowGuidance(student, module.Follow())])
    objective.watch(average)
    batch, terms = Batch(torch.randn(4, 1, 8, 8), torch.arange(4)), []
    for _ in range(2):
        torch.manual_seed(1)
        loss, report = objective(batch, 0)
        terms.append(report["follow"].item())
        assert report["follow"].item() == pytest.approx((report["follow/block1"] + report["follow/block2"]).item() / 2)
        for parameter in average.parameters():
            parameter.add_(0.1)
    assert terms[0] != terms[1] and not any(p.requires_grad for p in average.parameters())
    loss.backward()
    assert all(p.grad is not None for p in objective.guidances[0].parameters())
    assert step_flops(objective, torch.zeros(1, dtype=torch.long), 4)[0] > 0


def test_wrapped_model_does_not_drop_labels_in_training(module):
    """Compared are features of a block: the velocity of a new DiT does not depend on its input."""
    model = module.dit.train()
    for block in model.net.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight)
    x, t, labels = torch.randn(64, *model.shape), torch.rand(64), torch.arange(64) % 10
    feats = [model(x, t, labels, taps=(3,), stop=True).feats[3] for _ in range(2)]
    assert torch.equal(*feats)
    assert not torch.equal(feats[0], model(x, t, model.null(labels), taps=(3,), stop=True).feats[3])


def test_commands_of_the_page_run(module, capsys):
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if line]
    words = shlex.split(line.removeprefix("PYTHONPATH=. "))
    assert words[0] == "selftrans"
    extra = "--decorrelate.weight 0.2 --model.name my_method:MIXER --model.width 16"
    assert main([*words[1:], *shlex.split(f"{TOY} {extra}")]) == 0, capsys.readouterr().err
    assert methods.find("my_method:DECORRELATE") is module.DECORRELATE
    run = words[words.index("--out") + 1]
    assert main(shlex.split(f"sample {run} --out samples --num 2 --steps 2 --trust my_method:MIXER")) == 0


def test_entry_points_of_the_page_are_the_groups_that_are_read():
    (block,) = blocks("toml")
    assert set(tomllib.loads(block)["project"]["entry-points"]) == {methods.REGISTRY.group, models.REGISTRY.group}
    project = tomllib.loads((ROOT / "examples" / "own_method" / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["project"]["entry-points"]) == {methods.REGISTRY.group, models.REGISTRY.group}
