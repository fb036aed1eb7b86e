"""Autoencoders compared with diffusers, sampling with the posterior, pixels with their bytes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.constants import HF_HUB_CACHE

from selftrans.encoders.autoencoder import DiffusersAutoencoder, from_uint8, load_autoencoder, load_decoder, to_uint8
from selftrans.encoders.latent_space import LatentSpace


def save_kl(folder: Path, **overrides: object) -> AutoencoderKL:
    """A tiny AutoencoderKL that halves twice, with random weights, saved as diffusers saves it."""
    torch.manual_seed(1)
    config: dict = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4, 4, 8),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.4,
        "shift_factor": 0.25,
    }
    model = AutoencoderKL(**(config | overrides)).eval()
    model.save_pretrained(folder, safe_serialization=True)
    return model


def save_tiny(folder: Path) -> AutoencoderTiny:
    torch.manual_seed(2)
    sizes = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4), "latent_channels": 3}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    model = AutoencoderTiny(**sizes, **blocks, scaling_factor=2.0, shift_factor=0.5).eval()
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AutoencoderKL]:
    folder = tmp_path_factory.mktemp("kl")
    return folder, save_kl(folder)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16) * 2 - 1


def test_every_byte_survives_pixels_and_half_precision() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    pixels = from_uint8(images)
    assert pixels.shape == (2, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(to_uint8(pixels.to(dtype)), images)


def test_to_uint8_rounds_and_clamps_by_hand() -> None:
    # 0 -> 127.5 rounds to the even 128; 0.1 -> 140.25; 0.9 -> 242.25; beyond the range -> its ends
    values = torch.tensor([-3.0, -1.0, 0.0, 0.1, 0.9, 1.0, 7.0]).view(1, 1, 1, 7)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 140, 242, 255, 255]


def test_to_uint8_truncates_as_published_code_does() -> None:
    # 255 (x + 1) / 2: 0 -> 127.5, 0.1 -> 140.25, 0.9 -> 242.25, 0.999 -> 254.87
    values = torch.tensor([-3.0, -1.0, 0.0, 0.1, 0.9, 0.999, 1.0, 7.0]).view(1, 1, 1, 8)
    assert to_uint8(values, "down").flatten().tolist() == [0, 0, 127, 140, 242, 254, 255, 255]
    x = torch.randn(2, 3, 16, 16)
    theirs = torch.clamp(255.0 * ((x + 1) / 2.0), 0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(to_uint8(x, "down"), theirs)


def test_another_autoencoder_decodes_latents_at_the_scale_of_their_own(tmp_path: Path, kl) -> None:
    (folder, _), other = kl, tmp_path / "other"
    model = save_kl(other, scaling_factor=3.0, shift_factor=0.0)
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.mul_(1.1)
    model.save_pretrained(other, safe_serialization=True)
    decoder = load_decoder(str(folder), str(other), device="cpu", dtype=torch.float32)
    z0 = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = model.decode(z0 / 0.4 + 0.25).sample.clamp(-1, 1)  # shift and scale of the first
    torch.testing.assert_close(decoder.decode(z0), expected)
    assert decoder.name == str(other.resolve())
    assert not torch.allclose(decoder.decode(z0), load_autoencoder(str(folder)).decode(z0), atol=1e-3)


def test_autoencoders_of_other_latents_cannot_decode(tmp_path: Path, kl) -> None:
    own = str(kl[0])
    save_kl(tmp_path / "eight", latent_channels=8)
    half = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    save_kl(tmp_path / "half", **half, block_out_channels=(4, 4))
    for other, message in {
        str(
            tmp_path / "eight"
        ): "have 8 channels and 1/4 of the pictures' side, those of .* have 4 channels and 1/4 of",
        str(tmp_path / "half"): "have 4 channels and 1/2 of",
        "pixel": "pixel is no VAE",
        str(tmp_path / "absent"): "no autoencoder",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_decoder(own, other, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cannot decode latents of pixel: .*pixel is no VAE; give a VAE of the same"):
        load_decoder("pixel", own, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_autoencoder_is_the_identity(channels: int) -> None:
    autoencoder = load_autoencoder("pixel")
    x = torch.rand(2, channels, 8, 8) * 2 - 1
    moments = autoencoder.encode(x)
    assert moments.std is None and autoencoder.latent_space == LatentSpace(0, 1, False) and autoencoder.downsample == 1
    z0 = autoencoder.latent_space.sample(moments.stack())
    assert torch.equal(autoencoder.decode(z0), x) and autoencoder.pictures
    assert autoencoder.decode(z0 + 1).max() == 1, "clamped"


@pytest.mark.parametrize("shape", [(2, 5, 64), (2, 1, 8, 8), (2, 2, 3, 4, 5)])
def test_values_autoencoder_is_the_identity_without_clamping(shape: tuple[int, ...]) -> None:
    autoencoder, x = load_autoencoder("values"), torch.randn(shape) * 100
    assert not autoencoder.pictures and autoencoder.channels == 0
    moments = autoencoder.encode(x)
    assert moments.std is None
    assert torch.equal(autoencoder.decode(autoencoder.latent_space.sample(moments.stack())), x)


def test_kl_moments_are_the_posterior_of_diffusers(kl: tuple[Path, AutoencoderKL], pixels: torch.Tensor) -> None:
    folder, model = kl
    autoencoder = load_autoencoder(str(folder))
    assert autoencoder.latent_space == LatentSpace(0.25, 0.4, stochastic=True)
    assert (autoencoder.name, autoencoder.channels, autoencoder.downsample) == (str(folder.resolve()), 4, 4)
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
    moments = autoencoder.encode(pixels)
    torch.testing.assert_close(moments.mean, posterior.mean)
    torch.testing.assert_close(moments.std, posterior.std)
    assert moments.stack().shape == (3, 8, 4, 4)


def with_statistics(kl: tuple[Path, AutoencoderKL], folder: Path, **changed: object) -> Path:
    shutil.copytree(kl[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def test_statistics_per_channel_are_used_as_in_diffusers_pipelines(
    kl: tuple[Path, AutoencoderKL], tmp_path: Path
) -> None:
    """latents * latents_std / scaling_factor + latents_mean is what they decode."""
    mean, std = [0.0, 1.0, -2.0, 0.5], [1.0, 2.0, 0.5, 4.0]
    found = load_autoencoder(str(with_statistics(kl, tmp_path / "vae", latents_mean=mean, latents_std=std)))
    assert found.latent_space == LatentSpace(tuple(mean), tuple(0.4 / x for x in std), stochastic=True)
    latents = torch.randn(2, 4, 4, 4)
    raw = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.4 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(found.latent_space.unscale(latents), raw)
    with torch.no_grad():
        torch.testing.assert_close(found.decode(latents), kl[1].decode(raw).sample.clamp(-1, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("std", [[1.0, 1.0], [1.0, 0.0, 1.0, 1.0], ["a", 1, 1, 1], [float("nan")] * 4])
def test_statistics_that_do_not_fit_are_refused(
    kl: tuple[Path, AutoencoderKL], tmp_path: Path, std: list[object]
) -> None:
    folder = with_statistics(kl, tmp_path / "vae", latents_mean=[0.0] * 4, latents_std=std)
    with pytest.raises(ValueError, match="should be 4 finite numbers each, the second above zero"):
        load_autoencoder(str(folder))


def test_sampled_latents_have_the_moments_of_the_posterior(
    kl: tuple[Path, AutoencoderKL], pixels: torch.Tensor
) -> None:
    folder, model = kl
    moments = load_autoencoder(str(folder)).encode(pixels[:1]).stack()
    many = LatentSpace(0.25, 0.4, stochastic=True).sample(moments.half().expand(4000, -1, -1, -1))
    with torch.no_grad():
        posterior = model.encode(pixels[:1]).latent_dist
    assert many.dtype == torch.float32
    std = posterior.std[0] * 0.4
    error = (many.mean(dim=0) - (posterior.mean[0] - 0.25) * 0.4) / (std / math.sqrt(4000))
    assert error.abs().max() < 5  # standard errors, over 64 values
    assert (many.std(dim=0) / std - 1).abs().max() < 5 / math.sqrt(2 * 4000)


def test_sampling_follows_the_default_generator() -> None:
    moments = torch.rand(2, 4, 3, 3)
    torch.manual_seed(7)
    first = LatentSpace(shift=1.0, scale=2.0, stochastic=True).sample(moments)
    torch.manual_seed(7)
    noise = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(first, (moments[:, :2] + moments[:, 2:] * noise - 1.0) * 2.0)


@pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_latent_space_per_channel_against_loops(spatial: tuple[int, ...], stochastic: bool) -> None:
    shift, scale = (0.5, -1.0, 2.0), (2.0, 0.25, -3.0)
    space = LatentSpace(shift, scale, stochastic)
    moments = torch.rand(4, 6 if stochastic else 3, *spatial)
    torch.manual_seed(0)
    noise = torch.randn(4, 3, *spatial) if stochastic else 0
    raw = moments[:, :3] + (moments[:, 3:] * noise if stochastic else 0)
    torch.manual_seed(0)
    latents, means = space.sample(moments), space.mean(moments)
    for c in range(3):
        torch.testing.assert_close(latents[:, c], (raw[:, c] - shift[c]) * scale[c])
        torch.testing.assert_close(means[:, c], (moments[:, c] - shift[c]) * scale[c])
    torch.testing.assert_close(space.unscale(latents), raw)
    assert space == LatentSpace(shift, scale, stochastic) and hash(space) == hash(LatentSpace(shift, scale, stochastic))


def test_equal_scales_per_channel_are_bit_identical_to_one_scale() -> None:
    moments = torch.randn(5, 8, 6, 6)
    one, each = LatentSpace(0.25, 0.18215, True), LatentSpace((0.25,) * 4, (0.18215,) * 4, True)
    torch.manual_seed(1)
    first = one.sample(moments)
    torch.manual_seed(1)
    assert torch.equal(first, each.sample(moments)) and torch.equal(one.unscale(first), each.unscale(first))


def test_kl_decode_inverts_scale_and_shift(kl: tuple[Path, AutoencoderKL], pixels: torch.Tensor) -> None:
    folder, model = kl
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        expected = model.decode(latents / 0.4 + 0.25).sample.clamp(-1, 1)
    decoded = load_autoencoder(str(folder)).decode(latents)
    assert decoded.shape == (2, 3, 16, 16)
    torch.testing.assert_close(decoded, expected)


def test_pictures_are_decoded_in_pieces_of_one_size(
    kl: tuple[Path, AutoencoderKL], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_autoencoder(str(kl[0]))
    assert isinstance(model, DiffusersAutoencoder) and model.most_pixels is None  # on a CPU all at once
    latents = torch.randn(7, model.channels, 2, 3)
    whole, decode, sizes = model.decode(latents), model.model.decode, []
    monkeypatch.setattr(model.model, "decode", lambda x: sizes.append(len(x)) or decode(x))
    model.most_pixels = 3 * 6 * model.downsample**2
    assert torch.allclose(model.decode(latents), whole, atol=1e-5) and sizes == [3, 3, 3]
    model.most_pixels = 1
    assert torch.allclose(model.decode(latents[:2]), whole[:2], atol=1e-5) and sizes[3:] == [1, 1]


def test_decoding_in_bfloat16_is_within_a_few_levels_of_a_picture(kl: tuple[Path, AutoencoderKL]) -> None:
    full, half = (load_autoencoder(str(kl[0]), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    latents = torch.randn(8, full.channels, 4, 4)
    exact, reduced = full.decode(latents), half.decode(latents)
    assert reduced.dtype == torch.float32
    levels = (exact - reduced).abs() * 127.5
    assert 0 < levels.mean() < 1 and levels.max() < 8


def test_tiny_is_deterministic_and_agrees_with_diffusers(tmp_path: Path, pixels: torch.Tensor) -> None:
    model = save_tiny(tmp_path / "vae")
    autoencoder = load_autoencoder(str(tmp_path / "vae"))
    assert autoencoder.latent_space == LatentSpace(0.5, 2.0, False)
    assert (autoencoder.channels, autoencoder.downsample) == (3, 2)
    with torch.no_grad():
        expected = model.encode(pixels).latents
        back = model.decode(expected).sample.clamp(-1, 1)
    moments = autoencoder.encode(pixels)
    assert moments.std is None
    torch.testing.assert_close(moments.mean, expected)
    z0 = autoencoder.latent_space.sample(moments.stack())
    torch.testing.assert_close(z0, (expected - 0.5) * 2)
    torch.testing.assert_close(autoencoder.decode(z0), back, atol=1e-5, rtol=1e-4)


def test_reduced_precision_moments_are_float32_and_close(kl: tuple[Path, AutoencoderKL]) -> None:
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    full, reduced = (load_autoencoder(str(kl[0]), dtype=d).encode(pixels) for d in (torch.float32, torch.bfloat16))
    assert reduced.mean.dtype == torch.float32
    torch.testing.assert_close(reduced.mean, full.mean, atol=0.05, rtol=0.05)


def test_grey_pixels_are_repeated_for_a_colour_autoencoder(kl: tuple[Path, AutoencoderKL]) -> None:
    autoencoder = load_autoencoder(str(kl[0]))
    grey = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(autoencoder.encode(grey).mean, autoencoder.encode(grey.expand(-1, 3, -1, -1)).mean)


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # raised by diffusers
@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_hub_ids_with_and_without_subfolder_load_from_the_cache(subfolder: str) -> None:
    repository = Path(HF_HUB_CACHE) / f"models--owner--name{subfolder}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    save_kl(repository / "snapshots" / commit / subfolder)
    name = f"owner/name{subfolder}" + ("/vae" if subfolder else "")
    autoencoder = load_autoencoder(name)
    assert autoencoder.name == name and autoencoder.encode(torch.zeros(1, 3, 8, 8)).mean.shape == (1, 4, 2, 2)


@pytest.mark.parametrize("side", [18, 15])
def test_sizes_not_divisible_by_the_downsampling_are_refused(kl: tuple[Path, AutoencoderKL], side: int) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        load_autoencoder(str(kl[0])).encode(torch.zeros(1, 3, side, side))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    for name in ("nonsense", str(tmp_path / "absent"), "./absent/vae"):
        with pytest.raises(ValueError, match="neither 'pixel', nor 'values', nor a folder, nor a hub id"):
            load_autoencoder(name)
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        load_autoencoder("nobody/nothing")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json cannot be read \(it is not an object\)"):
        load_autoencoder(str(tmp_path))


def test_hub_out_of_reach_is_not_a_repository_without_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"config.json cannot be read \(.*connection") as error:
        load_autoencoder("owner/name/vae")
    assert "does not appear to have" not in str(error.value)


@pytest.mark.parametrize(
    "config", ['{"_class_name": "UNet2DModel"}', '{"_class_name": "os.system"}', "[1]", "{", '{"_class_name": ["x"]}']
)
def test_unsupported_configs_are_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"supported: pixel|config.json"):
        load_autoencoder(str(tmp_path))


def test_code_in_an_autoencoder_folder_is_not_run(tmp_path: Path) -> None:
    save_kl(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model"}, "_module": "evil", "_custom_pipeline": "evil"}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vae" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert load_autoencoder(str(tmp_path / "vae")).encode(torch.zeros(1, 3, 8, 8)).mean.shape == (1, 4, 2, 2)
    assert not (tmp_path / "ran").exists()


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = save_kl(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="safetensors weights are needed"):
        load_autoencoder(str(tmp_path))


def test_truncated_or_mismatched_weights_are_refused(tmp_path: Path) -> None:
    save_kl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # without quant_conv in the config, the file holds weights that the model lacks
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_quant_conv": False}))
    with pytest.raises(ValueError, match=r"2 weights do not fit .* quant_conv"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_autoencoder(str(tmp_path))
