"""Any published checkpoint form -> a state_dict, and an FFNet with it, without running anything in the file.

    python -m ffnet.checkpoint FILE [--save FILE.safetensors]

says what a file is, which variants it fits, its keys, its hash, and what loading it the ordinary way would have run.
"""

import argparse
import contextlib
import hashlib
import io
import os
import stat
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ffnet.disarm import Refused
from ffnet.errors import UserError
from ffnet.fit import build_fitting, fitting_variants
from ffnet.unpickle import MAX_BYTES, Contents, check_entries, read_old_format, read_torch_zip

MAX_RELEASE = 4 * 2**30  # bytes of a release zip, which is opened in place
MAX_HEADER = 2**20  # bytes of a safetensors header
SHOWN_LINES = 8  # of the Python text that a file carries
ADVICE = "download it again, or have its owner save a state_dict"

BEGINNINGS = {  # of files that are no checkpoint
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`",
    b"<": "is an HTML page, not a checkpoint: the address it came from was wrong or wanted a login",
    b"{": "is JSON, not a checkpoint; encodings are given beside a checkpoint, not in its place",
    b"\x89HDF": "is an HDF5 file, not one that torch.save wrote",
    b"\x1f\x8b": "is a gzip archive: unpack it and name the checkpoint inside",
}
FORMS = {
    "state_dict": "a state_dict",
    "release": "an FFNet release zip with a state_dict in it",
    "module": "a whole pickled module",
    "prepared": "a prepared file: a whole pickled torch.fx module",
    "equalized": "an equalized file: a whole pickled torch.fx module, its batch norms folded",
    "safetensors": "a safetensors file",
}
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch before 1.6 began with


class CheckpointError(UserError):
    """Names the file, what is wrong with it and what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model with a checkpoint's weights, and where they came from."""

    model: nn.Module  # FFNet, eval mode, CPU, float32
    form: str  # "state_dict", "module", "prepared", "equalized", "safetensors" or "release"
    equalized: bool  # batch norms are folded and cross-layer equalization is done: not to be done again
    sha256: str  # of the file at `path`
    path: Path


def read_state_dict(path):
    """{key: tensor} of any published form, contiguous on the CPU; CheckpointError where the file is none."""
    return read(path)[0].state


def load_model(variant, path):
    """The Loaded FFNet of `variant`, a row of VARIANTS, with the weights in `path`.

    Keys, shapes and dtypes have to be the model's, and so do the hyper-parameters that a pickled module carries. One
    surplus is accepted: the `smoothing.weight` of a pre_down model, whose other weights its sibling shares. A pre_down
    model asks for it, since equalization may have rescaled it. CheckpointError says what does not fit.
    """
    with errors_naming(path):
        contents, sha256 = read(path, variant.release_file)
        model = build_fitting(variant, contents)
    return Loaded(model, contents.form, contents.equalized, sha256, Path(path))


@contextlib.contextmanager
def errors_naming(path):
    """Turns whatever a bad file makes torch or zipfile raise into one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(f"{path}: {printable(str(error))}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: is broken or no checkpoint ({printable(first)[:200]}): {ADVICE}") from error


def printable(text):
    """One line of at most 1,000 characters, none of which would steer a terminal: the text may be a file's."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000])


def read(path, member=""):
    """(Contents, sha256) of the checkpoint `path`; of `member` where it is a release zip that holds many."""
    with errors_naming(path):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise Refused("is not a file")
        with Path(path).open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if is_release(handle, size):
                return read_release(handle, member)
            if size > MAX_BYTES:
                raise Refused(f"has {size} bytes, more than any checkpoint ({MAX_BYTES})")
            stream = io.BytesIO(handle.read(MAX_BYTES))
        sha256 = hashlib.sha256(stream.getbuffer()).hexdigest()  # of the very bytes that are read
        return read_stream(stream), sha256


def is_release(handle, size):
    """Whether the file is a zip, but not torch's: an FFNet release, which holds checkpoints by their names."""
    if handle.read(4) != b"PK\3\4" or size > MAX_RELEASE:
        handle.seek(0)
        return False
    check_entries(handle)
    with zipfile.ZipFile(handle) as archive:
        names = archive.namelist()
    handle.seek(0)
    return not any(name.split("/")[-1] == "data.pkl" for name in names) and any(n.endswith(".pth") for n in names)


def read_release(handle, member):
    """(Contents, sha256) of the checkpoint that a release zip holds as `member`, or of its only one."""
    before = version(handle)
    digest = hashlib.sha256()
    for chunk in iter(lambda: handle.read(2**20), b""):
        digest.update(chunk)
    with zipfile.ZipFile(handle) as archive:
        held = [name for name in archive.namelist() if name.endswith(".pth")]
        chosen = [name for name in held if name == member or not member]
        if len(chosen) != 1:
            wanted = f"no {member}" if member else "several checkpoints: unpack it and name one"
            raise Refused(f"is a release zip with {wanted}; it holds {', '.join(held[:20])}")
        info = archive.getinfo(chosen[0])
        plain = not info.flag_bits & 1 and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not plain or info.file_size > MAX_BYTES:
            raise Refused(f"holds {info.filename} encrypted, packed in a rare way, or with more than {MAX_BYTES} bytes")
        with archive.open(info) as stream:
            stream = io.BytesIO(stream.read(MAX_BYTES + 1))
    if version(handle) != before:
        raise Refused("was changed while it was read")
    return replace(read_stream(stream), form="release"), digest.hexdigest()


def version(handle):
    """What the file system changes when a file is written to."""
    status = os.fstat(handle.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_stream(stream):
    """Contents of one checkpoint in a BytesIO, told apart by how it begins; the stream is closed."""
    contents = reader_for(bytes(stream.getbuffer()[:512]))(stream)
    if not contents.state:
        raise Refused("holds no tensors")
    return contents


def reader_for(head):
    """The function that reads a file with this beginning; Refused says what else it is."""
    if head.startswith(b"PK\3\4"):
        return read_torch_zip
    if head.startswith(OLD_TORCH):
        return read_old_format
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return read_safetensors
    if not head:
        raise Refused(f"is empty: {ADVICE}")
    for beginning, reason in BEGINNINGS.items():
        if head.lstrip().startswith(beginning):
            raise Refused(reason)
    raise Refused(f"is neither a torch nor a safetensors file: {ADVICE}")


def read_safetensors(stream):
    """Contents of a safetensors file in a BytesIO."""
    import safetensors.torch

    return Contents("safetensors", safetensors.torch.load(stream.getvalue()))


def describe(path, contents, sha256):
    """What the command line prints of a checkpoint, in lines."""
    variants = fitting_variants(contents.state, contents.equalized)
    yield f"{path}: {FORMS[contents.form]}"
    yield f"sha256 {sha256}"
    yield f"fits {', '.join(variants) or 'no FFNet variant'}"
    for name in contents.names:
        yield f"would import {name}"
    for text in contents.code:
        yield f"would run {len(text.splitlines())} lines of Python, none of which was run:"
        yield from (f"    {line}" for line in text.strip().splitlines()[:SHOWN_LINES])
    yield f"{len(contents.state)} keys"
    for key, tensor in contents.state.items():
        yield f"    {key} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def save_safetensors(state, path):
    """Writes a state_dict as a safetensors file; CheckpointError where that cannot be done."""
    import safetensors.torch

    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: --save writes safetensors only: let the name end in .safetensors")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(safetensors.torch.save(state))
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}): name another place") from error
    finally:
        part.unlink(missing_ok=True)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ffnet.checkpoint", description="Says what a checkpoint file is.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--member", default="", help="which checkpoint of a release zip, if it holds several")
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="also write the tensors to this file")
    args = parser.parse_args(argv)
    try:
        contents, sha256 = read(args.file, args.member)
        if args.member and contents.form != "release":
            raise CheckpointError(f"{args.file}: is no release zip: leave out --member")
        if args.save:
            save_safetensors(contents.state, args.save)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    for line in describe(args.file, contents, sha256):
        print(printable(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
