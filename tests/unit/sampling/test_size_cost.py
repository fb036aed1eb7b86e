"""Sizes far above the model's own: a warning, or a refusal, before anything is computed."""

import warnings

import pytest
import torch

from selftrans.checkpoints.load import load_model
from selftrans.cli.main import main
from selftrans.config import SampleConfig
from selftrans.models.sit import SiT
from selftrans.sampling import images, size_cost
from selftrans.sampling.size_cost import check_cost
from tests.support import toy

CPU = torch.device("cpu")


def check(side, **options):
    """Check the size of a model of 8x8 pixels, 16 tokens and width 32."""
    model = SiT((3, 8, 8), 10, width=32, depth=2, heads=2, patch=2)
    given = {"batch": 1, "dtype": torch.float32, "device": CPU} | options
    check_cost(model, (3, side, side), side, **given)


def test_larger_size_causes_a_warning_with_its_factor():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(4)
        check(8)
    with pytest.warns(UserWarning, match="size 80x80 is 1,600 tokens, 100 times .* more than 100 times as long"):
        check(80)


def test_size_without_memory_is_refused_with_a_batch_that_fits(monkeypatch):
    each = 64 * 32 * 4 * 4  # 64 tokens in float32, with q, k and v
    monkeypatch.setattr(size_cost, "memory_total", lambda device: 3 * each)
    with pytest.raises(ValueError, match=r"for 4 pictures at a time; cpu has .*: give --batch-size 3 or less"):
        check(16, batch=4)
    with pytest.warns(UserWarning, match="4 times"):
        check(16, batch=4, dtype=torch.bfloat16)
    monkeypatch.setattr(size_cost, "memory_total", lambda device: each // 2)
    with pytest.raises(ValueError, match=r"for 1 picture at a time; .*: give a smaller size"):
        check(16)
    with pytest.raises(ValueError, match="resolution 99999x99999 is not between 1 and 16384"):
        check(99_999)


def test_sample_refuses_before_it_computes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(size_cost, "memory_total", lambda device: 1 << 20)
    words = ["sample", str(toy.finished()), "--out", str(tmp_path / "s"), "--num", "1", "--size", "4000x4000"]
    assert main(words) == 1 and not (tmp_path / "s").exists()
    assert "selftrans: size 4000x4000 is 4,000,000 tokens, and takes at least" in capsys.readouterr().err


def test_pictures_of_a_process_are_counted(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(images, "check_cost", lambda *given, batch, **rest: found.append(batch))
    sampler = images.Sampler.of(load_model(toy.finished()), SampleConfig(num=10, batch_size=8))
    for world in ("1", "4"):
        monkeypatch.setenv("WORLD_SIZE", world)
        sampler.resize((16, 16))
    assert found == [8, 3]
