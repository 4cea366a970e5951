"""The published checkpoint files: their addresses, and a cache folder that they are downloaded to once.

No checksums were published. The sha256 of the first download is kept beside a file, and checked ever after.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import torch

from ffnet.checkpoint import CheckpointError

ZOO = "https://github.com/quic/aimet-model-zoo/releases/download/torch_segmentation_ffnet/"
RELEASES = "https://github.com/Qualcomm-AI-research/FFNet/releases/download/models/"
TRIES = 3
PAUSE = 1.0  # seconds before the second try, doubled before each further one
TIMEOUT = 30.0  # seconds until a server has to answer


def default_cache_dir():
    """The folder `ffnet` in torch hub's own, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "ffnet"


def published_file(variant):
    """(address, file name) of a variant's weights: the model zoo's prepared file, or the FFNet release zip.

    CheckpointError for the demo's variants, whose weights were not published.
    """
    if variant.is_demo:
        raise CheckpointError(
            f"{variant.name}: is the demo's own, nobody published weights for it: name a --checkpoint"
        )
    if variant.published.int8 is not None:
        name = f"prepared_{variant.name}.pth"
        return ZOO + name, name
    name = variant.release_file.split("/")[0] + ".zip"
    return RELEASES + name, name


def fetch(variant, cache_dir):
    """The path of a variant's published file in `cache_dir`, downloaded if it is not there yet.

    CheckpointError where it cannot be had, or is not the file of the first download any more.
    """
    url, name = published_file(variant)
    path = Path(cache_dir) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not path.exists():
                download(url, path)
            check_recorded(path, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written or read ({error}): name another --cache-dir") from error
    return path


@contextlib.contextmanager
def locked(path):
    """Keeps other processes from the same file until it is whole; the lock goes with the process."""
    with path.with_name(path.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def download(url, path):
    """Puts the file at `url` under the name `path` when it is whole; CheckpointError after the last try."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        for attempt in range(TRIES):
            try:
                download_once(url, part)
                break
            except (OSError, http.client.HTTPException, zipfile.BadZipFile, zlib.error) as error:
                give_up = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if give_up or attempt == TRIES - 1:
                    raise CheckpointError(unavailable(url, path, error)) from error
                time.sleep(PAUSE * 2**attempt)
        check_recorded(part, path)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def unavailable(url, path, error):
    reason = getattr(error, "reason", None) or error
    return (
        f"{url}: cannot be downloaded ({reason}): get the file where there is a network "
        f"and put it at {path}, or name it with --checkpoint"
    )


def download_once(url, part):
    """One try; an OSError or BadZipFile where the connection broke, CheckpointError where a page was sent instead."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        kind = response.headers.get_content_type()
    if kind != "text/html":
        with socket_timeout(TIMEOUT):  # which torch.hub does not set: a silent server would be waited for for ever
            torch.hub.download_url_to_file(url, str(part))
    if kind == "text/html" or begins_with(part, b"<"):
        raise CheckpointError(
            f"{url}: sends an HTML page, not the file: look at it in a browser, or name a --checkpoint"
        )
    size = part.stat().st_size
    if length is not None and size != int(length):
        raise OSError(f"{size} bytes came, but {length} were announced")
    with zipfile.ZipFile(part) as archive:  # both published forms are zips, so what is missing shows
        broken = archive.testzip()
    if broken:
        raise OSError(f"{broken} came broken")


@contextlib.contextmanager
def socket_timeout(seconds):
    """Sockets made in here raise TimeoutError when nothing comes for so long."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def begins_with(path, beginning):
    with path.open("rb") as handle:
        return handle.read(64).lstrip().startswith(beginning)


def check_recorded(file, path):
    """Compares the sha256 of `file` with the one recorded for `path`, or records it; CheckpointError if they differ."""
    record = path.with_name(path.name + ".sha256")
    digest = sha256_of(file)
    if not record.exists():
        part = record.with_name(f"{record.name}.{os.getpid()}.part")
        part.write_text(f"{digest}  {path.name}\n")
        part.replace(record)
        return
    recorded = record.read_text().split()[:1]
    if recorded != [digest]:
        raise CheckpointError(
            f"{path}: its sha256 is {digest}, but {' '.join(recorded) or 'nothing'} was recorded at the first download "
            f"in {record.name}: if you trust the new file, delete both and start again"
        )


def sha256_of(path):
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for chunk in iter(lambda: handle.read(2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()
