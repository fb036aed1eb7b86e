"""Which settings of the two stages are refused."""

import math

import pytest

from selftrans.methods.stage_settings import Stage1, Stage2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, r"stage2\.weight must be a number from 0"),
        ({"head_width": 0}, r"stage2\.head_width must be at least 1, not 0"),
        ({"scale": math.inf}, r"stage2\.scale must be a number, not inf"),
        ({"spatial_gamma": math.nan}, r"stage2\.spatial_gamma must be a number, not nan"),
        ({"null_rows": -0.1}, r"stage2\.null_rows is a fraction of the guided samples, in \[0, 1\], not -0\.1"),
        ({"null_rows": math.nan}, r"stage2\.null_rows is a fraction"),
        ({"data_std": 0.0}, r"stage2\.data_std is a standard deviation, above zero, not 0\.0"),
        ({"data_std": math.nan}, r"stage2\.data_std is a standard deviation"),
        ({"student_blocks": ()}, r"stage2\.student_blocks \(\) must be blocks from 1; give one at least"),
        ({"student_blocks": (2, 0)}, r"stage2\.student_blocks \(2, 0\) must be blocks from 1"),
        ({"teacher_blocks": (2, 3)}, r"stage2\.teacher_blocks \(2, 3\) must be as many as stage2\.student_blocks None"),
        ({"student_blocks": (1, 2), "teacher_blocks": (3,)}, r"must be as many as stage2\.student_blocks \(1, 2\)"),
        ({"student_blocks": (1,), "teacher_blocks": (0,)}, r"stage2\.teacher_blocks \(0,\) must be blocks from 1"),
        ({"fade": 1.1}, r"stage2\.fade is a fraction of the steps before until_step, in \[0, 1\], not 1\.1"),
        ({"fade": 0.5, "until_step": None}, r"need the end of the term; give stage2\.until_step"),
        ({"label_part": "decay", "until_step": None}, r"need the end of the term; give stage2\.until_step"),
        ({"teacher_width": 0}, r"stage2\.teacher_width must be above zero, not 0"),
        ({"teacher_depth": -1}, r"stage2\.teacher_depth must be above zero, not -1"),
        ({"teacher_lr": math.nan}, r"stage2\.teacher_lr must be above zero, not nan"),
    ],
)
def test_impossible_settings_of_stage_2_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Stage2(**options).check()


def test_stage_1_has_at_least_one_step():
    with pytest.raises(ValueError, match=r"stage1\.steps must be above zero, not 0; to skip stage 1 give --teacher"):
        Stage1(steps=0).check()


def test_options_without_effect_are_named():
    assert Stage2().ineffective() == {"spatial_gamma": "stage2.target_norm is not spatial"}
    assert set(Stage2(target_norm="spatial", head="conv").ineffective()) == {"head_width"}
    several = Stage2(target_norm="spatial", student_blocks=(1,), teacher_blocks=(2,), timestep_range=None)
    assert set(several.ineffective()) == {"student_block", "teacher_block", "range_mode", "data_std"}
    given = Stage2(target_norm="spatial", teacher="run")
    assert set(given.ineffective()) == {"teacher_width", "teacher_depth", "teacher_lr"}
