"""Helpers of the tests of the command line."""

import subprocess
import sys


def one_line(capsys) -> str:
    """Stderr. AssertionError unless it is one line of selftrans, without a traceback, and stdout is empty."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("selftrans: ") and err.count("\n") == 1, (out, err)
    return err


def ends_with(argv: str, *modules: str) -> str:
    """The exit status of a command in a new process, followed by those of `modules` that it has loaded."""
    code = "import sys; from selftrans.cli.main import main; status = main(sys.argv[1:]); sys.stdout.flush()\n"
    code += f"print(status, *{set(modules)} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *argv.split()], capture_output=True, text=True)
    return done.stderr.splitlines()[-1]
