"""Numeric precisions: the names in settings and flags, and the torch dtypes."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(precision: str) -> str:
    """The dtype name that torch, numpy and manifests use: "float32" for "fp32"."""
    return str(PRECISIONS[precision]).removeprefix("torch.")
