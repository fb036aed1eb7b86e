"""Numeric precisions by the names that settings and flags use; torch's own names are those of its dtypes."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(precision: str) -> str:
    """The name that torch, numpy and stored manifests use: "float32" for "fp32"."""
    return str(PRECISIONS[precision]).removeprefix("torch.")
