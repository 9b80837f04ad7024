"""The exit codes of the commands."""

OK, FAILED, MISUSED = 0, 1, 2  # exit codes


class Failed(Exception):
    """The command failed: exit code 1."""


class Misused(Exception):
    """The command's arguments or files are invalid: exit code 2."""
