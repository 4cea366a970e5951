"""Download each published checkpoint file once to a cache folder.

No checksums were published, so the sha256 of the first download is written beside the file and compared in later runs.
"""

import http.client
import time
import urllib.parse
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm

from ffnet.checkpoints.loading import MAX_FILE, InvalidCheckpointError
from ffnet.system.files import read_utf8, remove_unfinished, sha256_of, unfinished_name, write_atomically
from ffnet.variants import Variant

ZOO = "https://github.com/quic/aimet-model-zoo/releases/download/torch_segmentation_ffnet/"
RELEASES = "https://github.com/Qualcomm-AI-research/FFNet/releases/download/models/"
TIMEOUT = 30.0  # seconds without an answer
MAX_SECONDS = 7200.0  # limit on a download; the largest release zip takes half an hour at 5 Mbit/s


class SameScheme(urllib.request.HTTPRedirectHandler):
    """Refuses redirects from https to anything else."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        """Return the request to follow a redirect, if it has the scheme of the first request."""
        if urllib.parse.urlsplit(args[-1]).scheme != req.type:
            raise OSError(f"redirected to {args[-1][:200]}, which is not {req.type}")
        return super().redirect_request(req, *args)


def default_cache_dir() -> Path:
    """Return the folder `ffnet` in torch hub's cache folder, which depends on TORCH_HOME and on the home folder."""
    return Path(torch.hub.get_dir()) / "ffnet"


def published_file(variant: Variant) -> tuple[str, str]:
    """Return the address and the file name of a variant's weights: the model zoo's file, or the FFNet release zip."""
    if variant.is_demo:
        raise InvalidCheckpointError(f"{variant.name}: no weights were published for this model. Add --checkpoint.")
    in_zoo = variant.published.int8 is not None
    name = f"prepared_{variant.name}.pth" if in_zoo else variant.release_file.split("/")[0] + ".zip"
    return (ZOO if in_zoo else RELEASES) + name, name


def download_published(variant: Variant, cache_dir: Path, quiet: bool = False) -> Path:
    """Return the path of a variant's published file in `cache_dir`; download it if it is not there yet.

    A progress bar is shown on stderr, unless `quiet`.
    """
    url, name = published_file(variant)
    path = Path(cache_dir) / name
    record = path.with_name(f"{name}.sha256")
    try:
        if not (path.exists() and record.exists()):  # otherwise the folder may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # another process may be downloading the same file
                if not path.exists():
                    download(url, path, quiet)
        check_sha256(path, record)
    except OSError as error:
        remedy = f"Give --checkpoint {path}" if path.exists() else "Set TORCH_HOME, or name another --cache-dir"
        raise InvalidCheckpointError(f"{path}: the file cannot be written or read ({error}). {remedy}.") from error
    return path


def download(url: str, path: Path, quiet: bool) -> None:
    """Download a file, so that `path` exists only if it is whole."""
    remove_unfinished(path.parent, (path.name,))
    temporary = path.with_name(unfinished_name(path.name))
    try:
        download_once(url, temporary, quiet)
        temporary.replace(path)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidCheckpointError(
            f"{url}: the file cannot be downloaded ({getattr(error, 'reason', None) or error}). Try again, or download "
            f"it where there is a network and put it at {path}, or name it with --checkpoint."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def download_once(url: str, path: Path, quiet: bool) -> None:
    """Download a zip file, as both published forms are; any error may be temporary."""
    end = time.monotonic() + MAX_SECONDS
    opener = urllib.request.build_opener(SameScheme)
    with opener.open(url, timeout=TIMEOUT) as response, path.open("xb") as file:
        total = response.length  # None without a Content-Length that is a number
        with tqdm.wrapattr(file, "write", total, desc=url.rpartition("/")[2], disable=quiet) as target:
            while data := response.read1(2**20):  # waits for any bytes, not for all of them
                target.write(data)
                if max(total or 0, file.tell()) > MAX_FILE or time.monotonic() > end:
                    raise OSError(f"more than {MAX_FILE} bytes or {MAX_SECONDS:.0f} seconds")
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > MAX_FILE:
            raise OSError(f"records of more than {MAX_FILE} bytes")
        if damaged := archive.testzip():
            raise OSError(f"{damaged} arrived damaged")


def check_sha256(path: Path, record: Path) -> None:
    """Compare the sha256 of a file with the one in `record`, or record it if none is."""
    sha256 = sha256_of(path)
    if not record.exists():
        write_atomically(record, f"{sha256}  {path.name}\n")
    recorded = " ".join(read_utf8(record).split()[:1])
    if recorded != sha256:
        raise InvalidCheckpointError(
            f"{path}: its sha256 is {sha256}, but {record.name} has {recorded or 'nothing'} from the first download. "
            f"If you trust this file, delete {record.name}; otherwise delete both to download it again."
        )
