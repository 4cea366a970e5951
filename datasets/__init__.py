"""Images and labels. Nothing in this package depends on a network."""


class DatasetError(ValueError):
    """An error in a file of a dataset, which the message names before it says what is wrong and what to do."""
