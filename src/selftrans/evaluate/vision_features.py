"""One feature vector for each picture by a vision model of `transformers`, for distances such as FD-DINOv2.

As dgm-eval (2306.04675) and EDM2 (2312.02696) compute FD-DINOv2: the whole picture is resized (bicubic, antialiased) to the
square that the model was trained on, 224 for DINOv2, normalised as the model's processor does, and the feature is the model's
pooled output. Only safetensors are read and no code is run. Shape legend: n pictures, T tokens, F features.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selftrans.encoders.pretrained import load_model, sha256_of
from selftrans.encoders.vision import UNUSED, normalisation, picture_processor
from selftrans.messages import shape_text

SIDE = 224  #: of a model whose processor and configuration name no size


class VisionExtractor:
    """Pooled features of a vision model, by hub id or local folder.

    The pooled output of DINOv2 and CLIP is the normalised class token, that of convolutional models the mean over positions,
    that of SigLIP its attention pooling. Of a model without pooled output the feature is the mean of its tokens; where a
    checkpoint lacks the weights of the pooling layer (ViT, DeiT), it is the class token.
    `sha256` is of the weights and of how pictures are prepared. Raises ValueError when the model cannot be loaded, and when it
    is not deterministic.
    """

    pictures, head = True, False

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel

        model, absent = load_model(AutoModel, name, name, "a vision model", UNUSED)
        weights = {key: tensor for key, tensor in model.state_dict().items() if key not in absent}
        self._pooled = not any("pooler" in key for key in absent)
        config = getattr(model.config, "vision_config", model.config)
        self.model: Any = getattr(model, "vision_model", model).to(device).requires_grad_(False).eval()
        known = inspect.signature(self.model.forward).parameters
        if "pixel_values" not in known:
            raise ValueError(f"{name!r} is a {type(model).__name__}, which takes no pictures; give a vision model")
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
        processor = picture_processor(name)
        mean, std = normalisation(processor)
        self.side, self.channels = _side(processor, config), int(getattr(config, "num_channels", 3))
        self.mean, self.std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std))
        prepared = json.dumps([self.side, list(mean), list(std)]).encode()
        self.sha256 = sha256_of(weights, {"prepared": prepared})
        self.name = Path(name).resolve().name if Path(name).is_dir() else name
        probe = np.random.default_rng(0).integers(0, 256, (1, 32, 32, self.channels), dtype=np.uint8)
        found = self(probe)["features"]
        if not np.array_equal(found, self(probe)["features"]):
            raise ValueError(f"encoder {name!r} is not deterministic (does it mask patches?); choose another")
        self.dim = found.shape[1]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """'features' (n, F) of pictures uint8 (n, H, W, C); grey ones become RGB."""
        x = torch.from_numpy(images).to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        x = x.expand(-1, self.channels, -1, -1) if x.shape[1] == 1 else x
        if x.shape[1] != self.channels:
            raise ValueError(
                f"{self.name} takes {self.channels} channels, not images of {shape_text(images.shape[1:])}"
            )
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        out = self.model(pixel_values=(x - self.mean) / self.std, **self._options)
        return {"features": self._vector(out).float().cpu().numpy()}

    def _vector(self, out: Any) -> Tensor:
        """(n, F) of the model's output."""
        pooled, hidden = getattr(out, "pooler_output", None), out.last_hidden_state  # (n, T, F), or (n, F, h, w)
        if pooled is not None and self._pooled:
            return pooled.flatten(start_dim=1)
        if hidden.dim() == 4:
            return hidden.mean(dim=(2, 3))
        return hidden.mean(dim=1) if pooled is None else hidden[:, 0]


def _side(processor: Any, config: Any) -> int:
    """The side of the pictures that the processor makes or, where it leaves their size, that of the configuration."""
    if getattr(processor, "do_resize", False) or getattr(processor, "do_center_crop", False):
        made = processor(images=[np.zeros((64, 64, 3), dtype=np.uint8)], return_tensors="np")
        return int(made["pixel_values"].shape[-1])
    own = getattr(config, "image_size", None) or SIDE
    return int(own if isinstance(own, int) else own[0])
