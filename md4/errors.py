"""The two exceptions that end a command with one message (contract C8)."""


class UserError(ValueError):
    """Something the user gave is wrong. The message names what, its value, and what is allowed.

    The command line prints it without a stack trace and exits with code 2; HTTP answers 4xx.
    """

    exit_code = 2


class Failed(UserError):
    """What was asked for is right, but did not work out; the same again may. The command line exits with code 1."""

    exit_code = 1
