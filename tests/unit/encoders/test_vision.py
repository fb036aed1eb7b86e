"""External encoders: their features are those of `transformers` itself, on the grid that was asked for, and no code is run."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from selftrans.encoders.autoencoder import from_uint8
from selftrans.encoders.vision import load_encoder
from tests.support.vision import FAMILIES, SIZES, VIT, patches_of, save_encoder


def images(side: int, n: int = 3, channels: int = 3) -> np.ndarray:
    """Smooth pictures (n, side, side, channels) uint8, so that resizing is no matter of single pixels."""
    small = np.random.default_rng(0).integers(0, 256, (n, 4, 4, channels), dtype=np.uint8)
    resized = [np.array(Image.fromarray(x.squeeze()).resize((side, side), Image.Resampling.BICUBIC)) for x in small]
    return np.stack(resized).reshape(n, side, side, channels)


def pixels(array: np.ndarray) -> torch.Tensor:
    return from_uint8(torch.from_numpy(array))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", [4, 6])
def test_features_are_those_of_transformers(tmp_path: Path, family: str, grid: int) -> None:
    """Patch tokens alone, in their order, normalised as the model's own processor does; 6 x 6 is no model's own grid."""
    folder, prefix = save_encoder(tmp_path / "model", family), FAMILIES[family][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is resized behind one's back
        encoder = load_encoder(folder, grid)
    shown = images(encoder.size)
    options = (
        {"interpolate_pos_encoding": True}
        if family in ("vit", "deit", "ijepa", "siglip vision", "siglip", "clip")
        else {}
    )
    expected = patches_of(folder, shown, prefix, **options)
    found = encoder.encode(pixels(shown))
    assert found.shape == expected.shape == (3, grid**2, encoder.width) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:encoder .* has no usable")
def test_grid_16_uses_pictures_of_224(tmp_path: Path) -> None:
    """A 16 x 16 grid of patches of 14 pixels is a picture of 224, whatever size the model was made for."""
    config = transformers.Dinov2Config(**SIZES, image_size=518, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), 16)
    assert encoder.size == 224 and encoder.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 16)


@pytest.mark.parametrize("side", [20, 56])
def test_pictures_are_resized_as_pil_does(tmp_path: Path, side: int) -> None:
    folder = save_encoder(tmp_path / "model")
    shown, encoder = images(side), load_encoder(folder, 4)
    resized = np.stack([np.array(Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC)) for x in shown])
    found, expected = encoder.encode(pixels(shown)), patches_of(folder, resized)
    assert (found - expected).norm() / expected.norm() < 0.02  # PIL rounds to bytes
    plain = torch.nn.functional.interpolate(pixels(shown), 28, mode="nearest")
    assert (encoder.encode(plain) - expected).norm() / expected.norm() > 0.05, "the comparison can fail"


def test_features_of_a_fixed_size_model_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of a linear ramp across the picture, resized, are still a ramp."""
    folder = save_encoder(tmp_path / "model")
    forward = transformers.Dinov2Model.forward

    def one_size(self: object, pixel_values: torch.Tensor, **options: object) -> object:
        if pixel_values.shape[-1] != 28:
            raise ValueError("this model takes 28 pixels")
        out = forward(self, pixel_values, **options)  # type: ignore[arg-type]
        ramp = torch.arange(4.0).repeat(4)[None, :, None].expand(len(pixel_values), -1, 16)
        out.last_hidden_state = torch.cat([out.last_hidden_state[:, :1], ramp], dim=1)
        return out

    monkeypatch.setattr(transformers.Dinov2Model, "forward", one_size)
    with pytest.warns(UserWarning, match="are resized from 4x4 to 8x8"):
        encoder = load_encoder(folder, 8)
    found = encoder.encode(torch.zeros(2, 3, 28, 28)).unflatten(1, (8, 8))[0, :, :, 0]
    assert encoder.size == 28 and found.shape == (8, 8)
    torch.testing.assert_close(found, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]).expand(8, 8))


