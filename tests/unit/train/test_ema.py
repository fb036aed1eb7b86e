"""The exponential moving average against its formula."""

import torch
from torch import nn

from selftrans.train.ema import EMA
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_ema_equals_its_formula():
    student = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(student.weight)
    ema = EMA(student, 0.5)
    assert not ema.model.training and not ema.model.weight.requires_grad
    expected = 0.0
    for step in range(1, 30):
        with torch.no_grad():
            student.weight.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.model.weight, torch.full((1, 2), expected))
    assert (1 + 7) / (10 + 7) < 0.5 == (1 + 8) / (10 + 8)  # both sides of the warm-up were seen
