"""Training scripts as other projects write them, with guidance added: their model, average, checkpoint, DDP and own loss.

The script's model has what DiT and its descendants have: time runs from noise to data, labels are dropped inside the model in
training, positions are a parameter without gradient, and the first layer of the label's table is one row longer.
Shape legend: N batch, T tokens, D width, (C, H, W) latent.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selftrans import (
    Batch,
    Conditions,
    Frozen,
    HookedBackbone,
    Objective,
    SelfGuidance,
    SiT,
    Stage1,
    Stage2,
    StructureGuidance,
)
from tests.support.pages import blocks
from tests.support.processes import free_port, spawn

CLASSES, WIDTH, DEPTH, N = 5, 16, 4, 40
SPAN, WEIGHT, W = (0.4, 0.7), 0.5, 3.0


class Labels(nn.Module):
    def __init__(self, dropout_prob):
        super().__init__()
        self.embedding_table, self.dropout_prob = nn.Embedding(CLASSES + 1, WIDTH), dropout_prob

    def forward(self, y):
        if self.training and self.dropout_prob:
            y = torch.where(torch.rand(len(y)) < self.dropout_prob, CLASSES, y)
        return self.embedding_table(y)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(4, 4), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, h, c):
        h = h + self.mix((h + c).transpose(1, 2)).transpose(1, 2)
        return h + self.down(F.gelu(self.up(h)))


class Net(nn.Module):
    """The script's model of latents (2, 4, 4); `outputs` channels are predicted for each of the two."""

    def __init__(self, outputs=1, dropout_prob=0.1, depth=DEPTH):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH), requires_grad=False)
        self.embed, self.time, self.label = nn.Linear(8, WIDTH), nn.Linear(1, WIDTH), Labels(dropout_prob)
        self.blocks = nn.ModuleList(Layer() for _ in range(depth))
        self.out = nn.Linear(WIDTH, 8 * outputs)

    def forward(self, x, t, y):
        h = self.embed(F.unfold(x, 2, stride=2).transpose(1, 2)) + self.positions
        c = (self.time(t[:, None]) + self.label(y))[:, None]
        for block in self.blocks:
            h = block(h, c)
        return F.fold(self.out(h).transpose(1, 2), (4, 4), 2, stride=2)


def net(seed, **options):
    torch.manual_seed(seed)
    return Net(**options)


def wrap(net, call=lambda net, x, t, y: -net(x, 1 - t, y)):
    return HookedBackbone(
        net,
        blocks="blocks",
        call=call,
        shape=(2, 4, 4),
        grid=(2, 2),
        width=WIDTH,
        conditions=Conditions("labels", CLASSES),
    )


def guidance(stage, student, teacher, **options):
    torch.manual_seed(3)
    if stage == 1:
        return StructureGuidance(student, Stage1(head_width=8, **options))
    return SelfGuidance(student, Frozen(wrap(teacher), 3), Stage2(scale=W, head_width=8, **options))


def batch():
    g = torch.Generator().manual_seed(4)
    return torch.randn(N, 2, 4, 4, generator=g), torch.arange(N) % CLASSES


def own_draw():
    """Times of the script (1 is data) and noise."""
    g = torch.Generator().manual_seed(5)
    return torch.rand(N, generator=g), torch.randn(N, 2, 4, 4, generator=g)


# ---- the formulas, on the script's model as it was before


def hidden(net, k, *inputs):
    """Output (N, T, D) of block k, by a hook of torch."""
    seen = []
    handle = net.blocks[k - 1].register_forward_hook(lambda module, args, output: seen.append(output))
    net(*inputs)
    handle.remove()
    return seen[0]


def mlp(head, h):
    for i in (0, 2, 4):
        h = h @ head[i].weight.T + head[i].bias
        h = h * torch.sigmoid(h) if i < 4 else h
    return h


