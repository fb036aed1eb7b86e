"""Tiny vision models of `transformers` with random weights, saved as `transformers` saves them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8}
VIT = SIZES | {"image_size": 32, "patch_size": 8}


def _two(kind: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=VIT)
    return getattr(transformers, f"{kind}Model")(config)


def _one(kind: str, **options: object) -> transformers.PreTrainedModel:
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))


#: name -> (a new model, number of tokens before its patches)
FAMILIES = {
    "dinov2": (lambda: _one("Dinov2", **SIZES, image_size=28, patch_size=7), 1),
    "registers": (lambda: _one("Dinov2WithRegisters", **SIZES, image_size=28, patch_size=7, num_register_tokens=4), 5),
    "dinov3": (lambda: _one("DINOv3ViT", **VIT, num_register_tokens=2), 3),
    "vit": (lambda: _one("ViT", **VIT), 1),
    "deit": (lambda: _one("DeiT", **VIT), 2),
    "ijepa": (lambda: _one("IJepa", **VIT), 0),
    "siglip vision": (lambda: _one("SiglipVision", **VIT), 0),
    "siglip": (lambda: _two("Siglip"), 0),
    "clip": (lambda: _two("CLIP"), 1),
    "convnext": (lambda: _one("ConvNext", hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], image_size=64), 0),
    "resnet": (lambda: _one("ResNet", embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1]), 0),
    "swin": (
        lambda: _one("Swin", image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4),
        0,
    ),
}


def save_encoder(folder: Path, family: str = "dinov2", *, processor: bool = True, seed: int = 0) -> str:
    """A model of `FAMILIES` with random weights, none left at its initial zero or one, and the settings of its processor."""
    torch.manual_seed(seed)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    if processor:
        settings = {"image_processor_type": "BitImageProcessor", "image_mean": MEAN, "image_std": STD}
        settings |= {"do_normalize": True, "do_resize": False, "do_center_crop": False, "do_rescale": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@torch.no_grad()
def patches_of(folder: str, images: np.ndarray, prefix: int = 1, **options: bool) -> Tensor:
    """(N, T, D): the patch tokens of images (N, R, R, 3) uint8, by `transformers` alone."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = getattr(model, "vision_model", model)
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    hidden = model(pixel_values=pixels, **options).last_hidden_state
    return hidden.flatten(start_dim=2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, prefix:]
