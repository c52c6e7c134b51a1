"""The one exception for a user's mistake (contract C8)."""


class UserError(ValueError):
    """Something the user gave is wrong. The message names what, its value, and what is allowed.

    The command line prints it without a stack trace and exits with code 2; HTTP answers 4xx.
    """