def structure_by_hand(head, h, target):
    """|W LN(P(h)) - patchify(target)|² of each sample."""
    z = mlp(head[0], h)
    z = (z - z.mean(dim=-1, keepdim=True)) / (z.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    cells = [target[:, :, i : i + 2, j : j + 2].flatten(start_dim=1) for i in (0, 2) for j in (0, 2)]
    return (z @ head[2].weight.T + head[2].bias - torch.stack(cells, dim=1)).square().mean(dim=(1, 2))


def self_by_hand(head, h, conditional, unconditional):
    return (mlp(head, h) - unconditional - W * (conditional - unconditional)).square().mean(dim=(1, 2))


def gated(errors, t):
    """lambda times the mean over the batch of the errors inside the range."""
    return WEIGHT * (errors * ((t >= SPAN[0]) & (t <= SPAN[1]))).sum() / N


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_is_that_of_the_script_plus_the_term_of_the_formula(stage):
    """With the script's own times and noise. The package's own model, given the same weights, is not needed for it."""
    model, teacher = net(0).eval(), net(1).eval()
    before, teacher_before = copy.deepcopy(model), copy.deepcopy(teacher)
    student, (x, y), (s, noise) = wrap(model), batch(), own_draw()
    objective = Objective(student, [guidance(stage, student, teacher)], drop=0)
    found, report = objective(objective.draw(Batch(x, y), t=1 - s, noise=noise), 0)

    point = s.view(N, 1, 1, 1) * x + (1 - s.view(N, 1, 1, 1)) * noise
    flow = (before(point, s, y) - (x - noise)).square().mean()
    head = objective.guidances[0].head
    if stage == 1:
        errors = structure_by_hand(head, hidden(before, 2, point, s, y), noise - x)
    else:
        f_c, f_u = (hidden(teacher_before, 3, point, s, label) for label in (y, torch.full_like(y, CLASSES)))
        errors = self_by_hand(head, hidden(before, 2, point, s, y), f_c, f_u)
    torch.testing.assert_close(report["flow"], flow.detach())
    torch.testing.assert_close(found, flow + gated(errors, 1 - s))


def test_a_script_that_predicts_noise_and_variance_keeps_its_loss():
    """A discrete schedule, as DDPM has it: the point is not on a path of ours, and the output has twice the channels."""
    model, teacher = net(0, outputs=2).eval(), net(1, outputs=2).eval()
    before, teacher_before = copy.deepcopy(model), copy.deepcopy(teacher)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0).sqrt()
    (x, y), (s, noise) = batch(), own_draw()
    number = (1000 * s).long().clamp(max=999)
    point = kept[number].view(N, 1, 1, 1) * x + (1 - kept[number] ** 2).sqrt().view(N, 1, 1, 1) * noise

    def loss(output, d):
        assert torch.equal((1000 * d.t).round().long(), number)
        mean, variance = output.chunk(2, dim=1)
        return (mean - d.noise).square().mean() + 0.1 * variance.exp().mean()

    def call(net, x, t, y):
        return net(x, 1000 * t, y)

    student = wrap(model, call)
    frozen = Frozen(wrap(teacher, call), 3)
    objective = Objective(student, [SelfGuidance(student, frozen, Stage2(scale=W, head_width=8))], drop=0, loss=loss)
    d = objective.draw(Batch(x, y), t=number / 1000, noise=noise)._replace(zt=point)
    found, report = objective(d, 0)

    mean, variance = before(point, number.float(), y).chunk(2, dim=1)
    own = (mean - noise).square().mean() + 0.1 * variance.exp().mean()
    f_c, f_u = (hidden(teacher_before, 3, point, number.float(), c) for c in (y, torch.full_like(y, CLASSES)))
    errors = self_by_hand(objective.guidances[0].head, hidden(before, 2, point, number.float(), y), f_c, f_u)
    torch.testing.assert_close(report["flow"], own.detach())
    torch.testing.assert_close(found, own + gated(errors, number / 1000))


# ---- labels, teacher, average


def test_labels_are_dropped_by_the_model_alone_and_never_for_the_teacher():
    model, teacher = net(0, dropout_prob=0.5), net(1, dropout_prob=0.5)
    student, (x, y), seen = wrap(model), batch(), {"student": [], "teacher": []}
    with pytest.warns(
        UserWarning, match=r"net\.label drops labels with probability 0\.5, besides the objective's 0\.1"
    ):
        Objective(student)
    with pytest.warns(UserWarning, match=r"set its dropout_prob to 0, or give Objective\(drop=0\)"):
        Objective(student, drop=0.2)
    objective = Objective(student, [guidance(2, student, teacher)], drop=0).train()
    for name, each in (("student", student), ("teacher", objective.guidances[0].teacher.model)):
        each.net.label.embedding_table.register_forward_hook(lambda m, args, out, name=name: seen[name].append(args[0]))
    for _ in range(25):
        objective(Batch(x, y), 0)
    assert 0.45 < (torch.cat(seen["student"]) == CLASSES).float().mean() < 0.55
    for labels in seen["teacher"]:
        true, null = labels.chunk(2)
        assert (true < CLASSES).all() and (null == CLASSES).all()


def script(state, steps):
    """The loop of a script with guidance: two stages share it. Returns what it would save, in the format it always had."""
    model = net(0)
    average = copy.deepcopy(model).requires_grad_(False)
    student = wrap(model)
    objective = Objective(student, [guidance(2, student, net(1), until_step=4)], times="uniform", drop=0)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    first, heads = 0, objective.guidances
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["opt"])
        heads.load_state_dict(state["heads"])
        first = state["steps"]
    for step in range(first, steps):
        torch.manual_seed(100 + step)
        loss, _ = objective(Batch(*batch()), step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)
    saved = {"model": model, "ema": average, "opt": optimizer, "heads": heads}
    return {name: copy.deepcopy(each.state_dict()) for name, each in saved.items()} | {"steps": steps}


