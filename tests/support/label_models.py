"""Small models of each family of `LabelTransformer`, and inputs for them."""

import torch

from selftrans.models.dit import DiT
from selftrans.models.lightning import LightningDiT
from selftrans.models.sit import SiT

SIZES = {"width": 48, "depth": 4, "heads": 4, "patch": 2}
FAMILIES = {"SiT": SiT, "DiT": DiT, "LightningDiT": LightningDiT}


def tiny(family="SiT", shape=(2, 4, 4), num_classes=10, **options):
    torch.manual_seed(0)
    return FAMILIES[family](shape, num_classes, **{**SIZES, **options})


def inputs(model, n=3, shape=None):
    """Latents, times and labels; of the model's shape by default."""
    g = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % max(1, model.num_classes)
    return torch.randn(n, *(shape or model.shape), generator=g), torch.rand(n, generator=g), labels
