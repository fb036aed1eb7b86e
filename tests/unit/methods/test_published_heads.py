"""What is read of a released file's head; `test_importing.py` imports whole files."""

import torch

from selftrans.config import RunConfig
from selftrans.methods.published_heads import PUBLISHED_HEAD, published_heads
from selftrans.methods.self_transcendence import Stage1, StructureGuidance
from tests.support.stub import Stub

NAMED = {name: torch.zeros(5, 8) for name in PUBLISHED_HEAD}


def test_settings_come_from_the_options_of_their_command():
    arguments = {"encoder_depth": 4, "proj_coeff": 0.25, "t_range": (0.3, 0.6)}
    (stage1,) = published_heads(NAMED, arguments, RunConfig("digits")).sections
    expected = Stage1(block=4, weight=0.25, timestep_range=(0.3, 0.6), range_mode="scale", head_width=5)
    assert stage1 == expected


def test_names_are_those_of_the_head_of_stage_1():
    ours = {f"guidances.0.{name}" for name, _ in StructureGuidance(Stub(), Stage1()).named_parameters()}
    assert set(published_heads(NAMED, {}, RunConfig("digits")).names.values()) == ours


def test_files_of_other_methods_have_no_such_head():
    assert published_heads({"projectors.0.weight": torch.zeros(5, 8)}, {}, RunConfig("digits")) is None
