"""The command in several processes that find each other through their environment alone, as `srun` starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return int(there.getsockname()[1])


class Rank(subprocess.Popen):
    """One process of `world`, in a session of its own; what it says is kept in `said`."""

    def __init__(self, argv: list[str], said: Path, *, rank: int = 0, world: int = 1, port: int = 0) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        self.said = said
        with said.open("wb") as file:
            super().__init__(
                [sys.executable, "-m", *argv],
                env=env if port else None,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def group(self, number: int) -> None:
        """A signal to it and to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ends(self, seconds: float) -> int:
        """Its exit status; what it said, if it does not end in time."""
        try:
            return self.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said.read_text()}") from None

    def lines(self) -> list[str]:
        return [line for line in self.said.read_text().splitlines() if line.startswith("selftrans: ")]


@contextlib.contextmanager
def ranks(argv: list[str], folder: Path, world: int = 2) -> Iterator[list[Rank]]:
    """`selftrans` with these arguments in `world` processes; none outlives the block."""
    folder.mkdir(parents=True, exist_ok=True)
    port, started = free_port(), []
    try:
        for rank in range(world):
            started.append(Rank(["selftrans", *argv], folder / f"{rank}.txt", rank=rank, world=world, port=port))  # noqa: PERF401
        yield started
    finally:
        for process in started:
            process.group(signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def torchrun(argv: list[str], said: Path, world: int = 2) -> Iterator[Rank]:
    """The same under `torchrun`, whose process it is."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={world}", "--standalone", "-m", "selftrans"]
    process = Rank([*launcher, *argv], said)
    try:
        yield process
    finally:
        for pid in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # each is in a session of its own
        process.group(signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that are alive, the first one first."""
    try:
        return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true: Callable[[], object], what: subprocess.Popen, seconds: float = 100) -> None:
    """Wait for something that a process does."""
    end = time.monotonic() + seconds
    while not true():
        said = getattr(what, "said", None)
        assert what.poll() is None and time.monotonic() < end, said.read_text() if said else what
        time.sleep(0.02)
