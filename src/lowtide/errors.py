"""The one exception that users see."""


class LowtideError(Exception):
    """Bad input, told in one line that names the file, tensor or option and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
