"""The registry of methods: each builds its stages; unknown methods, and methods outside the package."""

import math
from types import SimpleNamespace

import pytest
import torch

from selftrans.config import RunConfig, Train, sections
from selftrans.methods import registry
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.registry import METHODS, meta_objective, stages
from selftrans.methods.self_transcendence import Stage1, Stage2
from selftrans.methods.spec import MethodSpec, Stage, TeacherSpec
from selftrans.plugins import trust
from selftrans.types import Conditions
from tests.support.guidances import data
from tests.support.stub import Stub

LABELS = Conditions("labels", 10)


def config(method):
    return RunConfig(
        recipe="digits",
        method=method,
        train=Train(steps=6),
        sections=sections(Stage1(block=1, head_width=8), Stage2(head_width=8)),
    )


def test_titles_are_those_of_methods_that_are_loaded():
    shown = registry.titles(["structure", "mine", "sra"])
    assert shown == {"structure": "stage 1 only", "mine": "mine", "sra": "SRA"}
    assert registry.titles(["SRA", "sra"]) == {"SRA": "SRA", "sra": "sra"}, "one name each, or a curve would be lost"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_its_stages_and_takes_a_step(method):
    plan = stages(config(method))
    assert plan and len({stage.name for stage in plan}) == len(plan)
    assert plan[-1].steps == 6, "the last stage is the student's"
    for stage in plan:
        student = Stub()
        teacher = Frozen(Stub(), stage.teacher.block(3)) if stage.teacher else None
        if stage.encoder:
            teacher = SimpleNamespace(
                grid=(2, 2), width=5, flops=0, encode=lambda pixels: torch.ones(len(pixels), 4, 5)
            )
        objective = Objective(student, stage.guide(student, teacher))
        objective.watch(Stub())
        loss, _ = objective(data(10), 0)
        loss.backward()
        assert math.isfinite(loss.item())
        assert all(g.cost(10)["head"] >= 0 and g.cost(10)["teacher"] >= 0 for g in objective.guidances)


def test_stage_is_put_together_without_memory():
    """A teacher that is not trained yet has the size of its own stage, the given dtype, and two thirds of its blocks."""
    small = {
        "model.width": 32,
        "model.depth": 6,
        "model.heads": 2,
        "stage2.teacher_depth": 3,
        "stage2.teacher_width": 16,
    }
    run = config("self_transcendence").override(small)
    both = [meta_objective(run, stage, (1, 8, 8), LABELS, dtype=torch.bfloat16) for stage in stages(run)]
    assert [(each.student.depth, each.student.width) for each in both] == [(3, 16), (6, 32)]
    teacher = both[1].guidances[0].teacher
    assert (teacher.block, teacher.width, len(teacher.model.blocks)) == (2, 16, 2)
    assert all(p.is_meta for each in (*both, teacher.model) for p in each.parameters())
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    given = Frozen(both[0].student, 1)
    assert meta_objective(run, stages(run)[1], (1, 8, 8), LABELS, given).guidances[0].teacher is given


def test_objective_has_the_training_settings_of_the_run():
    given = {"times": "logitnormal", "time_shift": 2.0, "drop": 0.2, "cosine": 0.5, "loss": "noise"}
    run = config("vanilla").override(
        {f"train.{name}": value for name, value in given.items()} | {"train.path": "cosine"}
    )
    objective = meta_objective(run, stages(run)[0], (1, 8, 8), LABELS)
    assert {name: getattr(objective, name) for name in given} == given and objective.path.name == "cosine"


def test_stages_of_vanilla_structure_and_self_transcendence():
    vanilla, structure, full = (stages(config(m)) for m in ("vanilla", "structure", "self_transcendence"))
    assert [(s.name, s.steps) for s in vanilla] == [("vanilla", 6)] and not vanilla[0].guide(Stub(), None)
    assert [(s.name, s.steps) for s in structure] == [("stage1", 6)]
    assert [(s.name, s.steps) for s in full] == [("stage1", 3), ("stage2", 6)], "by default half of the steps"
    assert full[1].teacher.weights == "raw" and full[1].teacher.block(12) == 8
    assert full[0].teacher is None and full[0].stream != full[1].stream, (
        "teacher and student have different initial weights"
    )


def test_error_for_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'magic' is unknown; choose one of vanilla, .*, or module:function"):
        stages(config("magic"))


def test_method_outside_the_package_is_found_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "outside_method.py").write_text(
        "from selftrans.methods.spec import MethodSpec, Stage\n"
        "def plan(config):\n"
        "    return [Stage('alone', config.train.steps, lambda student, teacher: [])]\n"
        "def method():\n"
        "    return MethodSpec('alone', 'Alone', plan)\n"
        "def other():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--trust outside_method:method allows it"):
        stages(config("outside_method:method"))
    for name in ("outside_method:method", "outside_method:other", "outside_method:plan"):
        trust(name)
    (stage,) = stages(config("outside_method:method"))
    assert isinstance(stage, Stage) and (stage.name, stage.steps) == ("alone", 6)
    with pytest.raises(ValueError, match="is no MethodSpec"):
        stages(config("outside_method:other"))
    with pytest.raises(ValueError, match="cannot be imported"):
        stages(config("outside_method:plan"))
    with pytest.raises(ValueError, match="outside_method has no absent"):
        trust("outside_method:absent")


def stage(name, taught_by=None):
    teacher = TeacherSpec(taught_by, lambda depth: depth, "raw") if taught_by else None
    return Stage(name, 1, lambda student, teacher: [], teacher=teacher)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ([], "needs one at least"),
        ([stage("same"), stage("same")], "each of another name"),
        ([stage("first"), stage("second", "frist")], "stage second is taught by 'frist', which is no stage before it"),
        ([stage("first", "second"), stage("second")], "which is no stage before it"),
        ([stage("first", "first")], "which is no stage before it"),
    ],
)
def test_inconsistent_stages_are_refused_before_training(plan, expected, monkeypatch):
    own = MethodSpec("own", "own", lambda config: plan)
    monkeypatch.setitem(registry.METHODS, "own", own)
    with pytest.raises(ValueError, match=expected):
        registry.stages(RunConfig(recipe="digits", method="own"))
