"""Images and labels; knows no model."""


class DatasetError(ValueError):
    """Names the file that is wrong, what is wrong with it and what to do."""

    def __init__(self, message):
        # A DataLoader raises a worker's error anew, its traceback put in front of the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
