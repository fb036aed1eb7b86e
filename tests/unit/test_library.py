"""What `import selftrans` offers."""

import inspect

import pytest
import torch
from accelerate.state import AcceleratorState

import selftrans
from selftrans import library
from selftrans.checkpoints.load import load_model
from tests.support import toy
from tests.support.pages import blocks


def test_star_import_gives_every_name_of_the_library():
    names: dict[str, object] = {}
    exec("from selftrans import *", names)
    assert {name: names[name] for name in library.__all__} == {name: getattr(library, name) for name in library.__all__}
    assert set(library.__all__) <= set(dir(selftrans)) and issubclass(selftrans.HookedBackbone, selftrans.Backbone)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'selftrans' has no attribute 'Sit'"):
        selftrans.Sit  # noqa: B018


def test_objective_of_the_library_is_a_module():
    model = selftrans.SiT((1, 4, 4), 3, width=8, depth=2, heads=2, patch=2)
    objective = selftrans.Objective(model)
    assert isinstance(objective, torch.nn.Module) and objective.student is model


def test_a_trained_model_in_one_line():
    model, found = selftrans.load(toy.finished()), load_model(toy.finished())
    assert isinstance(model, selftrans.Backbone) and not model.training
    toy.assert_same(dict(model.state_dict()), dict(found.model.state_dict()))
    first = selftrans.load(toy.finished(), stage="stage1", weights="raw")
    toy.assert_same(
        dict(first.state_dict()), dict(load_model(toy.finished(), stage="stage1", weights="raw").model.state_dict())
    )
    with pytest.raises(ValueError, match="nowhere does not exist; expected a run directory"):
        selftrans.load("nowhere")
    with pytest.raises(ValueError, match="weights 'EMA' are unknown; choose 'ema' or 'raw'"):
        selftrans.load(toy.finished(), weights="EMA")


def test_every_class_and_function_has_a_docstring_of_its_own():
    named = {name: getattr(selftrans, name) for name in library.__all__}
    offered = {name: each for name, each in named.items() if inspect.isclass(each) or inspect.isfunction(each)}
    assert len(offered) > 20
    short = [
        name for name, each in offered.items() if len(each.__doc__ or "") < 20 or each.__doc__.startswith(f"{name}(")
    ]
    assert short == []  # a dataclass or tuple without one has its signature there


def test_loops_of_the_page_train_continue_and_use_accelerate(tmp_path, monkeypatch):
    """The blocks of docs/library.md that start from a run: once from the start, once from the state of the first."""
    monkeypatch.chdir(tmp_path)
    texts = [block.text for block in blocks("docs/library.md") if "test_library.py" in block.skipped]
    loop, accelerate = (
        text.replace('"runs/digits"', repr(str(toy.finished()))).replace("block=4", "block=1") for text in texts
    )
    loop = loop.replace("width=64, depth=6", "width=16, depth=3")
    latents, labels = torch.randn(4, *selftrans.load(toy.finished()).shape), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    scopes = []
    for _ in range(3):  # the first visit ends with heads, in the second they end, the third begins without
        scope = {name: getattr(selftrans, name) for name in library.__all__} | {"torch": torch}
        scope["batches"] = [(latents, labels)] * 3
        exec(compile(loop, "library.md", "exec"), scope)
        scopes.append(scope)
    assert [scope["step"] for scope in scopes] == [2, 5, 8]
    assert "self" in scopes[0]["report"] and set(scopes[1]["report"]) == {"flow"}
    assert scopes[1]["average"].n_averaged == 6
    scope["loader"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(latents, labels), batch_size=2)
    AcceleratorState._reset_state(True)
    try:
        exec(compile(accelerate, "library.md", "exec"), scope)
    finally:
        AcceleratorState._reset_state(True)  # later tests have other precisions
    assert scope["loss"].isfinite() and "self" in scope["report"]


def test_labels_outside_the_classes_are_refused_when_sampling():
    model, z = selftrans.SiT((1, 4, 4), 3, width=8, depth=2, heads=2, patch=2), torch.zeros(2, 1, 4, 4)
    for labels in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"label (4|-1) is out of range: the model has 3 classes"):
            selftrans.guided(model, torch.tensor(labels))
        with pytest.raises(ValueError, match="are out of range: this model has 0 to 2, and 3 for no condition"):
            model(z, torch.zeros(2), torch.tensor(labels))
    assert selftrans.guided(model, torch.tensor([0, 3]))(z, torch.tensor(1.0)).shape == z.shape


def test_wrong_calls_are_refused_in_one_line():
    model, z = selftrans.SiT((1, 4, 4), 3, width=8, depth=2, heads=2, patch=2), torch.zeros(2, 1, 4, 4)
    t, labels = torch.zeros(2), torch.tensor([0, 1])
    for call, message in (
        (lambda: model(z, t, None), "SiT takes labels"),
        (lambda: model(z, torch.tensor(0.5), labels), r"not Tensor and t of shape \(\)"),
        (lambda: model(z, t, labels.float()), r"labels must be whole numbers \(torch.long\), not float32"),
        (lambda: selftrans.guided(model, [0, 1]), "a condition is a tensor of labels .* not list"),
        (lambda: selftrans.guided(model, labels, scale=float("nan")), "guidance scale nan is not finite"),
        (
            lambda: selftrans.guided(model, labels[:1], scale=2.0)(z, torch.tensor(1.0)),
            "2 latents but conditions of 1; give one for each",
        ),
        (lambda: selftrans.ode(lambda z, t: z, z, steps=2.5), "2.5 sampling steps are no whole number"),
        (lambda: selftrans.ode(lambda z, t: z, z, steps=float("inf")), "inf sampling steps are no whole number"),
        (lambda: selftrans.Frozen(model, 1.0), "teacher block 1.0 is outside the teacher's 1..2"),
        (lambda: selftrans.SiT((1, 4, 4), -1, width=8, depth=2, heads=2, patch=2), "num_classes 0 or more, not -1"),
        (
            lambda: selftrans.SiT((1, 4, 4), 3, width=8, depth=0, heads=2, patch=0),
            "sizes must be 1 or more .*depth 0, patch 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model(z, t, labels.int())


def test_one_condition_holds_for_all_latents_without_guidance():
    model, z = selftrans.SiT((1, 4, 4), 3, width=8, depth=2, heads=2, patch=2), torch.randn(3, 1, 4, 4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    one, all_ = (selftrans.guided(model, torch.full((n,), 2))(z, torch.tensor(0.5)) for n in (1, 3))
    torch.testing.assert_close(one, all_)
    with pytest.raises(ValueError, match="3 latents but conditions of 2; give one for each"):
        selftrans.guided(model, torch.tensor([0, 1]))(z, torch.tensor(0.5))
