"""The record of a method: keys of sections, names of stages, and which stage teaches which."""

from dataclasses import dataclass

import pytest

from selftrans.methods.spec import MethodSpec, Stage, TeacherSpec
from selftrans.sections import Section


def stage(name, taught_by=None):
    teacher = TeacherSpec(taught_by, lambda depth: depth, "raw") if taught_by else None
    return Stage(name, 1, lambda student, teacher: [], teacher=teacher)


@pytest.mark.parametrize("key", ["train", "model", "recipe", "version", "own method", "Own", "own.part", ""])
def test_reserved_key_of_a_section_is_refused(key):
    @dataclass(frozen=True)
    class Own(Section):
        """Settings."""

    Own.key = key
    with pytest.raises(ValueError, match=f"'{key}' cannot be the key of a section"):
        MethodSpec("own", "own", lambda config: [], (Own,))


@pytest.mark.parametrize("name", ["warm up", "../up", "", ".", ".hidden", "a/b", "data", "tensorboard", "x" * 101])
def test_stage_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ValueError, match="cannot be a folder of a run"):
        stage(name)
