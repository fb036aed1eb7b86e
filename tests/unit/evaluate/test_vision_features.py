"""Features of vision models for distances: those of `transformers` itself, and the distance that scipy computes from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from PIL import Image

from selftrans.evaluate.extractors import extractor_sha256, load_extractor
from selftrans.evaluate.metrics import evaluate
from selftrans.evaluate.vision_features import VisionExtractor
from tests.support.vision import FAMILIES, MEAN, SIZES, STD, VIT, save_encoder

#: families that have pooled output; the others have tokens only
MEANS = ("ijepa",)


def pictures(side: int, n: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth pictures (n, side, side, channels) uint8, so that resizing does not depend on single pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, channels), dtype=np.uint8)
    resized = [np.array(Image.fromarray(x.squeeze()).resize((side, side), Image.Resampling.BICUBIC)) for x in small]
    return np.stack(resized).reshape(n, side, side, channels)


@torch.no_grad()
def by_transformers(folder: str, images: np.ndarray, family: str) -> np.ndarray:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = getattr(model, "vision_model", model)
    out = model(pixel_values=processor(images=list(images), return_tensors="pt")["pixel_values"])
    pooled = out.last_hidden_state.mean(dim=1) if family in MEANS else out.pooler_output
    return pooled.flatten(start_dim=1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_pooled_output_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_encoder(tmp_path / "model", family)
    extractor = load_extractor(folder)
    assert isinstance(extractor, VisionExtractor) and extractor.name == "model" and not extractor.head
    shown = pictures(extractor.side)
    found, expected = extractor(shown)["features"], by_transformers(folder, shown, family)
    assert found.dtype == np.float32 and found.shape == expected.shape == (4, extractor.dim)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_dinov2_reads_pictures_as_large_as_its_processor_makes_them(tmp_path: Path) -> None:
    """Published DINOv2 has positions for 518 pixels and a processor that crops to 224; its feature is the class token."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SIZES, image_size=518, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    settings = {"image_processor_type": "BitImageProcessor", "image_mean": MEAN, "image_std": STD, "do_resize": True}
    settings |= {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    extractor = VisionExtractor(str(tmp_path))
    assert extractor.side == 224
    shown = pictures(224, 2)
    pixels = (torch.from_numpy(shown).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    with torch.no_grad():
        hidden = transformers.Dinov2Model.from_pretrained(tmp_path).eval()(pixel_values=pixels).last_hidden_state
    np.testing.assert_allclose(extractor(shown)["features"], hidden[:, 0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [20, 56])
def test_pictures_are_resized_as_a_whole_as_pil_does(tmp_path: Path, side: int) -> None:
    folder = save_encoder(tmp_path / "model")
    shown, extractor = pictures(side), VisionExtractor(folder)
    resized = np.stack([np.array(Image.fromarray(x).resize((28, 28), Image.Resampling.BICUBIC)) for x in shown])
    found, expected = extractor(shown)["features"], by_transformers(folder, resized, "dinov2")
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)  # PIL rounds to bytes


def test_grey_pictures_become_rgb_and_other_channels_are_refused(tmp_path: Path) -> None:
    extractor = VisionExtractor(save_encoder(tmp_path / "model"))
    grey = pictures(28, channels=1)
    np.testing.assert_array_equal(extractor(grey)["features"], extractor(grey.repeat(3, axis=-1))["features"])
    with pytest.raises(ValueError, match="model takes 3 channels, not images of 28x28x4"):
        extractor(np.zeros((1, 28, 28, 4), dtype=np.uint8))


def test_model_of_text_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text' is a BertModel, which takes no pictures; give a vision model"):
        VisionExtractor(str(tmp_path / "text"))


def test_distance_is_that_of_scipy(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model")
    samples, reference = pictures(28, 40, seed=1), pictures(28, 50, seed=2)
    report = evaluate(samples, reference, load_extractor(folder))
    a, b = (by_transformers(folder, each, "dinov2").astype(np.float64) for each in (samples, reference))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert report["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert report["label"] == "Fréchet distance (model features)" and "classifier_score" not in report
    assert "precision" in report and "kernel_distance" in report


def test_class_token_where_the_checkpoint_lacks_the_pooling_layer(tmp_path: Path) -> None:
    """transformers would draw that layer at random: two models of one checkpoint would differ."""
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    save_encoder(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    extractor, shown = VisionExtractor(str(tmp_path)), pictures(32)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(images=list(shown), return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels["pixel_values"]).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(extractor(shown)["features"], expected, rtol=1e-4, atol=1e-5)
    assert extractor_sha256(str(tmp_path)) == extractor.sha256


def test_hash_is_of_the_weights_and_of_the_normalisation(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model")
    before = VisionExtractor(folder).sha256
    assert VisionExtractor(folder).sha256 == before
    assert VisionExtractor(save_encoder(tmp_path / "second", seed=1)).sha256 != before
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.1, 0.1]}))
    assert VisionExtractor(folder).sha256 != before
