"""Sums over batches: sizes by hand, batches of any size, features without a condition. Probes of features made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selftrans.evaluate.target_measures import Parts, Plan, Pooled, chance, probe_all, probe_target, sum_target
from selftrans.evaluate.target_share import Design

LABELS = torch.arange(60) % 3
FITTED = torch.arange(60) < 45


def plan(scales=(1.0, 4.0), probes=True) -> Plan:
    others = LABELS.roll(1)
    return Plan(FITTED, 2, scales, Design.of_labels(LABELS), LABELS if probes else None, others if probes else None)


def parts(size: int, condition: bool = True, last: int = 60):
    make = torch.Generator().manual_seed(0)
    u, own, drawn = torch.randn(3, 2, 60, 4, 6, generator=make)
    for rows in (*torch.arange(45).split(size), *torch.arange(45, last).split(size)):
        for time in range(2):
            d = {5: own[time, rows]} if condition else None
            yield Parts(rows, time, {5: u[time, rows]}, d, {5: drawn[time, rows]} if condition and not time else None)


def test_report_does_not_depend_on_the_batches() -> None:
    one, many = (sum_target(parts(size), plan())[5].report() for size in (60, 7))
    assert one["probes"] == many["probes"] and one["shares"].keys() == {"time", "condition", "condition_time"}
    for name, shares in one["shares"].items():
        for w, pair in shares.items():
            assert many["shares"][name][w] == pytest.approx(pair, abs=1e-5)
    assert list(one["shares"]["time"]) == ["0", "1", "4", "difference"]


def test_sizes_are_those_computed_by_hand() -> None:
    def fixed():
        for rows in (torch.arange(45), torch.arange(45, 60)):
            for time in range(2):
                u, d = torch.zeros(2, len(rows), 4, 6)
                u[..., 0], d[..., 1] = 3, 1  # norms 3 and 1, at right angles
                yield Parts(rows, time, {2: u}, {2: d}, {2: d})

    sizes = sum_target(fixed(), plan(probes=False))[2].report()["sizes"]
    assert sizes["token_norm"] == pytest.approx({"0": 3, "1": 10**0.5, "4": 5})
    assert sizes["rms_ratio"] == pytest.approx(1 / 3) and sizes["spread_ratio"] is None  # nothing varies


def test_without_a_condition_there_is_no_guidance_to_measure() -> None:
    found = sum_target(parts(9, condition=False), plan(scales=()))[5].report()
    assert list(found["shares"]["condition"]) == ["0"] and list(found["sizes"]) == ["token_norm"]
    assert list(found["probes"]) == ["f_u"]
    bare = Plan(FITTED, 2, (), None)
    found = sum_target(parts(9, condition=False), bare)[5].report()
    assert list(found["shares"]) == ["time"] and "probes" not in found


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
