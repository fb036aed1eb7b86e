"""What holds for all adapters of diffusers' transformers: features, stopping, training, precision, time and sign."""

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from selftrans.config import from_json, to_json
from selftrans.encoders.text import load_text_encoder
from selftrans.flow import interpolate
from selftrans.methods.guidance import Frozen
from selftrans.methods.objective import Objective
from selftrans.methods.self_transcendence import SelfGuidance, Stage1, Stage2, StructureGuidance
from selftrans.models.diffusers_backbone import DiffusersConfig, pooled_text
from selftrans.models.registry import find
from selftrans.recipes import recipe
from selftrans.train.fsdp import gather_full_tensor, shard_models
from selftrans.types import MASK, TEXT, Batch, Conditions, take_cond
from tests.support import captioned
from tests.support.diffusers_models import FAMILIES, LABELS, SHAPE, TEXTS, condition, inputs, original, tiny
from tests.support.processes import spawn


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_features_are_the_latent_tokens_of_the_originals_blocks(family):
    model = tiny(family).double().eval()
    x, t, cond = inputs(model, family, dtype=torch.float64)
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, output: seen.append(output)) for block in model.repeated()]
    original(model, family, x, t, cond)
    for hook in hooks:
        hook.remove()
    expected = [output[1] if isinstance(output, tuple) else output for output in seen]
    feats = model(x, t, cond, taps=(*range(1, model.depth + 1),)).feats
    assert len(expected) == model.depth == len(feats)
    for k, found in feats.items():
        assert found.shape == (2, model.tokens, model.width)
        assert torch.equal(found, expected[k - 1])


