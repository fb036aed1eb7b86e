"""Models loaded from runs, checkpoints and weights files; what is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from selftrans.checkpoints.load import find, find_asked, load_model
from selftrans.cli.main import main
from selftrans.storage import sha256_file
from tests.support import toy
from tests.support.damage import flip
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_loading_a_run_without_a_valid_checkpoint_is_refused(tmp_path):
    damaged = toy.copy(toy.finished(), tmp_path / "damaged")
    for path in (damaged / "stage2" / "checkpoints").iterdir():
        (path / "ema.safetensors").unlink()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="holds no valid checkpoint"):
        find(damaged)


@pytest.mark.parametrize(
    ("path", "stage", "step"),
    [
        ("", "stage2", 8),
        ("stage1", "stage1", 4),
        ("stage2/checkpoints/step-00000006", "stage2", 6),
        ("stage2/checkpoints/step-00000006/student.safetensors", "stage2", 6),
        ("stage1/checkpoints/step-00000003/ema.safetensors", "stage1", 3),
    ],
)
def test_paths_that_name_a_model(path, stage, step):
    found = load_model(toy.finished() / path)
    assert (found.stage, found.step) == (stage, step)
    assert not found.model.training and found.autoencoder == toy.PIXELS and found.classes == tuple("0123456789")
    file = toy.checkpoint(toy.finished(), stage, step) / (
        "student.safetensors" if "student" in path else "ema.safetensors"
    )
    toy.assert_same(dict(found.model.state_dict()), load_file(file))
    assert found.source["sha256"] == sha256_file(Path(found.source["path"]))


def test_single_weights_file_can_be_loaded(tmp_path):
    file = shutil.copy(toy.checkpoint(toy.finished()) / "ema.safetensors", tmp_path / "renamed.bin")
    found = load_model(file)
    assert found.step == 8 and found.config == toy.toy() and found.prompts == ()
    header = header_of(file)
    assert "prompts" not in header and header["conditions"]["encoder"] == "", "of a model of classes, from any folder"


def test_raw_weights_of_a_file_with_the_average_alone_cause_a_warning(recwarn):
    held = toy.checkpoint(toy.finished())
    for origin in (held, held / "student.safetensors"):
        assert load_model(find_asked(origin, weights="raw")).weights == "raw"
    assert find_asked(held / "ema.safetensors") == find_asked(held) == held / "ema.safetensors" and not recwarn.list
    with pytest.warns(
        UserWarning, match=r"ema.safetensors holds the moving average alone \(ema\), which is used in place"
    ):
        assert find_asked(held / "ema.safetensors", weights="raw") == held / "ema.safetensors"


def test_earlier_stage_in_place_of_the_last_one_causes_a_warning(tmp_path, recwarn):
    run = toy.copy(toy.finished(), tmp_path / "run")
    assert find_asked(run).parents[2].name == "stage2" and find_asked(run, stage="stage1").parents[2].name == "stage1"
    shutil.rmtree(run / "stage2")
    find_asked(run, stage="stage1"), find_asked(run / "stage1")
    assert not recwarn.list, "asked for"
    with pytest.warns(UserWarning, match="last stage of .*, stage2, has no checkpoint yet: stage1 is used, at step 4;"):
        assert find_asked(run).parents[2].name == "stage1"


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["selftrans"])


def rewritten(tmp_path, change):
    """A weights file whose header is `change(header)`."""
    source = toy.checkpoint(toy.finished(), "stage1") / "student.safetensors"
    header = header_of(source)
    changed = change(header) or header
    save_file(load_file(source), tmp_path / "weights.safetensors", metadata={"selftrans": json.dumps(changed)})
    return tmp_path / "weights.safetensors"


def set_model(**fields):
    return lambda header: header["config"]["model"].update(fields)


def bare(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


def text(tmp_path):
    (tmp_path / "notes.safetensors").write_text("notes, not weights")
    return tmp_path / "notes.safetensors"


def truncated(tmp_path):
    content = (toy.checkpoint(toy.finished(), "stage1") / "student.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    return tmp_path / "truncated.safetensors"


def empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def pickled(tmp_path):
    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": RunsCode()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def damaged_checkpoint(tmp_path):
    path = toy.copy(toy.checkpoint(toy.finished(), "stage1"), tmp_path / "step-00000004")
    flip(path / "student.safetensors")
    return path


BAD = {
    "missing": (lambda tmp_path: tmp_path / "nowhere", "does not exist; expected a run directory"),
    "empty folder": (empty_folder, "is no|has no stage1"),
    "vanilla run": (lambda _: toy.vanilla(), "has no stage1: it holds vanilla"),
    "optimizer file": (
        lambda _: toy.checkpoint(toy.finished(), "stage1") / "optimizer.safetensors",
        "its header describes",
    ),
    "no safetensors": (text, "not a selftrans weights file"),
    "no header": (bare, "no entry 'selftrans' in its header"),
    "truncated": (truncated, "not a selftrans weights file"),
    "pickle": (pickled, "not a selftrans weights file"),
    "damaged checkpoint": (damaged_checkpoint, "missing or damaged"),
    "header is a list": (lambda p: rewritten(p, lambda h: [1, 2]), "not a selftrans weights file"),
    "header is empty": (lambda p: rewritten(p, lambda h: {"a": 1}), "does not describe its model"),
    "other version": (lambda p: rewritten(p, lambda h: h["config"].update(version=9)), "not of version 2"),
    "strange field": (lambda p: rewritten(p, lambda h: h["config"].update(extra=1)), "config.extra is unknown"),
    "config is text": (lambda p: rewritten(p, lambda h: h.update(config="x")), "does not describe its model"),
    "shape of two": (lambda p: rewritten(p, lambda h: h.update(shape=[1, 8])), "does not describe its model"),
    "shape of words": (
        lambda p: rewritten(p, lambda h: h.update(shape=["a", "b", "c"])),
        "does not describe its model",
    ),
    "no stage": (lambda p: rewritten(p, lambda h: h.pop("stage") and None), "does not describe its model"),
    "prompts are text": (lambda p: rewritten(p, lambda h: h.update(prompts="abc")), "does not describe its model"),
    "prompts are numbers": (lambda p: rewritten(p, lambda h: h.update(prompts=[1])), "does not describe its model"),
    "zero heads": (lambda p: rewritten(p, set_model(heads=0)), "model.heads must be above zero"),
    "other width": (lambda p: rewritten(p, set_model(width=64)), "its header describes"),
    "more blocks": (lambda p: rewritten(p, set_model(depth=4)), "its header describes"),
    "fewer blocks": (lambda p: rewritten(p, set_model(depth=2)), "its header describes"),
    "absurd width": (lambda p: rewritten(p, set_model(width=1 << 40)), "does not describe its model"),
    "absurd depth": (lambda p: rewritten(p, set_model(depth=1 << 40)), "does not describe its model"),
    "absurd side": (
        lambda p: rewritten(p, lambda h: h.update(shape=[1, 1 << 40, 1 << 40])),
        "does not describe its model",
    ),
    "absurd classes": (
        lambda p: rewritten(p, lambda h: h["conditions"].update(num_classes=1 << 70)),
        "does not describe its model",
    ),
    "negative classes": (
        lambda p: rewritten(p, lambda h: h["conditions"].update(num_classes=-5)),
        "does not describe its model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_teacher_is_one_line_and_writes_nothing(tmp_path, capsys, case):
    make, message = BAD[case]
    teacher, run = make(tmp_path), tmp_path / "run"
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={run}", f"--teacher={teacher}", *toy.taught_flags()]
    capsys.readouterr()
    assert main(argv) == 1
    output = capsys.readouterr().err
    assert output.startswith("selftrans: ") and output.count("\n") == 1, output
    assert re.search(message, output), output
    assert not run.exists() and not (tmp_path / "executed").exists()
