"""Read a checkpoint of any published form, and load it into the network of a variant."""

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ffnet.checkpoints.matching import converted_dtypes, match_state_dict
from ffnet.checkpoints.prefixes import common_prefix
from ffnet.checkpoints.problems import DOWNLOAD_AGAIN, CheckpointProblem
from ffnet.checkpoints.unpickling import (
    MAX_BYTES,
    CheckpointContents,
    check_zip_entries,
    read_legacy_format,
    read_torch_zip,
)
from ffnet.model import FFNet
from ffnet.system.errors import UserError
from ffnet.variants import VARIANTS, Variant

MAX_HEADER = 2**20  # bytes of a safetensors header
COUNTER = "n_averaged"  # torch's AveragedModel has this buffer beside the network
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch before 1.6 began with
OTHER_FILES = {  # first bytes of files that are not checkpoints -> what they are, and what to do
    b"version https://git-lfs": ("a git-lfs pointer, not the file itself", "Fetch the file with `git lfs pull`."),
    b"<": ("an HTML page, not a checkpoint", "Check the address it came from; it may need a login."),
    b"{": ("JSON, not a checkpoint", "If it holds encodings, give it with --encodings."),
    b"\x89HDF": ("an HDF5 file, not one that torch.save wrote", DOWNLOAD_AGAIN),
    b"\x1f\x8b": ("a gzip archive", "Unpack it and name the checkpoint inside."),
}


class InvalidCheckpointError(UserError):
    """A checkpoint that cannot be downloaded, read or loaded into the network."""


@dataclass(frozen=True)
class Checkpoint:
    """A network with the weights of a checkpoint, and where they come from."""

    model: FFNet  # in eval mode, on the CPU, float32
    form: str  # "state_dict", "module", "prepared", "equalized", "safetensors" or "release"
    equalized: bool  # batch norms are folded and cross-layer equalization is done; it must not be done again
    sha256: str  # of the file at `path`
    path: Path
    notes: tuple[str, ...] = ()  # sentences on what was removed or converted


def load_checkpoint(variant: Variant | str, path: Path | str) -> Checkpoint:
    """Load a file's weights into the network of `variant`, which may be a name in VARIANTS.

    Keys and shapes must be the model's, and so must the hyperparameters that a pickled module carries. What torch's
    strict loading accepts is accepted: other dtypes are converted, and `num_batches_tracked` may be missing. One
    unexpected key is accepted too: `smoothing.weight`, because a model without pre_down has the weights of its pre_down
    sibling.

    Raises:
        InvalidCheckpointError: if the file cannot be read or does not match.
    """
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    contents, sha256 = read_checkpoint(path, variant.release_file)
    with errors_naming(path):
        model = match_state_dict(variant, contents)
    notes = contents.notes()
    if dtypes := converted_dtypes(contents.state_dict, model.state_dict()):
        notes.append(f"Weights were converted from {' and '.join(dtypes)} to float32.")
    return Checkpoint(model, contents.form, contents.equalized, sha256, Path(path), tuple(notes))


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of any published form, contiguous and on the CPU, by their keys.

    Prefixes of wrappers, such as "module.", are removed from the keys.
    """
    return read_checkpoint(path)[0].state_dict


def read_checkpoint(path: Path | str, member: str = "") -> tuple[CheckpointContents, str]:
    """Return the contents and the sha256 of a checkpoint.

    Args:
        path: the file.
        member: which checkpoint to read if the file is a release zip; it may be left out if the zip holds only one.

    Raises:
        InvalidCheckpointError: if the file is not a checkpoint.
    """
    path = Path(path)
    with errors_naming(path):
        if path.exists() and not path.is_file():
            raise CheckpointProblem("this is not a file", "Name a checkpoint file.")
        with path.open("rb") as file:
            members = release_members(file)
            if members:
                return read_release(file, members, member)
            stream = io.BytesIO(file.read(MAX_BYTES + 1))
        if len(stream.getbuffer()) > MAX_BYTES:
            raise CheckpointProblem(f"this file has more than {MAX_BYTES} bytes", "Name the checkpoint of an FFNet.")
        sha256 = hashlib.sha256(stream.getbuffer()).hexdigest()  # of the very bytes that are read
        return read_stream(stream), sha256


@contextlib.contextmanager
def errors_naming(path: Path | str) -> Iterator[None]:
    """Turn any error that a bad file causes into one InvalidCheckpointError that names the file."""
    try:
        yield
    except CheckpointProblem as problem:
        raise InvalidCheckpointError(f"{path}: {printable(str(problem))}") from problem
    except FileNotFoundError as error:
        raise InvalidCheckpointError(f"{path}: there is no such file. Name another one.") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidCheckpointError(
            f"{path}: this file is broken or not a checkpoint ({printable(reason)[:200]}). {DOWNLOAD_AGAIN}"
        ) from error


def printable(text: str) -> str:
    """Return at most 1,000 characters on one line; a file's text must not control the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000])