def test_stopping_computes_no_further_and_truncation_changes_nothing(family):
    model = tiny(family).eval()
    x, t, cond = inputs(model, family)
    expected = model(x, t, cond, taps=(2,)).feats[2]
    called = []
    for k, block in enumerate(model.repeated(), start=1):
        block.register_forward_hook(lambda *_, k=k: called.append(k))
    found = model(x, t, cond, taps=(1, 2), stop=True)
    assert called == [1, 2] and found.v is None and torch.equal(found.feats[2], expected)
    shallow = model.truncated(2)
    assert len(shallow.repeated()) == 2 and len(model.repeated()) == model.depth
    assert sum(p.numel() for p in shallow.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.equal(shallow(x, t, cond, taps=(2,), stop=True).feats[2], expected)
    with pytest.raises(AssertionError, match="truncated"):
        shallow(x, t, cond)


def test_truncation_within_the_double_blocks_of_flux():
    model = tiny("flux").eval()
    x, t, cond = inputs(model, "flux")
    for block in range(1, 5):
        shallow = model.truncated(block)
        assert len(shallow.repeated()) == block
        expected = model(x, t, cond, taps=(block,)).feats[block]
        assert torch.equal(shallow(x, t, cond, taps=(block,), stop=True).feats[block], expected)


def test_training_mode_draws_nothing(family):
    model = tiny(family, random=True)
    x, t, cond = inputs(model, family, n=16)
    state = torch.get_rng_state()
    with torch.no_grad():
        expected = model.eval()(x, t, cond).v
        assert torch.equal(model.train()(x, t, cond).v, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_stages_train(family):
    teacher, student = tiny(family, random=False), tiny(family, random=False)
    g = torch.Generator().manual_seed(4)
    cond = condition(family, 4)
    cond = cond % 10 if isinstance(cond, torch.Tensor) else cond  # data have no null labels
    batch = Batch(torch.randn(4, *SHAPE, generator=g), cond)
    narrow = {"head_width": 16, "timestep_range": None}
    stages = {
        teacher: lambda: [StructureGuidance(teacher, Stage1(block=1, **narrow))],
        student: lambda: [SelfGuidance(student, Frozen(teacher, block=2), Stage2(student_block=1, **narrow))],
    }
    for model, guidances in stages.items():
        model.use_null(take_cond(batch.cond, torch.tensor([3])))
        objective = Objective(model, guidances())
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        before = copy.deepcopy(model.state_dict())
        for step in range(6):  # zero gates let gradients into the blocks step by step, into the text's last
            loss, _ = objective(batch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        without = {name for name in without if not name.endswith("k.bias")}  # softmax cancels it: rounding alone
        # the last block of SD3 gives no text, so nothing depends on what its text asks for
        assert without == {
            f"net.transformer_blocks.2.attn.add_q_proj.{x}" for x in ("weight", "bias") if family == "sd3"
        }
        assert any(not torch.equal(before[n], v) for n, v in model.state_dict().items() if n.startswith("net."))


def test_recomputed_activations_give_the_same_gradients(family):
    grads = []
    for recompute in (False, True):
        model = tiny(family).train()
        model.recompute = recompute
        x, t, cond = inputs(model, family)
        out = model(x, t, cond, taps=(1,))
        (out.v.square().mean() + out.feats[1].square().mean()).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


def test_blocks_compile_without_graph_breaks(family):
    model = tiny(family).eval()
    x, t, cond = inputs(model, family)
    with torch.no_grad():
        expected = model(x, t, cond).v
        for block in (model.repeated()[0], model.repeated()[-1]):
            block.compile(fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(model(x, t, cond).v, expected)


def test_in_autocast_the_sums_over_the_blocks_stay_in_float32(family):
    model = tiny(family).eval()
    x, t, cond = inputs(model, family)
    expected = model(x, t, cond).v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t, cond, taps=(1, model.depth))
    assert {f.dtype for f in out.feats.values()} == {torch.float32}
    assert (out.v.float() - expected).norm() < 0.05 * expected.norm()
    half = model.to(torch.bfloat16)(x, t, cond).v
    assert half.dtype == torch.bfloat16 and (half.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("shape", [(4, 8, 12), (3, 10, 6)])
def test_latents_need_not_be_square(family, shape):
    model = tiny(family, shape=shape).eval()
    x, t, cond = inputs(model, family)
    out = model(x, t, cond, taps=(1,))
    assert out.v.shape == x.shape and out.feats[1].shape == (2, shape[1] * shape[2] // 4, 48)
    assert model.grid == (shape[1] // 2, shape[2] // 2)


def test_tokens_are_in_the_order_of_patchify(family):
    """A change of one patch changes the first layer's token of that patch alone."""
    model = tiny(family, shape=(4, 8, 12)).eval()
    x, t, cond = inputs(model, family)
    changed = x.clone()
    changed[:, :, 2:4, 8:10] += 1
    patches = (model.patchify(changed) != model.patchify(x)).any(dim=-1)[0]
    tokens = (model.prepare(changed, t, cond)[0] != model.prepare(x, t, cond)[0]).any(dim=-1)[0]
    assert patches.nonzero().flatten().tolist() == tokens.nonzero().flatten().tolist() == [10]


def test_settings_survive_json_and_build_the_same_model(family):
    name = f"diffusers-{family}"
    base = recipe("digits").override({"model.name": name, "model.heads": 2, "model.layers": 2, "model.head_dim": 12})
    config = from_json(to_json(base.restricted().check()))
    assert config.model == base.model and find(name).Config is type(config.model)
    model = config.build_model((1, 8, 8), LABELS if family == "dit" else TEXTS)
    assert model.depth == config.model.blocks() and model.width == 24


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_time_and_sign_are_those_of_diffusers_flow_matching(family):
    """diffusers' scheduler takes our points to the data by our velocity, at a time that the model is called with."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from selftrans.flow import LINEAR

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    g = torch.Generator().manual_seed(5)
    data, noise = torch.randn(2, *SHAPE, generator=g), torch.randn(2, *SHAPE, generator=g)
    step = scheduler.timesteps[1]
    t = (step / 1000).expand(2)
    zt, v = interpolate(LINEAR, data, noise, t)
    torch.testing.assert_close(scheduler.scale_noise(data, step[None].expand(2), noise), zt)
    at = zt
    for each in scheduler.timesteps[1:]:
        at = scheduler.step(v, each, at).prev_sample
    torch.testing.assert_close(at, data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_predicted_noise_becomes_the_velocity_of_its_path(family):
    """The network's noise at the scheduler's own step, by diffusers' DDPM schedule, against the adapter in our time."""
    from diffusers import DDPMScheduler

    model = tiny(family, learn_sigma=True, prediction="noise").double().eval()
    abar = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod.double()
    steps = torch.tensor([250, 700])
    ratio = ((1 - abar) / abar).sqrt()[steps]
    t = ratio / (1 + ratio)  # the linear path's time of this noise-to-signal ratio
    x, _, cond = inputs(model, family, dtype=torch.float64)
    noise = original(model, family, x, steps / 1000, cond)[:, :4]
    a, s = (u[steps].view(-1, 1, 1, 1) for u in (abar.sqrt(), (1 - abar).sqrt()))
    data = (x - s * noise) / a
    scale = (1 - t).view(-1, 1, 1, 1) / a  # from the schedule's point to that of our path
    found = model(scale * x, t, cond).v
    assert (found - (noise - data)).abs().max() < 1e-3 * data.abs().max()  # the time is interpolated in float32


def test_null_text_is_the_empty_caption_and_is_saved():
    model = tiny("sd3", random=False)
    cond = condition("sd3", 3)
    empty = take_cond(cond, torch.tensor([0]))
    model.use_null(empty)
    other = tiny("sd3", random=False)
    other.load_state_dict(model.state_dict())
    null = other.null(cond)
    assert torch.equal(null[TEXT][2], empty[TEXT][0]) and torch.equal(null[MASK][2], empty[MASK][0])
    assert null[TEXT].shape == cond[TEXT].shape and null[MASK].dtype == torch.bool


def test_mean_of_text_leaves_padding_out():
    text = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[5.0, 6.0]] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = pooled_text({TEXT: text, MASK: mask}, "mean", 2)
    assert found.tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert pooled_text({TEXT: text, MASK: mask}, "none", 7).shape == (2, 7)


@pytest.mark.parametrize("family", ["clip text", "clip"])
def test_last_token_is_the_pooled_output_of_clip(tmp_path, family):
    """Against transformers, with ids as those of the released models: the end of the text has the highest, and pads it."""
    encoder = load_text_encoder(captioned.save_text_encoder(tmp_path, family))
    end, lengths = len(captioned.WORDS) - 1, torch.tensor([5, 2, 12, 8])
    ids = torch.full((4, 12), end, dtype=torch.int32)
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[: length - 1] = torch.tensor([1, *range(4, 4 + length - 2)])
    mask = torch.arange(12)[None] < lengths[:, None]
    found = pooled_text(encoder.encode_ids(ids, mask), "last", encoder.width)
    expected = encoder.model(input_ids=ids.long()).pooler_output
    assert (found[0] - found[3]).abs().max() > 0.1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "shape", "conditions", "message"),
    [
        ("dit", (4, 8, 8), TEXTS, "diffusers-dit is conditioned on labels or on nothing; the data have text"),
        ("sd3", (4, 8, 8), LABELS, "diffusers-sd3 is conditioned on text; the data have 10 classes"),
        ("flux", (4, 8, 8), Conditions("none"), "diffusers-flux is conditioned on text; the data have no condition"),
        ("pixart", (4, 8, 8), LABELS, "diffusers-pixart is conditioned on text"),
        ("dit", (4, 9, 8), LABELS, "a latent of 9x8 does not divide into patches of 2; change model.patch"),
        ("sd3", (4, 8, 8, 8), TEXTS, r"takes latents of pictures \(C, H, W\)"),
    ],
)
def test_data_that_do_not_fit_are_refused(family, shape, conditions, message):
    module, kind = FAMILIES[family]
    with pytest.raises(ValueError, match=message):
        module.build(kind(), shape, conditions)


@pytest.mark.parametrize("name", ["layers", "heads", "head_dim", "patch"])
@pytest.mark.parametrize("value", [0, -3, 1 << 40])
def test_sizes_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"model\.{name} must be from 1 to 1048576, not {value}"):
        DiffusersConfig(**{name: value}).check()


# ---- two processes

NO_SINGLES = "flux without single blocks"


def taught(family):
    """A step of stage 2, with teacher and student far from their initialisation."""
    settings = {"single_layers": 0, "layers": 3} if family == NO_SINGLES else {}
    family = family.split()[0]
    student, teacher = (tiny(family, **settings) for _ in range(2))
    cond = condition(family, 4)
    for model in (student, teacher):
        model.use_null(take_cond(cond, torch.tensor([3])))
    guidance = SelfGuidance(student, Frozen(teacher, block=2), Stage2(student_block=1, head_width=8, scale=2.0))
    cond = torch.tensor([3, 0, 3, 1]) if family == "dit" else cond  # batches hold no null labels
    batch = Batch(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(4)), cond)
    return Objective(student, [guidance]), batch


def backward(objective, batch, wrapped=None):
    torch.manual_seed(7)
    (wrapped or objective)(batch, 0)[0].backward()


def two(rank, folder):
    dist.init_process_group("gloo")
    for family in (*FAMILIES, NO_SINGLES):
        for how in ("ddp", "fsdp"):
            torch.manual_seed(0)
            objective, batch = taught(family)
            if how == "fsdp":
                shard_models(objective, device=torch.device("cpu"), processes=2)
            wrapped = DistributedDataParallel(objective) if how == "ddp" else objective
            for _ in range(2):  # a second pass fails where a parameter of the first one had no gradient
                objective.zero_grad()
                backward(objective, batch, wrapped)
            trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
            found = {n: gather_full_tensor(p.grad).contiguous() for n, p in trained.items()}
            save_file(found, f"{folder}/{family}-{how}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DDP and FSDP2, both processes given the same batch."""
    spawn(two, str(tmp_path))
    for family in (*FAMILIES, NO_SINGLES):
        torch.manual_seed(0)
        objective, batch = taught(family)
        backward(objective, batch)
        for how in ("ddp", "fsdp"):
            for rank in range(2):
                found = load_file(tmp_path / f"{family}-{how}-{rank}.safetensors")
                for name, p in objective.named_parameters():
                    if p.requires_grad:
                        atol = 1e-5 * max(1.0, p.grad.abs().max().item())
                        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=atol, msg=f"{family} {name}")
