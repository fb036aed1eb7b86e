"""Names of precisions, against torch's and numpy's own."""

import numpy as np
import pytest
import torch

from selftrans.precision import PRECISIONS, dtype_name


@pytest.mark.parametrize(
    ("name", "dtype", "bits"), [("fp32", "float32", 32), ("bf16", "bfloat16", 16), ("fp16", "float16", 16)]
)
def test_names_agree_with_torch(name, dtype, bits):
    assert dtype_name(name) == dtype and getattr(torch, dtype) is PRECISIONS[name]
    assert torch.finfo(PRECISIONS[name]).bits == bits


def test_stored_names_are_those_of_numpy():
    assert np.dtype(dtype_name("fp16")) == np.float16 and np.dtype(dtype_name("fp32")) == np.float32
    assert list(PRECISIONS) == ["fp32", "bf16", "fp16"]
