"""How a command ends."""

OK, FAILED, MISUSED = 0, 1, 2  # exit codes


class Failed(Exception):
    """The command could not do its work: exit code 1."""


class Misused(Exception):
    """The command was asked for something that cannot be right: exit code 2."""
