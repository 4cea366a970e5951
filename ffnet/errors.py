"""What the user is told without a traceback, as one line and exit status 2."""


class UserError(ValueError):
    """Says which file or option is wrong, what is wrong with it and what to do."""
