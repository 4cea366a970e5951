"""Errors that users cause and can fix."""


class UserError(ValueError):
    """An error in an option, a file or the environment, shown as one line without a traceback; exit status 2.

    The message names the file or option, then says what is wrong with it and what to do.
    """