@pytest.mark.parametrize("stop", [2, 5])
def test_a_script_that_is_resumed_equals_one_that_is_not(stop):
    """Also from a state after the end of the term. Model and average keep the names that they had without guidance."""
    whole, halves = script(None, 7), script(script(None, stop), 7)
    assert list(whole["model"]) == list(whole["ema"]) == list(net(0).state_dict())
    for name in ("model", "ema", "heads"):
        assert all(map(torch.equal, whole[name].values(), halves[name].values())), name
    assert not any("teacher" in name for name in whole["heads"])
    trained = [p for p in net(0).parameters() if p.requires_grad]
    assert len(whole["opt"]["param_groups"][0]["params"]) == len(trained) + 6, "of the teacher nothing, of the head six"
    assert not torch.equal(whole["model"]["out.weight"], whole["ema"]["out.weight"])


def test_loop_of_the_page_trains_both_stages(tmp_path, monkeypatch):
    """The block of docs/library.md, at the sizes of this script's model."""
    (text,) = (block.text for block in blocks("docs/library.md") if "test_own_loops.py" in block.skipped)
    for shown, small in (
        ("(4, 32, 32)", "(2, 4, 4)"),
        ("(16, 16)", "(2, 2)"),
        ("1152", str(WIDTH)),
        ("1000", str(CLASSES)),
        ("block=18", "block=3"),
    ):
        assert shown in text
        text = text.replace(shown, small)
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{free_port()}")
    try:
        for stage, name in ((1, "structure"), (2, "self")):
            model = net(stage)
            scope = {
                "torch": torch,
                "stage": stage,
                "model": model,
                "average": copy.deepcopy(model).requires_grad_(False),
            }
            scope |= {"loader": [batch()] * 2, "update_average": lambda average, model: None}
            exec(compile(text, "library.md", "exec"), scope)
            assert name in scope["report"]
            assert torch.load(f"stage{stage}.pt")["model"].keys() == net(0).state_dict().keys()
        taught, saved = scope["guidance"].teacher.model.net.state_dict(), torch.load("stage1.pt")["model"]
        assert all(torch.equal(taught[n], saved[n]) for n in taught) and "blocks.3.up.weight" not in taught
    finally:
        dist.destroy_process_group()


# ---- DDP, and compilation of the whole


def losses(rank, world, wrapper):
    """Gradients (by name) at the two steps after the term has ended, each process on its part of the batch."""
    model = net(0, dropout_prob=0.0)
    student = wrap(model)
    objective = Objective(student, [guidance(2, student, net(1), until_step=1)], drop=0)
    wrapped, (x, y), (s, noise), found = wrapper(objective), batch(), own_draw(), {}
    rows = slice(rank * N // world, (rank + 1) * N // world)
    for step in range(3):
        objective.zero_grad()
        d = objective.draw(Batch(x[rows], y[rows]), t=s[rows], noise=noise[rows])
        loss, report = wrapped(d, step)
        assert ("self" in report) is (step == 0)
        loss.backward()
        named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        found |= {f"{step}/{n}": torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
    return found


def two(rank, folder):
    dist.init_process_group("gloo")
    save_file(losses(rank, 2, DistributedDataParallel), f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_past_the_end_of_the_term_without_another_wrapping(tmp_path):
    """DDP refuses parameters without a gradient: those of a head that has ended get zeros, and the others their own."""
    spawn(two, str(tmp_path))
    expected = losses(0, 1, lambda objective: objective)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(expected[name].any() for name in expected if name.startswith("0/guidances"))


@pytest.mark.slow
def test_a_compiled_objective_compiles_the_blocks_once_and_not_their_reading():
    """Of a model with more blocks than dynamo compiles variants of a function."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    model = net(0, depth=24, dropout_prob=0.0)
    student, found = wrap(model), []
    objective = Objective(student, [guidance(2, student, net(1, depth=24))], drop=0)
    d = objective.draw(Batch(*batch()))
    dynamo.reset()
    counters.clear()
    with dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for compiled in (False, True):
            if compiled:
                objective.compile(backend="aot_eager")
            objective.zero_grad()
            loss, _ = objective(d, 0)
            loss.backward()
            found.append([loss, *(p.grad for p in objective.parameters() if p.requires_grad)])
    assert counters["stats"]["unique_graphs"] < 24
    for compiled, eager in zip(*reversed(found), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-6)


def test_a_script_may_use_the_packages_model_in_place_of_its_own():
    student, (x, y) = SiT((2, 4, 4), CLASSES, width=16, depth=4, heads=2, patch=2), batch()
    objective = Objective(student, [guidance(1, student, None)], loss=lambda v, d: (v - d.v).abs().mean())
    loss, report = objective(Batch(x, y), 0)
    assert loss.item() == pytest.approx((report["flow"] + WEIGHT * report["structure"]).item())
