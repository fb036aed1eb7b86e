"""Processes of the real command that start in milliseconds, because they are forked from one with all imports done.

A fresh interpreter needs seconds to import torch. `Forks` starts one server process, which imports what the commands import,
starts no thread and computes no tensor, and forks a child for each command line. The child is an ordinary process with its
own memory, files and locks, and can be ended by SIGKILL.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def serve() -> None:
    """Loop of the server process: a line in is a command; lines out are the pid of its child and its exit code."""
    import PIL.Image  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401 - imported when a model is built on the meta device

    from selftrans.cli.main import main
    from selftrans.sampling import images  # noqa: F401
    from tests.support import toy

    toy.quicken()  # before any thread starts: a child does not inherit threads
    toy.count_operations()
    gc.collect()
    gc.freeze()  # a child does not go through the objects of its parent
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(0)
            try:
                os._exit(main(command["argv"]))
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(70)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Child:
    """A running command, with the interface of `subprocess.Popen`."""

    def __init__(self, server: Any, argv: list[str], output: Path) -> None:
        self._server = server
        server.stdin.write(json.dumps({"argv": argv, "output": str(output)}) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code once it has ended; negative for a process that was killed."""
        if self.returncode is None:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:  # the server has waited for it, so it is never a zombie
                self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._server.stdout.readline())
        return self.returncode


class Forks:
    """The server process and its children, one child at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.support.forks"]
        self._server = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=ROOT)

    def start(self, argv: list[str], output: Path) -> Child:
        output.touch()  # a child may be killed before it opens the file
        return Child(self._server, argv, output)

    def close(self) -> None:
        self._server.communicate()


if __name__ == "__main__":
    serve()
