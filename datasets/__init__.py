"""Readers of data sets. They check file names and headers without torch, which is imported to decode an image."""

from ffnet.system.errors import UserError


class DatasetError(UserError):
    """An error in a file of a data set."""
