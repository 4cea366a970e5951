"""Images and labels. Nothing in this package depends on a network."""


class DatasetError(ValueError):
    """An error in a file of a dataset, which the message names before it says what is wrong and what to do."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises the error of a worker again, with its traceback in front of the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
