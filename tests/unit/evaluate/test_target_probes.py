"""Probes of features made by hand, of which it is known where the class and the condition lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selftrans.evaluate.target_probes import Pooled, chance, probe_all, probe_target

N, K = 400, 4


def pooled(seen: float, given: float, *, apart: bool = True) -> Pooled:
    """The picture's class as `seen` in some channels, the given label as `given`, in others or (apart=False) in the same."""
    make = torch.Generator().manual_seed(0)
    labels, others = torch.arange(N) % K, torch.randint(0, K, (N,), generator=make)

    def code(which: Tensor, at: int) -> Tensor:
        return torch.nn.functional.one_hot(which + at, 2 * K).float()

    u = seen * code(labels, 0) + torch.randn(N, 2 * K, generator=make)
    at = K if apart else 0
    fitted = torch.randperm(N, generator=make) < 300
    return Pooled(u, given * code(labels, at), given * code(others, at), labels, others, fitted)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_label_given_is_read_from_the_condition(kind: str) -> None:
    found = probe_target(pooled(seen=0, given=8), 5.0)[kind]
    assert found["own"] == 1 and found["swapped_condition"] == 1 and found["swapped_picture"] == 0
    assert found["random"] < 0.4 and found["rest"] < 0.4  # a picture that shows nothing: chance is 0.25


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_class_is_read_from_the_picture_where_the_label_says_nothing(kind: str) -> None:
    found = probe_target(pooled(seen=9, given=0), 5.0)[kind]
    assert found["own"] == found["random"] == found["swapped_picture"] == 1 and found["swapped_condition"] == 0


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_rest_is_what_the_code_of_the_label_conceals(kind: str) -> None:
    found = probe_target(pooled(seen=9, given=9, apart=False), 20.0)[kind]
    assert found["rest"] == 1 and found["random"] <= found["rest"] and found["swapped_condition"] == 1


def test_every_strength_is_probed_and_chance_is_that_of_the_commonest_class() -> None:
    made = pooled(seen=3, given=1)
    found = probe_all(made, (1.0, 2.5))
    assert list(found["f_g"]) == ["1", "2.5"] and 0.5 < found["f_u"]["ridge"] < 1
    alone = probe_all(made._replace(own=None, drawn=None), ())
    assert alone == {"f_u": found["f_u"]}
    labels = torch.tensor([0, 0, 1, 2, 0, 1, 1])
    assert chance(labels, torch.tensor([True] * 4 + [False] * 3)) == pytest.approx(1 / 3)


def test_swap_needs_other_labels() -> None:
    made = pooled(seen=3, given=1)
    found = probe_target(made._replace(others=made.labels, drawn=made.own), 1.0)["ridge"]
    assert found["swapped_picture"] is None and found["swapped_condition"] is None and found["own"] == found["random"]
