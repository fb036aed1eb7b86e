"""External vision models as frozen encoders: pixels ⇒ one feature per token of a student's grid.

Supports any vision model of `transformers` whose last hidden state is a grid of patches (DINOv2, ViT, SigLIP, CLIP,
I-JEPA, ConvNeXt, ...). Only safetensors are read and no code is run.
Shape legend: N batch, R side of a picture, T = grid² tokens row by row, D width.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selftrans.encoders.latent_space import UNSCALED
from selftrans.encoders.pretrained import encoder_name, load_model, sha256_of
from selftrans.messages import first_line

MAX_PREFIX = 16  #: maximum number of class and register tokens before the patches
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  #: mean and deviation of pixels in [0, 1]
UNUSED = ("pooler", "mask_token")  #: weights that features do not depend on; many checkpoints lack them


class Encoder:
    """A frozen vision model with a fixed grid of features. Not a module, so it is never optimised, wrapped or saved.

    Pictures are resized (bicubic, antialiased) so that the model's patches form the grid: to 224 for 16 x 16 patches of 14
    pixels, with interpolated position embeddings. If the model cannot read that size, or has another grid at it, pictures
    have the model's own size, and its features are resized to the grid (bilinear, antialiased), with a warning.
    Made by `load_encoder`. `grid` is (side, side), `width` is D, `flops` is the cost of one picture, `source`
    identifies the weights.
    """

    def __init__(
        self, name: str, model: Any, sha256: str, grid: int, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        config = getattr(model.config, "vision_config", model.config)
        self.name, self.sha256, self.side, self.grid = name, sha256, grid, (grid, grid)
        self.source = {"path": name, "sha256": sha256, "weights": sha256}
        self.model: Any = getattr(model, "vision_model", model).requires_grad_(False).eval()
        # hierarchical models (Swin, ConvNeXt) merge patches: their stride is only known from the output
        self.patch = 0 if hasattr(config, "depths") else _side(config, "patch_size")
        self.channels = int(getattr(config, "num_channels", 3))
        self.space = UNSCALED  #: of the inputs of `encode`: shift and scale of standardised pixels
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32).view(1, -1, 1, 1) for x in (mean, std))
        known = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
        self.size, native = self._fit(_side(config, "image_size") or 224)
        if native != grid:
            change = f"from {native}x{native} to {grid}x{grid}"
            warnings.warn(f"features of encoder {name} are resized {change}", stacklevel=3)
        probe = self._probe()
        # the counter does not support the fused attention of a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.encode(probe)
        features = self.encode(probe)
        self.width, self.flops = features.shape[-1], counter.get_total_flops()
        if not torch.equal(features, self.encode(probe)):
            raise ValueError(f"encoder {name} is not deterministic (does it mask patches?); choose another")

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3 or 1, R, R), in [-1, 1] before `space` scaled them, to float32 features (N, T, D) on their device."""
        features = self._grid(pixels, self.size)  # (N, h, h, D)
        if features.shape[1] != self.side:
            x = features.permute(0, 3, 1, 2)
            x = F.interpolate(x, size=self.grid, mode="bilinear", antialias=True, align_corners=False)
            features = x.permute(0, 2, 3, 1)
        return features.flatten(start_dim=1, end_dim=2)

    def _grid(self, pixels: Tensor, size: int) -> Tensor:
        """The model's own grid of features (N, h, h, D) for pictures resized to `size`."""
        weight = next(self.model.parameters())
        if weight.device != pixels.device or self.mean.device != pixels.device:
            self.model.to(pixels.device)
            self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        x = (self.space.unscale(pixels) + 1) / 2
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        if x.shape[1] == 1 < self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        x = (x - self.mean) / self.std
        hidden = self.model(pixel_values=x.to(weight.dtype), **self.options).last_hidden_state.float()
        if hidden.dim() == 4:  # convolutional: (N, D, h, h)
            return hidden.permute(0, 2, 3, 1)
        tokens = hidden.shape[1]
        side = size // self.patch if self.patch else math.isqrt(tokens)
        if not 0 <= tokens - side**2 <= (MAX_PREFIX if self.patch else 0):
            raise ValueError(f"its {tokens} tokens are not a square of patches after a few class and register tokens")
        return hidden[:, tokens - side**2 :].unflatten(dim=1, sizes=(side, side))

    def _fit(self, native: int) -> tuple[int, int]:
        """(side of the pictures, side of the model's grid at that size). Raises ValueError when it reads no pictures."""
        own = 0 if self.patch else self._side_at(native)[0]
        stride = self.patch or (native // own if own else 0)
        if stride and self._side_at(self.side * stride)[0] == self.side:
            return self.side * stride, self.side
        own, failed = self._side_at(native)
        if not own:
            raise ValueError(f"encoder {self.name} gives no grid of features for a picture ({failed}); choose another")
        return native, own

    @torch.no_grad()
    def _side_at(self, size: int) -> tuple[int, str]:
        """The side of the model's grid for pictures of this size, or 0 and the reason."""
        try:
            return self._grid(self._probe(), size).shape[1], ""
        except Exception as error:  # models raise any type for an unsupported size
            return 0, first_line(error, 200)

    def _probe(self) -> Tensor:
        """Noise (1, channels, 32, 32) to test the model with."""
        noise = torch.rand(1, self.channels, 32, 32, generator=torch.Generator().manual_seed(0))
        return (2 * noise - 1).to(next(self.model.parameters()).device)


def load_encoder(
    name: str, grid: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """Load a vision model of `transformers` by hub id or local folder, with grid x grid features per picture.

    `dtype` is that of the network; features are always float32. Raises ValueError when it does not exist,
    has no safetensors, lacks weights, or is not a vision model.
    """
    from transformers import AutoModel

    model, absent = load_model(AutoModel, name, name, "a vision model", UNUSED)
    stored = {key: tensor for key, tensor in model.state_dict().items() if key not in absent}
    mean, std = normalisation(picture_processor(name))
    return Encoder(encoder_name(name), model.to(device, dtype), sha256_of(stored), grid, mean=mean, std=std)


def picture_processor(name: str) -> Any:
    """The processor of a model's pictures; None, with a warning, where there is none that can be used."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the type depends on what is missing
        warnings.warn(
            f"encoder {name} has no usable preprocessor_config.json ({first_line(error, 200)}); pixels are normalised with "
            "ImageNet's mean and deviation",
            stacklevel=3,
        )
        return None


def normalisation(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation, per channel, with which a processor normalises pixels in [0, 1]; of None those of ImageNet."""
    if processor is None:
        return IMAGENET
    if not getattr(processor, "do_normalize", True):
        return (0.0,), (1.0,)
    return processor.image_mean, processor.image_std


def _side(config: Any, name: str) -> int:
    """A size in the configuration, given as a number or a pair; 0 if it is missing."""
    value = getattr(config, name, None) or 0
    return int(value[0] if isinstance(value, Sequence) else value)
