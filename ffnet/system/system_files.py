"""Files and folders that operating systems and file managers leave behind in any folder."""

from fnmatch import fnmatchcase
from pathlib import Path

_PATTERNS = (  # in lower case
    # macOS
    ".ds_store", "._*", ".appledouble", ".apdisk", ".documentrevisions-v100", ".fseventsd", ".localized",
    ".spotlight-v100", ".temporaryitems", ".trashes", ".volumeicon.icns", "__macosx", "icon\r",
    # Windows
    "$recycle.bin", "desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "recycler", "system volume information",
    "thumbs.db",
    # Linux, network storage and Jupyter
    ".directory", ".fuse_hidden*", ".nfs*", ".trash-*", "lost+found", "#recycle", "#snapshot", "@eadir", "@recycle",
    ".ipynb_checkpoints",
)  # fmt: skip


def is_system_file(name: str) -> bool:
    """Return whether a file or folder with this name belongs to an operating system or a file manager."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS)


def is_ignored(name: str) -> bool:
    """Return whether datasets ignore a file or folder with this name: it is hidden or a system file."""
    return name.startswith(".") or is_system_file(name)


def visible_files(folder: Path) -> list[Path]:
    """Return the files and folders in `folder` that are not ignored."""
    return [path for path in folder.iterdir() if not is_ignored(path.name)]


def ignored_files(folder: Path) -> list[Path]:
    """Return the files and folders in `folder` that are ignored."""
    return [path for path in folder.iterdir() if is_ignored(path.name)]
