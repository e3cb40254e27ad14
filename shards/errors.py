"""The one base of every error that a user can cause and mend.

The command line prints such an error without a traceback and leaves with exit code 2, so its message has to
stand alone: it names the thing that is wrong and what to do about it.
"""


class GristmillError(Exception):
    """A fault in the input, the recipe or the machine. The message names the thing and the remedy."""
