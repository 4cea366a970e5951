"""Folders and files that a run writes: checked before the work, whole or absent after it."""

import os
import shutil
import tempfile
from pathlib import Path

from ffnet.errors import UserError

RESULT_FILES = ("result.json", "report.html", "per_class.csv", "per_image.csv", "sensitivity.csv")
MEGABYTES = 20  # what a run's results take at most


def check_folder(option, folder, force=False, megabytes=MEGABYTES):
    """Makes the folder that `option` names and tells by UserError, before the work, why no results could go there.

    Refused are a folder that holds anything, unless `force`; one that can't be made or written to; and one on a disk
    with less than `megabytes` left.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(path.name for path in folder.iterdir())
        if held and not force:
            others = f" and {len(held) - 1} more" if len(held) > 1 else ""
            raise UserError(
                f"{option} {folder}: holds {held[0]}{others}; name a new folder, or add --force to write there"
            )
        with tempfile.TemporaryFile(dir=folder) as file:  # permission bits alone don't tell
            file.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{option} {folder}: can't be written to ({error.strerror}); name another folder") from error
    if free < megabytes * 1e6:
        raise UserError(
            f"{option} {folder}: {free / 1e6:.0f} MB are free there and the results may take {megabytes:.0f}; make "
            "room, or name another folder"
        )


def write_whole(path, data):
    """Writes bytes, or text as UTF-8, under `path` whole or not at all; returns it as a Path.

    Bytes of a file name that are no UTF-8 are written as they are on the disk.
    """
    path = Path(path)
    data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_stale(folder, written):
    """Removes an earlier run's result files that this run, having written `written`, did not replace."""
    for name in set(RESULT_FILES) - {Path(path).name for path in written}:
        (Path(folder) / name).unlink(missing_ok=True)
