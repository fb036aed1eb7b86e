"""Tiny transformers of diffusers as backbones, and what their originals compute for the same inputs."""

import functools

import torch

from selftrans.models import diffusers_dit, diffusers_flux, diffusers_pixart, diffusers_sd3
from selftrans.models.diffusers_dit import DiffusersDiTConfig
from selftrans.models.diffusers_flux import DiffusersFluxConfig
from selftrans.models.diffusers_pixart import DiffusersPixArtConfig
from selftrans.models.diffusers_sd3 import DiffusersSD3Config
from selftrans.types import MASK, TEXT, Conditions
from tests.support.diffusers_blocks import randomised

SHAPE, CLASSES = (4, 8, 8), 10
TEXTS = Conditions("text", tokens=5, width=24)
LABELS = Conditions("labels", CLASSES)
SIZES = {"layers": 3, "heads": 2, "head_dim": 24}
#: family -> (module, settings)
FAMILIES = {
    "dit": (diffusers_dit, functools.partial(DiffusersDiTConfig, **SIZES)),
    "pixart": (diffusers_pixart, functools.partial(DiffusersPixArtConfig, **SIZES)),
    "sd3": (diffusers_sd3, functools.partial(DiffusersSD3Config, **SIZES)),
    "flux": (diffusers_flux, functools.partial(DiffusersFluxConfig, **{**SIZES, "layers": 2}, single_layers=2)),
}


def tiny(family, shape=SHAPE, random=True, conditions=None, **settings):
    """A backbone; with `random` its weights are far from the zero gates of initialisation."""
    module, kind = FAMILIES[family]
    config = kind(**settings)
    config.check()
    torch.manual_seed(0)
    model = module.build(config, shape, conditions or (LABELS if family == "dit" else TEXTS))
    return randomised(model) if random else model


def condition(family, n=2, dtype=torch.float32):
    """Labels, one of them the null label; or text, with padding in the first row."""
    if family == "dit":
        return torch.tensor([3, CLASSES] * n)[:n]
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(n, TEXTS.tokens, dtype=torch.bool)
    mask[0, 3:] = False
    return {TEXT: torch.randn(n, TEXTS.tokens, TEXTS.width, generator=g).to(dtype), MASK: mask}


def inputs(model, family, n=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    x, t = torch.randn(n, *model.shape, generator=g), torch.rand(n, generator=g)
    return x.to(dtype), t.to(dtype), condition(family, n, dtype)


def mean_of_text(cond):
    return torch.stack([rows[mask].mean(dim=0) for rows, mask in zip(cond[TEXT], cond[MASK], strict=True)])


def pack(x):
    """diffusers' packing of 2 x 2 latent pixels: (N, C, H, W) -> (N, T, 4 C)."""
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(x, *x.shape)


def original(model, family, x, t, cond, guidance=None, pooled=None):
    """The output of diffusers' own forward (N, C or 2 C, H, W), called as its pipelines call it. Flux: packed, (N, T, 4 C)."""
    net, (n, _, rows, columns) = model.net, x.shape
    if family == "dit":
        return net(x, timestep=1000 * t, class_labels=cond).sample
    if family == "pixart":
        sizes = torch.tensor([[8.0 * rows, 8.0 * columns]] * n, dtype=x.dtype)
        added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
        mask = cond[MASK].to(x.dtype)
        return net(x, cond[TEXT], 1000 * t, added, encoder_attention_mask=mask).sample
    pooled = mean_of_text(cond) if pooled is None else pooled
    if family == "sd3":
        return net(x, cond[TEXT], pooled, 1000 * t).sample
    from diffusers import FluxPipeline

    ids = FluxPipeline._prepare_latent_image_ids(n, rows // 2, columns // 2, x.device, x.dtype)
    text_ids = torch.zeros(cond[TEXT].shape[1], 3)
    return net(pack(x), cond[TEXT], pooled, t, ids, text_ids, guidance).sample