def release_members(file: io.BufferedReader) -> list[str]:
    """Return the names of the checkpoints in a zip such as an FFNet release; none for other files and torch's zips."""
    names = []
    if file.read(4) == b"PK\3\4":
        check_zip_entries(file)
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    file.seek(0)
    return [name for name in names if name.endswith(".pth") and not any(n.endswith("data.pkl") for n in names)]


def read_release(file: io.BufferedReader, members: list[str], member: str) -> tuple[CheckpointContents, str]:
    """Return the contents of the release zip's checkpoint `member`, or of its only one, and the zip's sha256."""
    chosen = [name for name in members if name == member or not member]
    if len(chosen) != 1:
        problem = f"holds no {member}" if member else "holds several checkpoints"
        raise CheckpointProblem(
            f"this release zip {problem}; it holds {', '.join(members[:20])}", "Unpack it, or name another zip."
        )
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(chosen[0])
        usual = not info.flag_bits & 1 and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not usual or info.file_size > MAX_BYTES:
            raise CheckpointProblem(
                f"{info.filename} in this zip is encrypted, compressed in a rare way, or larger than {MAX_BYTES} bytes",
                "Unpack it and name the file.",
            )
        with archive.open(info) as compressed:
            stream = io.BytesIO(compressed.read(MAX_BYTES + 1))
    file.seek(0)
    return replace(read_stream(stream), form="release"), hashlib.file_digest(file, "sha256").hexdigest()


def read_stream(stream: io.BytesIO) -> CheckpointContents:
    """Read one checkpoint, whose form is detected from its first bytes."""
    head = bytes(stream.getbuffer()[:512])
    if head.startswith(b"PK\3\4"):
        contents = read_torch_zip(stream)
    elif head.startswith(LEGACY_MAGIC):
        contents = read_legacy_format(stream)
    elif begins_like_safetensors(head):
        contents = CheckpointContents("safetensors", safetensors.torch.load(stream.getvalue()))
    else:
        raise problem_of_other_file(head)
    if not contents.state_dict:
        raise CheckpointProblem("this file holds no tensors", "Name another one.")
    return without_prefix(contents)


def begins_like_checkpoint(head: bytes) -> bool:
    """Return whether a file with these first bytes, at least 16, may be a checkpoint or a release zip."""
    return head.startswith((b"PK\3\4", LEGACY_MAGIC)) or begins_like_safetensors(head)


def begins_like_safetensors(head: bytes) -> bool:
    """Return whether a file with these first bytes may be a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def without_prefix(contents: CheckpointContents) -> CheckpointContents:
    """Remove the prefixes of wrappers that all keys share."""
    keys = [key for key in contents.state_dict if key != COUNTER]
    prefix = common_prefix(keys)
    if not prefix:
        return contents
    layers = contents.hyperparameters.items()
    return replace(
        contents,
        state_dict={key.removeprefix(prefix): contents.state_dict[key] for key in keys},
        hyperparameters={layer.removeprefix(prefix): values for layer, values in layers},
        prefix=prefix,
    )


def problem_of_other_file(head: bytes) -> CheckpointProblem:
    """Return what is wrong with a file that does not begin like a checkpoint."""
    if not head:
        return CheckpointProblem("this file is empty", DOWNLOAD_AGAIN)
    for beginning, (kind, remedy) in OTHER_FILES.items():
        if head.lstrip().startswith(beginning):
            return CheckpointProblem(f"this is {kind}", remedy)
    return CheckpointProblem("this is neither a torch nor a safetensors file", DOWNLOAD_AGAIN)
