"""Files and folders: which ones to ignore, checks of output folders, and writing files atomically."""

import codecs
import errno
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from ffnet.system.errors import UserError
from ffnet.system.text import count

_SYSTEM_FILES = (  # names that macOS, Windows, Linux and network storage use, in lower case
    "__macosx", "icon\r", "$recycle.bin", "desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "recycler",
    "system volume information", "thumbs.db", "lost+found", "#recycle", "#snapshot", "@eadir", "@recycle",
)  # fmt: skip


def is_ignored(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or belongs to an operating system or a file manager."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def check_output_folder(
    option: str, folder: Path, own_files: Collection[str] = (), force: bool = False, remedy: str = "Name a new folder"
) -> None:
    """Check, without changing anything, that an option's output folder can be created and written to.

    Hidden files, such as unfinished ones of a run that was killed, and those of operating systems do not count.

    Args:
        option: Name of the option, for the error.
        folder: May be missing.
        own_files: Names of files that an earlier run may have left there and that may be replaced.
        force: Accept other files in the folder.
        remedy: What to do about other files, apart from --force.

    Raises:
        UserError: If the folder holds other files, is not a folder, or can't be written to.
    """
    if folder.is_dir():
        names = [path.name for path in folder.iterdir()]
        others = sorted(name for name in names if not is_ignored(name) and not _is_own(name, own_files))
        if others and not force:
            more = f" and {count(len(others) - 1, 'other file')}" if others[1:] else ""
            raise UserError(
                f"{option} {folder}: the folder already holds {others[0]}{more}. {remedy}, or add --force to write "
                "into this one."
            )
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{option} {folder}: this is not a folder. Name another one.")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"{option} {folder}: {parent} is not a folder. Name another one.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: {parent} is not writable. Name another folder.")


def _is_own(name: str, own_files: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in own_files)


def unfinished_name(name: str) -> str:
    """Return a temporary name, which nobody can guess, for a file or folder while it is written."""
    return f".{name}.{secrets.token_hex(8)}"


def remove_unfinished(folder: Path, own_files: Collection[str]) -> None:
    """Remove unfinished files that killed processes left in a folder; no other process may be writing them.

    Args:
        folder: The folder.
        own_files: Names of the finished files; `*` stands for any characters.
    """
    for path in folder.iterdir():
        unfinished = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}", path.name)
        if unfinished and _is_own(unfinished[1], own_files):
            path.unlink()


def create_output_folder(option: str, folder: Path) -> None:
    """Create an option's output folder, and raise a UserError if it can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # permission bits alone do not show it
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"{option} {folder}: the folder can't be written to ({error.strerror}). Name another folder."
        ) from error


def write_atomically(path: Path, data: bytes | str) -> Path:
    """Write `data`, text as UTF-8, so that `path` is either complete or unchanged; return `path`.

    Bytes of file names that are not valid UTF-8 are written as they are on the disk.
    """
    data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    temporary = path.with_name(unfinished_name(path.name))
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_plain_file(path: Path | str) -> None:
    """Raise an OSError if a folder, pipe, device or socket is at `path`: opening some of them waits forever.

    Call this before opening a file that others may have put there. A missing file is accepted.
    """
    path = Path(path)
    if not path.exists() or path.is_file():
        return
    mode = path.stat().st_mode
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
    raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def read_utf8(path: Path) -> str:
    """Return the text of a UTF-8 file without the byte order mark that some editors write.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it is not UTF-8.
    """
    check_plain_file(path)
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # UTF-32 begins with it too
        raise ValueError("the file is UTF-16 text. Save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 text ({error})") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    check_plain_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
