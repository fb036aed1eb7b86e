"""How a run that was asked to stop ends. Imports nothing: the command line needs it before torch is loaded."""

#: exit status of a run that stopped on notice with its checkpoint written (EX_TEMPFAIL: try again)
EXIT_RESUME = 75
#: seconds within which signals count as one: `timeout` sends each to its command, and again to the group of processes
SAME = 0.1


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""
