"""`selftrans doctor`: versions, device, compilation, attention kernels, disk speed. Each check that fails says why."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from selftrans.device import cpu_cores, default_device
from selftrans.experiments.bench.machine import cpu_name
from selftrans.messages import first_line, plural
from selftrans.plugins import installed_version
from selftrans.precision import PRECISIONS

PACKAGES = (
    "selftrans", "torch", "accelerate", "diffusers", "transformers", "safetensors", "huggingface_hub", "datasets", "peft",
    "numpy", "pillow", "tyro", "torch-fidelity", "soundfile", "av",
)  # fmt: skip
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
CHUNK, CHUNKS = 1 << 22, 16  #: bytes of a write, and how many: 64 MB


def examine(folder: Path) -> dict[str, Any]:
    """Everything that is checked, as json types. ValueError where `folder` is no folder."""
    disk = disk_speed(folder)  # first: a wrong folder is refused before the slow checks
    device = default_device()
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "devices": devices(),
        "precisions": {name: tried(partial(_product, device, dtype)) for name, dtype in PRECISIONS.items()},
        "compile": tried(partial(_compiled, device)),
        "attention": {name: tried(partial(_attention, device, kernel)) for name, kernel in KERNELS.items()},
        "disk": disk,
        "processes": {name: os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK") if name in os.environ},
    }


def tried(check: Callable[[], object]) -> str:
    """`works`, or the reason why a check fails."""
    try:
        check()
    except Exception as error:  # compilers and kernels raise many types
        if "No viable backend" in str(error):
            return "not available"
        return f"fails: {type(error).__name__}: {first_line(error)}"
    return "works"


def devices() -> list[dict[str, Any]]:
    """Each GPU with its memory in bytes, compute capability and the CUDA of torch; empty without one."""
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        found.append(
            {"name": about.name, "memory": about.total_memory, "capability": capability, "cuda": torch.version.cuda}
        )
    return found


def disk_speed(folder: Path) -> dict[str, Any]:
    """Bytes free, and bytes per second of writing 64 MB to disk (with fsync) and of reading them again (from the cache).

    Of a folder in which they cannot be written, `failed` says why in place of the speed. ValueError where it is no folder.
    """
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {why}; give another --folder")
    found = {"folder": str(folder.resolve()), "free": shutil.disk_usage(folder).free}
    block = os.urandom(CHUNK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".selftrans-doctor-") as file:
            started = time.perf_counter()
            for _ in range(CHUNKS):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            file.seek(0)
            while file.read(CHUNK):
                pass
            read = time.perf_counter()
    except OSError as error:
        return found | {"failed": error.strerror or str(error)}
    size = CHUNK * CHUNKS
    return found | {"write": round(size / (written - started)), "read": round(size / (read - written))}


def _product(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(16, 16, device=device, dtype=dtype)
    assert float((x @ x)[0, 0]) == 16


def _compiled(device: torch.device) -> None:
    x = torch.linspace(-1, 1, 64, device=device)
    compiled = torch.compile(lambda x: F.silu(x) * 2 + 1)
    torch.testing.assert_close(compiled(x), F.silu(x) * 2 + 1)


def _attention(device: torch.device, kernel: SDPBackend) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
    with sdpa_kernel(kernel):
        F.scaled_dot_product_attention(q, q, q)


def text(found: dict[str, Any]) -> str:
    """The findings as text; packages that are not installed are on one line."""
    packages = found["packages"]
    missing = [name for name, installed in packages.items() if installed is None]
    rows = {
        "system": found["system"],
        "python": found["python"],
        **{name: installed for name, installed in packages.items() if installed},
        "not installed": ", ".join(missing) or "-",
        "cpu": f"{found['cpu']}, {plural(found['cores'], 'core')}",
        **{f"gpu {k}": _gpu(each) for k, each in enumerate(found["devices"])},
        **({} if found["devices"] else {"gpu": "torch finds none: training runs on the CPU"}),
        **found["precisions"],
        "torch.compile": found["compile"],
        **{f"{name} attention": result for name, result in found["attention"].items()},
        "disk": _disk(found["disk"]),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _disk(about: dict[str, Any]) -> str:
    if "failed" in about:
        speed = f"64 MB cannot be written ({about['failed']})"
    else:
        speed = f"writes {about['write'] / 1e6:,.0f} MB/s"
    return f"{about['free'] / 1e9:.1f} GB free, {speed} in {about['folder']}"


def _gpu(about: dict[str, Any]) -> str:
    return f"{about['name']}, {about['memory'] / 2**30:.1f} GiB, capability {about['capability']}, CUDA {about['cuda']}"
