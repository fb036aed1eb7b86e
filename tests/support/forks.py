"""Real processes of the real command that start in milliseconds: children of one that has imported everything.

A fresh interpreter needs seconds for torch alone. `Forks` starts one process, which imports what the commands import, makes
no thread and computes nothing, and forks a child for each command line. The child is a process like any other: it has
its own memory, files and locks, and dies of SIGKILL without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def serve() -> None:
    """In the parent of the children: a line in is a command, lines out are its child's number and its exit."""
    import PIL.Image  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # what building a model on the meta device brings in

    from selftrans import recipes  # noqa: F401
    from selftrans.cli.main import main
    from selftrans.data.prepare import prepare  # noqa: F401
    from selftrans.sampling import images  # noqa: F401
    from selftrans.train import run  # noqa: F401

    torch.set_num_threads(1)  # before any is made: a child does not inherit threads
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            said = os.open(command["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.close(0)
            try:
                os._exit(main(command["argv"]))
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(70)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Child:
    """One command under way, with the words of `subprocess.Popen`."""

    def __init__(self, server: Any, argv: list[str], said: Path) -> None:
        self._server = server
        server.stdin.write(json.dumps({"argv": argv, "said": str(said)}) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code once it has ended; that of a process that was killed is negative."""
        if self.returncode is None:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:  # its parent waits for it, so that it never stays as a zombie
                self.wait()
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._server.stdout.readline())
        return self.returncode


class Forks:
    """The parent of the children. One child at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=environment)

    def start(self, argv: list[str], said: Path) -> Child:
        said.touch()  # a child may be killed before it opens it
        return Child(self._server, argv, said)

    def close(self) -> None:
        self._server.communicate()


if __name__ == "__main__":
    serve()
