"""Errors that users cause and can fix."""


class UserError(ValueError):
    """An error in an option, a file or the environment, shown as one line without a traceback; exit status 2.

    The message names the file or option, then says what is wrong with it and what to do.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch or CUDA has run out of memory; on a CPU, torch has no class of its own for it."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "CUDA out of memory")
    )
