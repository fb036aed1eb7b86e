"""How a run that was asked to stop ends. Does not import torch: the command line needs it before that is loaded."""

import signal
from collections.abc import Callable, Iterable
from typing import Any

#: exit status of a run that stopped on notice with its checkpoint written (EX_TEMPFAIL: try again)
EXIT_RESUME = 75
#: seconds within which signals count as one: `timeout` sends each to its command, and again to the group of processes
SAME = 0.1


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


def handle(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> dict[int, Any]:
    """Handle these signals, and return how each was handled before. SIGHUP stays ignored where it is: `nohup` asks for that."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    return {
        number: signal.signal(number, handler)
        for number in numbers
        if number != hang_up or signal.getsignal(number) != signal.SIG_IGN
    }
