"""The command `selftrans`: runs the one of `commands.py` that is named, and turns errors into one line and an exit status.

Nothing here loads torch: help and wrong arguments answer at once.
"""

from __future__ import annotations

import errno
import inspect
import io
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from selftrans.cli import hub_retries
from selftrans.cli.commands import COMMANDS
from selftrans.cli.options import Command, RecipeCommand
from selftrans.cli.overrides import parse_on_recipe
from selftrans.cli.parse import MANUAL, UsageError, blank, parse, wrapped
from selftrans.cli.unknown_option import unrecognised
from selftrans.messages import escaped, first_line, is_own_code, on_one_line, printable, redirect_closed_output
from selftrans.plugins import trust
from selftrans.suggest import closest, did_you_mean

#: exit statuses; EXIT_RESUME (75): stopped with a checkpoint
DONE, FAILED, WRONG_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130

#: number of an operating-system error -> what to do, as the end of a message
REMEDIES = {
    errno.ENAMETOOLONG: "; give a shorter name",
    errno.ENOSPC: "; free disk space, then repeat the command",
    errno.EDQUOT: "; free disk space, then repeat the command",
    errno.EROFS: "; choose another folder",
}
TEXTS = ("prompts",)  #: options whose values are sentences, which may name a page with a query


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM, and when the terminal is closed, which end a command as Ctrl-C does. `number`: of the signal."""

    last = -math.inf  #: when the last one was raised, by `time.monotonic`

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` (None: of the process) and return the exit status. Errors of users are one line on stderr."""
    from selftrans.train.interrupted import EXIT_RESUME, Interrupted, handle

    warnings.showwarning = _show_warning  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # as stderr: a name that cannot be encoded, in the last line, should not fail a command
        sys.stdout.reconfigure(errors="backslashreplace")
    hub_retries.install()
    words = list(sys.argv[1:] if argv is None else argv)
    # not of `train`: it has its own handling, and may wait for other processes in calls that run no handler
    if argv is None and words[:1] != ["train"]:
        handle(_terminate, {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)})  # no SIGHUP on Windows
    try:
        _print_overview(words) if not words or words[0].startswith("-") else parse_command(words).run()
    except Interrupted as stopped:
        return _reported(str(stopped), EXIT_RESUME)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        return _reported(str(error), WRONG_ARGUMENTS)
    except OSError as error:
        return _reported(_system_error(error), FAILED)
    except RuntimeError as error:
        return _reported(_runtime_error(error), FAILED)
    except (ValueError, FloatingPointError, ImportError, MemoryError) as error:
        return _reported(str(error) or "out of memory", FAILED)
    except KeyboardInterrupt as stopped:
        repeated = COMMANDS.get(words[0] if words else "", Command).REPEATED
        if isinstance(stopped, Terminated):
            return _reported(f"stopped by {signal.Signals(stopped.number).name}; {repeated}", 128 + stopped.number)
        return _reported(str(stopped) or f"interrupted; {repeated}", INTERRUPTED)
    except SystemExit as stop:  # tyro's, after a help page
        return int(stop.code or DONE)
    return DONE


def parse_command(words: Sequence[str]) -> Any:
    """The command that `words` (its name first) describe, ready to `run()`; code that it trusts is imported.

    Raises UsageError for wrong words, ValueError for code that cannot be imported, SystemExit(0) after a help page.
    """
    name, *rest = words
    _refuse_secrets(rest)
    if name not in COMMANDS:
        raise UsageError(f"command '{name}' is unknown{did_you_mean(closest(name, COMMANDS, most=1))}", "selftrans")
    kind, prog = COMMANDS[name], f"selftrans {name}"
    if issubclass(kind, RecipeCommand):
        return parse_on_recipe(kind, rest or ["--help"] if name == "train" else rest, prog)
    command = parse(blank(kind), rest, prog, kind=kind, see=prog)
    for name in getattr(command, "trust", ()):
        trust(name)
    return command


def _refuse_secrets(words: Sequence[str]) -> None:
    """ValueError for a URL with a password or a signature, also where no URL is expected: errors repeat what was given."""
    option = ""
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0].rpartition(".")[2].lstrip("-")
        if "://" in word and option not in TEXTS:
            from selftrans.data.streaming.remote import refuse_secrets

            refuse_secrets(word, queries=not any(map(str.isspace, word)))  # a sentence may name the address of a page


def _print_overview(words: Sequence[str]) -> None:
    """Print the answer to `selftrans`, `selftrans --help` or `selftrans --version`. UsageError for another option."""
    from selftrans import __version__

    if words and words[0] in ("-V", "--version"):
        print(f"selftrans {__version__}")
    elif words and words[0] not in ("-h", "--help"):
        raise UsageError(unrecognised(words, ["help", "version"]), "selftrans")
    else:
        commands = (f"  {name:<11}  {(inspect.getdoc(kind) or '').splitlines()[0]}" for name, kind in COMMANDS.items())
        usage = "usage: selftrans COMMAND ...   (selftrans COMMAND --help describes each)"
        print(wrapped("\n".join([usage, "", *commands, "", f"{MANUAL}: begin with tutorial.md"])))


def _system_error(error: OSError) -> str:
    """`FILE: what is wrong; what to do`; the file and the remedy only where they are known."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0, "")
    if error.filename is None:
        if error.errno == errno.ENOENT:  # of a relative path
            remedy = ": the working directory may have been removed; change into another"
        return f"{error.strerror}{remedy}" if remedy else str(error)
    return f"{printable(os.fsdecode(error.filename))}: {error.strerror}{remedy}"


def _runtime_error(error: RuntimeError) -> str:
    """One line for a path that cannot be resolved and for a device without memory; other errors are raised again."""
    if str(error).startswith("Symlink loop"):  # before Python 3.13
        return f"{error}: its symbolic links lead in a circle; give another path"
    from selftrans.train.out_of_memory import is_out_of_memory

    if not is_out_of_memory(error):
        raise error
    return f"out of memory ({first_line(error)}); work on fewer samples at a time (--batch-size), or on smaller ones"


def _terminate(number: int, frame: object) -> None:
    """Handle a signal: raise `Terminated`, unless it is the same one sent twice, as `timeout` does."""
    from selftrans.train.interrupted import SAME

    if (now := time.monotonic()) - Terminated.last > SAME:
        Terminated.last = now
        raise Terminated(number)


def _reported(message: str, status: int) -> int:
    """Print an error as one line; returns the exit status."""
    redirect_closed_output()
    print(f"selftrans: {escaped(on_one_line(message))}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, category: Any, filename: str, lineno: int, *_: Any) -> None:
    """Warnings of selftrans are one line; those of libraries are not shown."""
    if issubclass(category, UserWarning) and is_own_code(filename):
        redirect_closed_output()
        print(f"selftrans: warning: {escaped(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
