"""Token routing: which tokens skip which blocks, and that the others compute what they would compute alone."""

import pytest
import torch

from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage2
from selftrans.models.compiling import compile_model
from selftrans.models.routing import Route, chosen_route
from selftrans.models.sit import SiTConfig, build
from selftrans.train.flops import forward_flops, training_flops
from selftrans.types import Batch, Conditions
from tests.support.diffusers_blocks import randomised
from tests.support.label_models import inputs, tiny
from tests.support.operations import sit_forward_flops

ROUTE = Route(0.25, 2, 3)  # of four blocks; 12 of 16 tokens stay


def routed(family="SiT"):
    model = randomised(tiny(family, shape=(2, 8, 8), qk_norm=True)).train()
    model.route = ROUTE
    return model


@pytest.mark.parametrize(
    ("depth", "blocks", "expected"),
    [(12, None, (3, 8)), (28, None, (3, 24)), (6, None, (2, 5)), (3, None, (2, 2)), (12, (4, 12), (4, 12))],
)
def test_blocks_that_are_skipped(depth, blocks, expected):
    assert chosen_route(0.5, blocks, depth) == (0.5, *expected)
    assert chosen_route(0.0, blocks, depth) is None


@pytest.mark.parametrize(
    ("share", "blocks", "depth", "message"),
    [
        (1.0, None, 12, "model.route 1.0 must be from 0 to below 1"),
        (-0.1, None, 12, "model.route -0.1 must be"),
        (0.5, None, 2, "needs blocks to skip, not 2 to 1 of 2; give model.route_blocks"),
        (0.5, (0, 3), 6, "not 0 to 3 of 6; give two increasing blocks within 1..6"),
        (0.5, (4, 7), 6, "not 4 to 7 of 6"),
        (0.5, (4, 3), 6, "not 4 to 3 of 6"),
    ],
)
def test_routes_that_do_not_fit_the_model_are_refused(share, blocks, depth, message):
    with pytest.raises(ValueError, match=message):
        chosen_route(share, blocks, depth)
    with pytest.raises(ValueError, match=message):
        SiTConfig(width=32, depth=depth, route=share, route_blocks=blocks).check()


def test_no_token_left_is_refused():
    model = tiny("SiT").train()  # 4 tokens
    model.route = Route(0.9, 2, 3)
    with pytest.raises(ValueError, match=r"model.route 0.9 leaves none of 4 tokens"):
        model(*inputs(model))


def test_the_choice_is_random_for_each_sample_and_follows_the_generator():
    torch.manual_seed(3)
    kept = Route(0.5, 1, 1).draw(4000, 8, torch.device("cpu"))
    assert kept.shape == (4000, 4) and bool((kept.diff(dim=1) > 0).all())
    counts = torch.bincount(kept.flatten(), minlength=8)  # binomial, 4000 draws of 1/2: deviation 32
    assert bool(((counts - 2000).abs() < 160).all())
    torch.manual_seed(3)
    assert torch.equal(Route(0.5, 1, 1).draw(4000, 8, torch.device("cpu")), kept)


@pytest.mark.parametrize("family", ["SiT", "LightningDiT"])
def test_blocks_compute_the_kept_tokens_alone_and_routed_tokens_return_unchanged(family):
    model = routed(family)
    x, t, y = inputs(model)
    torch.manual_seed(5)
    out = model(x, t, y, taps=(1, 2, 3, 4))
    torch.manual_seed(5)
    kept = ROUTE.draw(3, 16, x.device)
    c = model.t_embedder(t) + model.y_embedder(y)
    for i in range(3):
        tokens = model.embed(x)[0][i : i + 1]
        given = model.block_inputs(model.grid)
        tokens = model.blocks[0](tokens, c[i : i + 1], *given)
        some = tokens[:, kept[i]]
        for k in (2, 3):
            some = model.blocks[k - 1](some, c[i : i + 1], *(table[:, kept[i]] for table in given))
            expected = tokens.clone()
            expected[:, kept[i]] = some
            torch.testing.assert_close(out.feats[k][i : i + 1], expected, rtol=1e-5, atol=2e-4)
        away = [j for j in range(16) if j not in kept[i].tolist()]
        assert torch.equal(out.feats[3][i, away], out.feats[1][i, away])
        last = model.blocks[3](expected, c[i : i + 1], *given)
        torch.testing.assert_close(out.feats[4][i : i + 1], last, rtol=1e-5, atol=2e-4)  # up to 110


def test_nothing_is_routed_or_drawn_outside_training():
    model, plain = routed().eval(), routed().eval()
    plain.route = None
    before = torch.get_rng_state()
    assert torch.equal(model(*inputs(model)).v, plain(*inputs(model)).v)
    assert torch.equal(torch.get_rng_state(), before)


def test_operations_of_training_count_only_the_kept_tokens():
    model = routed()
    two = [sit_forward_flops(n, 48, 2, 8) - sit_forward_flops(n, 48, 0, 8) for n in (16, 12)]
    cond = torch.zeros(1, dtype=torch.long)
    assert forward_flops(model, cond) == sit_forward_flops(16, 48, 4, 8)
    assert training_flops(model, cond) == 3 * (sit_forward_flops(16, 48, 4, 8) - two[0] + two[1])


def test_guidance_in_the_range_reaches_every_token():
    model = routed()
    teacher = Frozen(tiny("SiT", shape=(2, 8, 8)), 3)
    objective = Objective(model, [SelfGuidance(model, teacher, Stage2(student_block=2, head_width=8))])
    x, _, y = inputs(model, 8)
    seen = []
    model.x_embedder.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0]))
    term = objective(Batch(x, y), 0)[0]
    term.backward()
    assert all(p.grad is not None for p in model.parameters()) and bool((seen[0] != 0).all())


def test_compiled_blocks_have_one_graph_for_each_number_of_tokens(monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options)
    )
    torch.compiler.reset()
    model = routed()
    x, t, y = inputs(model)
    torch.manual_seed(5)
    expected = model(x, t, y).v
    compile_model(model)
    for _ in range(3):
        torch.manual_seed(5)
        torch.testing.assert_close(model(x, t, y).v, expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    assert len(graphs) == 3, "and one for the last layer"


def test_a_built_model_has_the_route_of_its_settings():
    config = SiTConfig(width=32, depth=6, heads=2, route=0.5, route_blocks=(3, 4))
    assert build(config, (1, 8, 8), Conditions("labels", 10)).route == Route(0.5, 3, 4)
    assert config.ineffective() == {} and "route_blocks" in SiTConfig(route_blocks=(3, 4)).ineffective()
