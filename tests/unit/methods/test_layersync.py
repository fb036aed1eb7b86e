"""LayerSync against its formula in loops over named axes."""

import numpy as np
import pytest

from selftrans import Objective, SiT
from selftrans.methods.layersync import LayerSync, LayerSyncGuidance
from tests.support.stub import Stub, cosine_by_hand, features_by_hand, handmade_draw
from tests.support.toy import assert_same_run, log, quick, toy  # noqa: F401 - quick is a fixture

TIMES = [0.1, 0.4, 0.55, 0.7, 0.9, 0.3]


def test_layersync_by_hand():
    """Mean over samples and tokens of one minus the cosine over channels."""
    student, d = Stub(), handmade_draw(TIMES, dropped=(2,))
    g = LayerSyncGuidance(student, LayerSync(block=1, target_block=3, weight=0.3))
    expected = np.mean(
        [
            1 - cosine_by_hand(x, y)
            for i in range(6)
            for x, y in zip(features_by_hand(d, i, 1), features_by_hand(d, i, 3), strict=True)
        ]
    )
    loss, report = Objective(student, [g]).losses(d, 0)
    assert report["layersync"].item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(report["flow"].item() + 0.3 * expected, rel=1e-5)


def test_layersync_sends_no_gradient_to_the_deeper_block():
    """c reaches the loss through h_3 alone, and h_3 is detached."""
    student, d = Stub(), handmade_draw(TIMES)
    g = LayerSyncGuidance(student, LayerSync(block=2, target_block=3))
    term, _ = g(d, student(d.zt, d.t, d.dropped, taps=g.taps).feats)
    term.backward()
    assert student.c.grad is None and student.a.grad.abs() > 0 and student.b.grad.abs() > 0


@pytest.mark.parametrize(("depth", "blocks"), [(12, (4, 7)), (28, (8, 16))])
def test_default_blocks_are_the_published_ones(depth, blocks):
    g = LayerSyncGuidance(SiT((4, 4, 4), 3, width=16, depth=depth, heads=2, patch=2), LayerSync())
    assert (g.block, g.target) == blocks


def test_block_that_is_not_below_its_target_is_refused():
    with pytest.raises(ValueError, match="must be below"):
        LayerSyncGuidance(Stub(), LayerSync(block=3, target_block=2))
