"""Two processes on one machine (gloo): same gradients as one process, and an ordinary run directory."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from selftrans.checkpoints.format import newest
from selftrans.flow import LINEAR, interpolate
from selftrans.methods import objective
from selftrans.methods.dispersive import Dispersive, DispersiveGuidance
from selftrans.methods.guidance import Frozen
from selftrans.methods.layersync import LayerSync, LayerSyncGuidance
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.methods.sra import SRA, SRAGuidance
from selftrans.methods.timestep_range import TimestepRange
from selftrans.models.sit import SiT
from selftrans.train.processes import accelerator_of, distributed
from selftrans.train.run import train
from selftrans.types import Batch, Draw
from tests.support import toy
from tests.support.processes import ranks, spawn
from tests.support.toy import quick  # noqa: F401 - a fixture

SHAPE, CLASSES, N = (2, 4, 4), 5, 12


def build(kind: str) -> Objective:
    """A student with a guidance, its zero-initialised gates made nonzero so that gradients reach every parameter."""
    torch.manual_seed(0)
    student, teacher = (SiT(SHAPE, CLASSES, width=16, depth=3, heads=2, patch=2) for _ in range(2))
    for p in [*student.parameters(), *teacher.parameters()]:
        p.data += 0.05 * torch.randn_like(p)
    where = None if kind.endswith("everywhere") else (0.3, 0.75)
    config = Stage2(timestep_range=where, scale=3.0, until_step=2, head_width=8)
    guidance = {
        "stage 1": lambda: StructureGuidance(student, Stage1(timestep_range=where, head_width=8)),
        "stage 2": lambda: SelfGuidance(student, Frozen(teacher, 2), config),
        "sra": lambda: SRAGuidance(student, SRA(span=0.0, head_width=8, until_step=2)),  # span 0: no random times
        "layersync": lambda: LayerSyncGuidance(student, LayerSync(block=1, target_block=2)),
        "dispersive": lambda: DispersiveGuidance(student, Dispersive(block=2)),
    }[kind.partition(",")[0]]()
    built = Objective(student, [guidance])
    built.watch(teacher)  # used as the moving average
    return built


def by_row(batch, null, **_):
    """A draw that is a function of each sample alone. Its times are even, so that a range has a capacity."""
    z0, cond, rows = batch  # passed as features
    noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(int(i))) for i in rows])
    t = (rows.float() + 0.5) / N
    dropped = torch.where(rows % 4 == 0, null, cond)
    return Draw(z0, noise, t, *interpolate(LINEAR, z0, noise, t), cond, null, dropped, even=True)


def gradients(wrapped, micros: list[torch.Tensor], steps=(0, 2)) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss of these micro-batches, while guidance acts (step 0) and after its end (step 2)."""
    z0 = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(1))
    found = {}
    for step in steps:
        inner = getattr(wrapped, "module", wrapped)
        if inner.retire(step) and wrapped is not inner:
            wrapped = ddp(inner)
        wrapped.zero_grad(set_to_none=True)
        for rows in micros:
            context = wrapped.no_sync() if wrapped is not inner and rows is not micros[-1] else contextlib.nullcontext()
            with context:
                (wrapped(Batch(z0[rows], rows % CLASSES, rows), step)[0] / len(micros)).backward()
        found |= {f"{step}/{name}": p.grad.clone() for name, p in inner.named_parameters()}
    return found


def ddp(module: Objective) -> DistributedDataParallel:
    """As in a run of two processes: gradients lie in the buckets that are sent."""
    wrapped = distributed(module, SimpleNamespace(num_processes=2))
    assert isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view
    return wrapped


def share(rank: int, kind: str) -> list[torch.Tensor]:
    """Micro-batches of a process: every second row, so that its times are even as well; accumulated: two of them."""
    mine = torch.arange(N)[rank::2]
    return [mine[0::2], mine[1::2]] if kind.endswith("accumulated") else [mine]


