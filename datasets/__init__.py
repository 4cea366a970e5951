"""Readers of data sets. They check file names and headers without torch, which is imported to decode an image."""

from ffnet.system.errors import UserError


class DatasetError(UserError):
    """An error in a file of a data set."""

from types import SimpleNamespace
LAYOUTS={n:SimpleNamespace(title=n.title()) for n in ("cityscapes","kitti","bdd100k","folders")}
def check_folders(layout, root, split):
    from datasets.cityscapes import check_folders as c
    c(root, split)
def open_split(layout, root, split, limit=None, label_set=None, input_size=None):
    from datasets.cityscapes import CityscapesSplit
    return CityscapesSplit(root, split, limit)
