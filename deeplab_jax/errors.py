"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """Input, configuration or environment is wrong in a way the message tells how to mend.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
