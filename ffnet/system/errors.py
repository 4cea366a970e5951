"""Errors that users cause and can fix."""

from typing import Any


class UserError(ValueError):
    """An error in an option, a file or the environment, shown as one line without a traceback; exit status 2.

    The message names the file or option, then says what is wrong with it and what to do.
    """


def check_type(argument: str, value: object, kind: Any, remedy: str) -> None:
    """Raise a UserError that names an argument of the Python API unless its value is of a type in `kind`."""
    if not isinstance(value, kind):
        raise UserError(f"{argument}: this is of type {type(value).__name__}. {remedy}.")
