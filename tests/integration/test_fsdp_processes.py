"""Corner cases of FSDP2 on two gloo processes: switching to and from DDP, empty or non-finite shards, ended guidance."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from selftrans.checkpoints.format import newest
from selftrans.methods import objective as objective_module
from selftrans.train.fsdp import gather_model, local, release, shard_models
from selftrans.train.nonfinite import check_weights
from selftrans.train.run import train
from selftrans.types import Backbone, Batch
from tests.integration import test_distributed as two
from tests.support import toy
from tests.support.processes import spawn
from tests.support.toy import quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def work(rank: int, folder: str, data: str) -> None:
    """One of two processes, which run all checks of this file: writes a file for each check that passed."""
    switch_between_sharded_and_ddp(Path(folder), data)
    for part in PARTS:
        part(rank)
        Path(folder, f"{part.__name__}-{rank}").touch()
    dist.destroy_process_group()


def switch_between_sharded_and_ddp(folder: Path, data: str) -> None:
    dotted = {"stage2.until_step": 6, "train.checkpoint_every": 4, "data.path": data}
    for steps, kinds in ((4, (False, True)), (8, (True, False))):
        for name, kind in zip(("ddp, then sharded", "sharded, then ddp"), kinds, strict=True):
            train(toy.toy(dotted | {"train.steps": steps, "train.shard": kind}), folder / name, quiet=True)


class TwoLayers(Backbone):
    """Parameters alone: 1 x 3 weights, of which the second of two processes has no row, and 4 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(1, 4)


def weights_that_are_not_finite(rank: int) -> None:
    model = TwoLayers()
    shard_models(model, device=CPU, processes=2)
    parameters = list(model.parameters())
    assert local(parameters[0]).numel() == (3 if rank == 0 else 0)
    check_weights(parameters, "the start")
    with torch.no_grad():
        local(parameters[2])[0, 0] = float("nan") if rank == 1 else 1.0
    with pytest.raises(
        FloatingPointError, match="no longer finite at step 5"
    ):  # in both processes, or one would wait without end
        check_weights(parameters, "step 5")


def guidance_that_ends(rank: int) -> None:
    objective_module.draw = two.by_row
    objective = two.build("stage 2")
    references = [weakref.ref(objective.guidances[0].head), weakref.ref(objective.guidances[0].teacher.model)]
    shard_models(objective, device=CPU, processes=2)
    rows = torch.arange(two.N)[rank::2]
    batch = Batch(torch.randn(len(rows), *two.SHAPE), rows % two.CLASSES, rows)
    objective(batch, 0)[0].backward()
    assert all(reference() is not None for reference in references)
    assert objective.retire(2)
    release(objective)
    assert all(reference() is None for reference in references)
    objective(batch, 2)[0].backward()
    assert all(p.grad is not None for p in objective.parameters())


def model_that_is_gathered(rank: int) -> None:
    """For a preview, which the first process makes: only that one needs memory for the full weights."""
    torch.manual_seed(0)
    model = TwoLayers()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard_models(model, device=CPU, processes=2)
    found = gather_model(model, TwoLayers)
    assert (found is model) == (rank == 1)
    if rank == 0:
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        toy.assert_same(found.state_dict(), expected)


PARTS = (weights_that_are_not_finite, guidance_that_ends, model_that_is_gathered)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    spawn(work, str(folder), str(toy.digits()))
    return folder


def test_runs_switch_between_sharded_and_ddp(results):
    """Each continues from the checkpoint of the other, beyond the end of the guidance, to the same weights."""
    runs = [results / name for name in ("ddp, then sharded", "sharded, then ddp")]
    found = [toy.tensors(run) for run in runs]
    assert found[0].keys() == found[1].keys() and not any(name.startswith("heads/") for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert [newest(run / "stage2" / "checkpoints").step for run in runs] == [8, 8]
    assert all([line["step"] for line in toy.log(run)] == [2, 4, 6, 8] for run in runs)


@pytest.mark.parametrize("check", PARTS)
def test_checks_in_both_processes(results, check):
    """Weights are checked where a process has no rows, or only one has NaN; memory of heads and teacher is freed."""
    assert [(results / f"{check.__name__}-{rank}").exists() for rank in (0, 1)] == [True, True]
