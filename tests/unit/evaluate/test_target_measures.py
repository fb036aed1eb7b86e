"""Sums over batches: sizes computed by hand, batches of any size, features without a condition."""

from __future__ import annotations

import pytest
import torch

from selftrans.evaluate.target_measures import Parts, Plan, sum_target
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


def test_pictures_must_be_held_out() -> None:
    for fitted in (torch.ones(60, dtype=torch.bool), torch.zeros(60, dtype=torch.bool)):
        with pytest.raises(ValueError, match="others that are held out"):
            sum_target(parts(9), Plan(fitted, 2, (), None))
