"""From a model to images: a random stream per image, conditions, and the sampler."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch

from selftrans.checkpoints.load import load_model
from selftrans.config import SampleConfig
from selftrans.data.dataset import Dataset
from selftrans.encoders.autoencoder import load_autoencoder
from selftrans.encoders.identity import IdentityAutoencoder, identity
from selftrans.models.sit import SiT
from selftrans.sampling import images as module
from selftrans.sampling.images import Sampler, cast_products, padded, worth_compiling
from selftrans.sampling.streams import image_noise
from selftrans.train.preview import Preview
from selftrans.types import Backbone, Conditions, Output
from tests.support import toy
from tests.support.pictures import save_vae
from tests.support.toy import quick  # noqa: F401 - a fixture


def test_noise_of_an_image_depends_on_seed_and_index_alone():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator must not be used
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    together = image_noise([0, 1, 2, 3], (2, 3, 3), seed=5)
    apart = {k: image_noise([k], (2, 3, 3), seed=5) for k in (3, 1)}
    for _ in range(3):  # every draw of the stream, not only the first
        rows = together()
        for k, noise in apart.items():
            assert torch.equal(noise()[0], rows[k])
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


def test_noise_is_standard_normal_and_never_repeats():
    rows = image_noise(range(2000), (2, 2), seed=0)().flatten(start_dim=1)
    assert rows.dtype == torch.float32
    assert rows.mean().item() == pytest.approx(0, abs=0.05) and rows.std().item() == pytest.approx(1, abs=0.03)
    seeds = torch.cat([image_noise([0, 3], (4,), seed)() for seed in (1, 3, 2**32, 3 * 2**32, 2**40 + 1)])
    assert len(torch.unique(torch.cat([rows, seeds]), dim=0)) == 2010


# ---- the sampler


def small_model(num_classes=10):
    torch.manual_seed(0)
    model = SiT((3, 8, 8), num_classes, width=32, depth=2, heads=2, patch=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def gather(model, config, autoencoder=None, indices=None):
    batches = list(Sampler(model, autoencoder or identity("pixel"), config, device="cpu").sample(indices))
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_image_k_is_the_same_for_every_batch_size_order_and_process_count(sampler):
    model = small_model()
    options = {
        "num": 7,
        "steps": 6,
        "sampler": sampler,
        "guidance_scale": 1.5,
        "guidance_interval": (0.0, 0.65),
        "seed": 9,
    }
    indices, labels, images = gather(model, SampleConfig(**options, batch_size=7))
    assert (
        images.shape == (7, 8, 8, 3)
        and images.dtype == np.uint8
        and indices.tolist() == labels.tolist() == list(range(7))
    )
    assert len(np.unique(images, axis=0)) == 7
    for batch_size in (1, 3):
        again = gather(model, SampleConfig(**options, batch_size=batch_size))
        assert np.abs(images.astype(int) - again[2].astype(int)).max() <= 1
        assert np.array_equal(labels, again[1])
    chosen = gather(model, SampleConfig(**options, batch_size=2), indices=[6, 2, 4])
    assert np.abs(images[[6, 2, 4]].astype(int) - chosen[2].astype(int)).max() <= 1
    other = gather(model, SampleConfig(**{**options, "seed": 10}, batch_size=7))
    assert np.abs(images.astype(int) - other[2].astype(int)).max() > 1


def test_scaled_velocity_is_that_of_a_model_with_a_larger_last_layer():
    """Also with classifier-free guidance, which is linear in the velocity."""
    options = {"num": 3, "steps": 4, "sampler": "heun", "guidance_scale": 1.5, "batch_size": 3}
    model = small_model()
    plain = gather(model, SampleConfig(**options))[2]
    found = gather(model, SampleConfig(**options, velocity_scale=1.25))[2]
    with torch.no_grad():
        for parameter in model.final_layer.linear.parameters():
            parameter.mul_(1.25)
    expected = gather(model, SampleConfig(**options))[2]
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert np.abs(found.astype(int) - plain.astype(int)).max() > 1


def test_only_the_last_batch_is_smaller():
    sampler = Sampler(small_model(), identity("pixel"), SampleConfig(num=7, steps=2, batch_size=3), device="cpu")
    assert [len(batch.indices) for batch in sampler.sample()] == [3, 3, 1]
    assert list(sampler.sample([])) == []


def test_sampling_restores_the_model_and_the_grad_mode():
    model = small_model().train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_inference_mode_enabled())))
    state = torch.random.get_rng_state()
    config = SampleConfig(num=2, steps=2, batch_size=1)
    for _ in Sampler(model, identity("pixel"), config, device="cpu").sample():
        assert [m.training for m in model.modules()] == modes, "also between batches"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert set(seen) == {(False, True)}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(precision):
    model, dtypes = small_model(), []
    options = {"num": 4, "steps": 5, "sampler": "heun"}
    full = gather(model, SampleConfig(**options))[2].astype(int)
    model.blocks[0].attn.proj.register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    half = gather(model, SampleConfig(**options, precision=precision))[2].astype(int)
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert 0 < np.abs(full - half).mean() < 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_samples_that_are_not_finite_are_refused(precision):
    """As pictures they would be black, and nothing would show that they are no samples."""

    class Broken(IdentityAutoencoder):
        def decode(self, latents):
            return super().decode(latents) / 0

    model, config = (
        small_model(),
        SampleConfig(num=5, steps=2, batch_size=3, labels=(1, 1, 1, 1, 4), precision=precision),
    )
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[4] = float("nan")
    batches = Sampler(model, identity("pixel"), config, device="cpu").sample()
    assert len(next(batches).images) == 3
    overflow = (
        r"fp16 may overflow \(set the precision of sampling to bf16 or fp32\), or " if precision == "fp16" else ""
    )
    with pytest.raises(ValueError, match=f"^sample 4 is not finite: {overflow}the weights of the model have diverged$"):
        next(batches)
    guided = Sampler(model, identity("pixel"), dataclasses.replace(config, guidance_scale=2.5), device="cpu").sample(
        np.array([4])
    )
    with pytest.raises(
        ValueError, match=r"the guidance scale 2\.5 is too large, or the weights of the model have diverged"
    ):
        next(guided)
    with pytest.raises(ValueError, match="the autoencoder pixel decodes latents to values that are not finite"):
        gather(small_model(), SampleConfig(num=1, steps=2), Broken("pixel"))


def test_model_without_classes_gets_label_zero():
    model = small_model(num_classes=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, labels, images = gather(model, SampleConfig(num=2, steps=2))
    assert labels.tolist() == [0, 0] and images.shape[0] == 2


class Straight(Backbone):
    """Flows along a straight line to zero, for any shape."""

    depth, width, conditions = 1, 1, Conditions("none")

    def __init__(self, shape):
        super().__init__()
        self.shape, self.grid = shape, shape[1:]

    def forward(self, x, t, cond, *, taps=(), stop=False):
        return Output(x / t.view(-1, *[1] * (x.dim() - 1)), {})

    def null(self, cond):
        return cond


def test_pictures_need_not_be_square():
    _, _, images = gather(Straight((1, 4, 6)), SampleConfig(num=2, steps=2, sampler="euler"))
    assert images.shape == (2, 4, 6, 1) and images.dtype == np.uint8 and set(images.ravel()) <= {127, 128}


@pytest.mark.parametrize("shape", [(2, 9), (1, 4, 6), (2, 3, 4, 5)])
def test_data_that_are_not_pictures_are_returned_as_arrays(shape):
    config = SampleConfig(num=3, steps=2, sampler="euler", batch_size=2)
    batches = list(Sampler(Straight(shape), identity("values"), config, device="cpu").sample())
    images = np.concatenate([batch.images for batch in batches])
    assert images.shape == (3, *shape) and images.dtype == np.float32 and np.abs(images).max() < 1e-6


@pytest.mark.parametrize(("count", "length"), [(8, 8), (9, 12), (1, 4)])
def test_batches_are_padded_with_the_last_index(count, length):
    indices = np.arange(count) + 3
    assert list(padded(indices, 4)) == [*indices, *[count + 2] * (length - count)]


def test_cast_weights_give_the_same_images_as_autocast():
    torch.manual_seed(0)
    model = small_model()
    config = SampleConfig(num=4, steps=3, sampler="heun", guidance_scale=2.0, precision="bf16")
    cast = copy.deepcopy(model)
    cast_products(cast, torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.float32, torch.bfloat16}
    assert np.array_equal(gather(model, config)[2], gather(cast, config)[2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num": 0}, "sample.num"),
        ({"batch_size": 0}, "sample.batch_size"),
        ({"sampler": "ddim"}, "sample.sampler should be one of 'euler', .* not 'ddim'"),
        ({"steps": 0}, "sample.steps"),
        ({"steps": 1}, "the SDE needs at least 2"),
        ({"guidance_scale": -1.0}, "sample.guidance_scale"),
        ({"guidance_scale": float("nan")}, "sample.guidance_scale"),
        ({"guidance_interval": (0.7, 0.4)}, "sample.guidance_interval"),
        ({"guidance_interval": (0.0, 1.5)}, "sample.guidance_interval"),
        ({"seed": -1}, "sample.seed"),
        ({"precision": "int8"}, "sample.precision"),
        ({"labels": "sorted"}, "sample.labels"),
        ({"prompts": ()}, "sample.prompts is empty"),
    ],
)
def test_unusable_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampler(small_model(), identity("pixel"), SampleConfig(**values), device="cpu")


def test_settings_exclude_number_batch_size_and_graphs():
    config = SampleConfig(num=3, batch_size=5, sampler="ode", capture="on")
    assert config.settings() == SampleConfig(num=9, batch_size=1, sampler="heun").settings()
    assert config.settings() != SampleConfig(num=3, batch_size=5, sampler="ode", seed=1).settings()


# ---- the sampler of a loaded model


def test_loaded_model_is_described_and_sampled_in_fp32():
    loaded = load_model(toy.finished())
    config = SampleConfig(num=3, steps=2, sampler="heun")
    sampler = Sampler.of(loaded, config)
    expected = config.settings() | {"weights": "ema", "stage": "stage2", "step": 8, "autoencoder": toy.PIXELS}
    assert sampler.described == expected | {"labels": "balanced", "num_classes": 10, "source": loaded.source}
    (batch,) = sampler.sample()
    plain = load_model(toy.finished()).model
    assert np.array_equal(batch.images, gather(plain, config, load_autoencoder(toy.PIXELS))[2])
    with pytest.raises(ValueError, match=r"sample\.steps"):
        Sampler.of(loaded, SampleConfig(steps=0))


def test_samples_are_decoded_by_another_autoencoder_and_truncated(tmp_path):
    own, other = (save_vae(tmp_path / name, channels=1, seed=seed) for seed, name in enumerate(("own", "other")))
    config = SampleConfig(num=3, steps=2, sampler="heun")
    changed = dataclasses.replace(config, decode_with=other, rounding="down")

    def sampled(settings):
        sampler = Sampler.of(load_model(toy.finished())._replace(autoencoder=own), settings)
        return sampler.described, next(sampler.sample()).images.astype(int)

    plain, images = sampled(config)
    assert "decode_with" not in plain and "rounding" not in plain, "folders of samples begun before are continued"
    described, decoded = sampled(changed)
    assert described == plain | {"decode_with": other, "rounding": "down"}
    expected = gather(load_model(toy.finished()).model, config, load_autoencoder(other))[2]
    assert images.shape == (3, 16, 16, 3) and np.abs(images - decoded).max() > 2
    assert set((expected - decoded).flatten()) == {0, 1}, "rounded and truncated"
    with pytest.raises(ValueError, match=r"cannot decode latents of pixel\(.*is no VAE"):
        Sampler.of(load_model(toy.finished()), changed)
    with pytest.raises(ValueError, match=r"sample\.rounding should be one of 'nearest', 'down', not 'up'"):
        dataclasses.replace(config, rounding="up").check()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_cast_in_reduced_precision(precision, dtype):
    sampler = Sampler.of(load_model(toy.finished()), SampleConfig(num=2, steps=1, sampler="euler", precision=precision))
    assert sampler.model.blocks[0].mlp.fc1.weight.dtype == dtype
    assert sampler.model.y_embedder.embedding_table.weight.dtype == torch.float32
    next(sampler.sample())


def test_compilation_needs_many_batches_and_a_gpu(monkeypatch):
    config, gpu = SampleConfig(num=40, batch_size=2), torch.device("cuda:0")
    assert worth_compiling(config, gpu) and not worth_compiling(config, torch.device("cpu"))
    assert not worth_compiling(SampleConfig(num=39, batch_size=2), gpu)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not worth_compiling(config, gpu), "each of two processes samples half"


def test_short_samplings_of_one_process_share_a_compilation(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "worth_compiling", lambda settings, _: asked.append(settings.num))
    for total in (None, 80):
        Sampler.of(load_model(toy.finished()), SampleConfig(num=2, steps=1, sampler="euler"), total=total)
    assert asked == [2, 80]


def test_model_and_decoder_are_compiled_for_many_batches(monkeypatch, tmp_path):
    vae = load_autoencoder(str(save_vae(tmp_path / "vae")))
    compiled = []
    monkeypatch.setattr(module, "worth_compiling", lambda *_: True)
    monkeypatch.setattr(module, "compile_model", compiled.append)
    monkeypatch.setattr(module, "load_decoder", lambda *_, **__: vae)
    monkeypatch.setattr(type(vae.model.decoder), "compile", lambda self, **_: compiled.append(self), raising=False)
    loaded = load_model(toy.finished())
    Sampler.of(loaded, SampleConfig(num=2, steps=1, sampler="euler"))
    assert compiled == [loaded.model, vae.model.decoder]


def test_noise_and_pictures_have_the_size_that_is_asked_for():
    model, config = small_model(), SampleConfig(num=2, steps=2, sampler="heun")
    sampler = Sampler(model, identity("pixel"), config, device="cpu")
    sampler.resize((2 * model.shape[1], model.shape[2]))
    assert next(sampler.sample()).images.shape == (2, 2 * model.shape[1], model.shape[2], model.shape[0])
    sampler.autoencoder.downsample = 4
    with pytest.raises(ValueError, match="size 6x8 is not a multiple of 4"):
        sampler.resize((6, 8))
    with pytest.raises(ValueError, match="a size is for models of pictures"):
        Sampler(Straight((1, 4, 6)), identity("values"), config, device="cpu").resize(8)


def test_previews_leave_the_weak_model_and_graphs_out():
    config = toy.toy({"sample.autoguidance": "other", "sample.guidance_scale": 2.0, "sample.capture": "on"})
    made = Preview(config, Dataset.open(config.data.path), torch.device("cpu")).settings
    assert (made.autoguidance, made.guidance_scale, made.capture) == (None, 1.0, "off")
