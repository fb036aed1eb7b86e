"""What every test gets: a fixed seed, one thread, no display, no network, and caches of its own."""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch and the hub's libraries are imported: they read these once. Subprocesses of tests inherit them.
CACHE = tempfile.mkdtemp(prefix="selftrans-tests-")
os.environ.update(
    HF_HOME=CACHE,  # neither reads nor litters the user's own
    XDG_CACHE_HOME=CACHE,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # tests run side by side, one process per core; threads that contend are far slower
    COLUMNS="120",  # help texts wrap alike on every terminal
)
for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "FORCE_COLOR"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same randomness, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A connection to anywhere but this machine fails at once, and says so."""
    patch = pytest.MonkeyPatch()
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOCAL):
            raise OSError(f"tests have no network: connection to {address[0]} refused")
        connect(self, address)

    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def cifar10_zip() -> Path:
    """The 50,000 CIFAR-10 training pictures, a zip of class folders; not part of the repository."""
    path = os.environ.get("SELFTRANS_CIFAR10")
    if not path:
        pytest.skip("SELFTRANS_CIFAR10 is not set to a zip of CIFAR-10's training pictures")
    if not Path(path).is_file():
        pytest.skip(f"SELFTRANS_CIFAR10={path} is not a file")
    return Path(path)