def train_half(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    objective.draw = by_row
    for kind in (*KINDS, "dispersive"):
        mine = gradients(ddp(build(kind)), share(rank, kind))
        save_file(mine, f"{folder}/{kind}-{rank}.safetensors")
    dist.destroy_process_group()


KINDS = (
    *("stage 1", "stage 1, everywhere", "stage 1, accumulated"),
    *("stage 2", "stage 2, everywhere", "stage 2, accumulated"),
    *("sra", "layersync"),
)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A folder with the gradients of two processes, for each kind."""
    folder = tmp_path_factory.mktemp("halves")
    spawn(train_half, str(folder))
    return folder


def assert_close(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> None:
    assert mine.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(mine[name], expected[name], rtol=1e-4, atol=1e-7, msg=f"{kind}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_two_processes_equal_those_of_one_with_the_full_batch(halves, monkeypatch, kind):
    monkeypatch.setattr(objective, "draw", by_row)
    full = gradients(build(kind), [torch.arange(N)])
    assert any("head" in name for name in full) == (kind != "layersync")
    assert all(gradient.abs().max() > 0 for name, gradient in full.items() if name.startswith("0/"))
    for rank in range(2):
        assert_close(load_file(halves / f"{kind}-{rank}.safetensors"), full, kind)


def test_a_single_process_trains_the_objective_itself(tmp_path):
    built = build("layersync")
    assert distributed(built, accelerator_of(toy.toy(), tmp_path)) is built


def test_range_needs_a_padding_row_in_one_process_only():
    """Covered by the comparison above: 6 of 12 rows are computed, 3 in each process; 5 have a gain, 3 and 2."""
    for rows, counted in ((range(12), 5), (range(0, 12, 2), 3), (range(1, 12, 2), 2)):
        batch = Batch(torch.zeros(len(rows), *SHAPE), torch.zeros(len(rows)), torch.tensor(list(rows)))
        found = TimestepRange((0.3, 0.75), "select").gate(by_row(batch, torch.zeros(len(rows))))
        assert len(found.rows) == len(rows) // 2 and int((found.gain > 0).sum()) == counted


@pytest.mark.slow
def test_dispersive_compares_the_samples_of_each_process_alone(halves, monkeypatch):
    """The term is a statistic of the batch of one process; its gradient is the mean over processes."""
    monkeypatch.setattr(objective, "draw", by_row)
    apart = [gradients(build("dispersive"), share(rank, "dispersive")) for rank in range(2)]
    expected = {name: (apart[0][name] + apart[1][name]) / 2 for name in apart[0]}
    mine = load_file(halves / "dispersive-0.safetensors")
    assert_close(mine, expected, "dispersive")
    full = gradients(build("dispersive"), [torch.arange(N)])
    assert max((mine[name] - full[name]).abs().max().item() for name in full) > 1e-3


@pytest.mark.slow
def test_run_of_two_processes_is_continued_by_one(tmp_path, capsys):
    argv = ["train", "digits", f"--data={toy.digits()}", f"--out={tmp_path / 'run'}", *toy.flags(), "--train.steps=7"]
    with ranks(argv, tmp_path / "output") as pair:
        assert [process.ends() for process in pair] == [0, 0]
    output = "".join(process.output.read_text() for process in pair)
    assert output.count("[2/2] stage2") == output.count("done: 7 student steps") == 1
    for stage, steps in {"stage1": [2, 4], "stage2": [2, 4, 6, 7]}.items():
        assert [line["step"] for line in toy.log(tmp_path / "run", stage)] == steps
        found = newest(tmp_path / "run" / stage / "checkpoints")
        assert found.step == steps[-1] and found.state["processes"] == 2
    assert not any("module." in name for name in toy.tensors(tmp_path / "run"))
    assert toy.tensors(tmp_path / "run").keys() == toy.tensors(toy.finished()).keys()
    mine, alone = (toy.log(run, "stage1")[-1]["flow"] for run in (tmp_path / "run", toy.finished()))
    assert mine == pytest.approx(alone, rel=0.15) and mine != alone  # other noise, similar loss
    train(toy.toy(), tmp_path / "run")
    output = capsys.readouterr().out
    assert output.count("resuming with 1 process instead of 2: nothing is lost") == 1
    assert [line["step"] for line in toy.log(tmp_path / "run")] == [2, 4, 6, 7, 8]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["student_steps"] == 8
