"""The command in several processes, configured by environment variables only, as `srun` starts them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import torch

from tests.support import toy

#: seconds within which anything that a test waits for happens, also on a machine that is busy with other work
LONGEST = 300


def free_port() -> int:
    """A free port, below those that the system gives to connections: none of them takes it before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):  # all tests seed `random` alike
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("none of 100 ports is free")


#: imported once, by the process from which those of `spawn` are forked
PRELOADED = ["torch._dynamo", "torch.distributed.tensor", "tests.support.toy"]


def spawn(work: Callable[..., object], *args: object, world: int = 2) -> None:
    """Run `work(rank, *args)` in `world` processes that find each other as those of a launcher do; fails if one fails."""
    get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _ranked, (work, args, world, free_port()), nprocs=world, start_method="forkserver"
    )


def _ranked(rank: int, work: Callable[..., object], args: tuple[object, ...], world: int, port: int) -> None:
    os.environ |= _environment(rank, world, port)
    toy.quicken()
    work(rank, *args)


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in settings.items()}


class Rank(subprocess.Popen):
    """One process of `world`, in its own session; its stdout and stderr go to the file `output`."""

    def __init__(self, argv: list[str], output: Path, *, rank: int = 0, world: int = 1, port: int = 0) -> None:
        env = os.environ | _environment(rank, world, port) | {"LOCAL_WORLD_SIZE": str(world)}
        self.output = output
        with output.open("wb") as file:
            super().__init__(
                [sys.executable, "-m", *argv],
                env=env if port else None,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def group(self, number: int) -> None:
        """Send a signal to it and to every process that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ends(self, seconds: float = LONGEST) -> int:
        """Its exit status. AssertionError with its output if it does not end in time."""
        try:
            return self.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.output.read_text()}") from None

    def lines(self) -> list[str]:
        return [line for line in self.output.read_text().splitlines() if line.startswith("selftrans: ")]


class Forked:
    """`Rank`, forked from a process that has imported torch instead of started: the same environment, session and output."""

    ends, lines, group = Rank.ends, Rank.lines, Rank.group

    def __init__(self, argv: list[str], output: Path, *, rank: int, world: int, port: int) -> None:
        context, self.output = get_context("forkserver"), output
        context.set_forkserver_preload(PRELOADED)
        output.touch()
        settings = _environment(rank, world, port) | {"LOCAL_WORLD_SIZE": str(world)}
        self._process = context.Process(target=_selftrans, args=(argv[1:], str(output), settings))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("selftrans", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _selftrans(argv: list[str], output: str, settings: dict[str, str]) -> None:
    """The command in a forked process."""
    from selftrans.cli.main import main

    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= settings
    toy.quicken()
    sys.exit(main(argv))


@contextlib.contextmanager
def ranks(
    argv: list[str], folder: Path, world: int = 2, kind: type[Rank] | type[Forked] = Forked
) -> Iterator[list[Rank | Forked]]:
    """`selftrans` with these arguments in `world` processes; all are ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    port, started = free_port(), []
    try:
        for rank in range(world):
            started.append(kind(["selftrans", *argv], folder / f"{rank}.txt", rank=rank, world=world, port=port))  # noqa: PERF401
        yield started
    finally:
        for process in started:
            process.group(signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def torchrun(argv: list[str], output: Path, world: int = 2) -> Iterator[Rank]:
    """The same under `torchrun`; yields the process of torchrun itself."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={world}", "--standalone", "-m", "selftrans"]
    process = Rank([*launcher, *argv], output)
    try:
        yield process
    finally:
        for pid in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # each is in its own session
        process.group(signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """Living processes that `pid` has started, by rising pid."""
    try:
        return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], object], process: subprocess.Popen | Forked, seconds: float = LONGEST) -> None:
    """Wait until `condition` holds. AssertionError with the output of the process if it ends before, or the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        output = getattr(process, "output", None)
        assert process.poll() is None and time.monotonic() < end, output.read_text() if output else process
        time.sleep(0.02)


class Killed(BaseException):
    """Raised to end a run as a kill would: no handler of the package catches it."""


def start(argv: list[str]) -> subprocess.Popen[str]:
    """`selftrans` with these arguments in another process."""
    command = [sys.executable, "-m", "selftrans", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    """Wait until a file that the process writes has `count` lines."""
    deadline = time.monotonic() + LONGEST
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
