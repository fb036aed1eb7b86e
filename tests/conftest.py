"""Set-up of every test: a fixed seed, one thread, no display, no network, a temporary cache; and the order in parallel."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Set before torch and the hub libraries are imported, which read these once. Subprocesses of tests inherit them.
CACHE = tempfile.mkdtemp(prefix="selftrans-tests-")
os.environ.update(
    HF_HOME=CACHE,  # the user's own cache is neither read nor written
    XDG_CACHE_HOME=CACHE,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # tests run in parallel, one process per core; more threads than cores are far slower
    COLUMNS="120",  # help texts wrap the same on every terminal
)
for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "FORCE_COLOR"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.support.shared import seed  # noqa: E402

torch.set_num_threads(1)

SLOW = 40  #: a test that is marked slow takes about as long as so many others
LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would start files with many tests first, however long they take


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In parallel, the files that take longest come first: no worker is left with one of them while the others have ended."""
    if hasattr(config, "workerinput"):
        cost: Counter[Path] = Counter()
        for item in items:
            cost[item.path] += SLOW if item.get_closest_marker("slow") else 1
        items.sort(key=lambda item: -cost[item.path])


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts with the same seeds, independent of the tests before it."""
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """So does a fixture that several tests share: any of them may be the first to need it."""
    if fixturedef.scope != "function":
        seed()


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A connection to another machine fails at once with a clear error."""
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