def test_grey_pictures_are_expanded_to_rgb(tmp_path: Path) -> None:
    encoder = load_encoder(save_encoder(tmp_path), 4)
    grey = pixels(images(28, channels=1))
    torch.testing.assert_close(encoder.encode(grey), encoder.encode(grey.expand(-1, 3, -1, -1)), rtol=0, atol=0)


def test_missing_processor_uses_imagenet_normalisation_with_a_warning(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, processor=False)
    with pytest.warns(UserWarning, match="no usable preprocessor_config.json"):
        encoder = load_encoder(folder, 4)
    shown = torch.from_numpy(images(28)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model((shown - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder.encode(pixels(images(28))), expected, rtol=1e-4, atol=1e-4)


def test_encoder_is_frozen_cast_and_hashed(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "a")
    encoder, half = load_encoder(folder, 4), load_encoder(folder, 4, dtype=torch.bfloat16)
    shown = pixels(images(28)).requires_grad_()
    assert not encoder.encode(shown).requires_grad and not isinstance(encoder, torch.nn.Module)
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16} and half.encode(shown).dtype == torch.float32
    error = (half.encode(shown) - encoder.encode(shown)).norm() / encoder.encode(shown).norm()
    assert 0 < error < 0.03
    assert half.sha256 == encoder.sha256 == load_encoder(save_encoder(tmp_path / "b"), 4).sha256
    assert encoder.sha256 != load_encoder(save_encoder(tmp_path / "c", seed=1), 4).sha256
    assert encoder.name == str((tmp_path / "a").resolve()) == encoder.source["path"]
    patches, width, hidden = 16, 16, 64  # of 7 x 7 x 3 numbers; 17 tokens through two blocks
    block = 4 * 17 * width**2 + 2 * 17**2 * width + 2 * 17 * width * hidden
    assert encoder.flops == 2 * (patches * 147 * width + 2 * block)


def missing_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_encoder(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.mlp.fc1.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    save_encoder(folder)
    (folder / "model.safetensors").unlink()
    torch.save(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)).state_dict(), folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    save_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "cannot be loaded .*; give a vision model"),
        (missing_weights, r"checkpoint lacks 1 weights, such as encoder.layer.1.mlp.fc1.weight"),
        (pickled, "cannot be loaded .*safetensors weights"),
        (remote_code, "cannot be loaded"),
        (
            lambda f: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=9)).save_pretrained(f),
            "gives no grid",
        ),
        (
            lambda f: transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT)).save_pretrained(f),
            "5 tokens are not a square",
        ),
        (
            lambda f: transformers.ViTMAEModel(transformers.ViTMAEConfig(**VIT, mask_ratio=0.0)).save_pretrained(f),
            "is not deterministic",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:encoder .* has no usable")
def test_invalid_encoder_is_refused_in_one_line(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(str(tmp_path / "model"), 4)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "model" / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_in_an_encoder_folder_is_not_run(tmp_path: Path, file: str) -> None:
    folder = Path(save_encoder(tmp_path / "model"))
    settings = json.loads((folder / file).read_text())
    wanted = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoImageProcessor": "evil.Processor"}
    settings |= {"auto_map": wanted} | ({"image_processor_type": "Evil"} if file != "config.json" else {})
    (folder / file).write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with contextlib.nullcontext() if file == "config.json" else pytest.warns(UserWarning, match="has no usable"):
        assert load_encoder(str(folder), 4).encode(pixels(images(28))).shape == (3, 16, 16)
    assert not (tmp_path / "ran").exists()
    reader = transformers.AutoModel if file == "config.json" else transformers.AutoImageProcessor
    with contextlib.suppress(Exception):
        reader.from_pretrained(str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists()  # the trap is real


def test_unknown_hub_id_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"encoder 'facebook/no-such-model' cannot be loaded .*hub id or folder"):
        load_encoder("facebook/no-such-model", 4)
