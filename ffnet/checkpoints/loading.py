"""Read a checkpoint of any published form, load it into a network, and find the checkpoints of models in a folder."""

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import safetensors.torch

from ffnet.checkpoints.matching import BATCH_COUNTER, match_state_dict, matching_variants, without_prefix
from ffnet.checkpoints.unpickling import (
    MAX_BYTES,
    REMEDY,
    CheckpointContents,
    CheckpointProblem,
    read_legacy_format,
    read_torch_zip,
)
from ffnet.model import FFNet
from ffnet.system.errors import UserError, check_type
from ffnet.system.files import check_plain_file
from ffnet.system.memory import describe_lack, is_out_of_memory
from ffnet.system.text import list_names, printable
from ffnet.variants import VARIANTS, Variant, find_variant

MAX_FILE = 4 * 2**30  # bytes; the weights, their average and Adam's two moments of the largest FFNet take 1.5 GiB
MAX_HEADER = 2**20  # bytes of a safetensors header
# Names of checkpoints in a folder end in these.
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors", ".zip")
TOO_LARGE = "Name the checkpoint of an FFNet."
ZIP_MAGIC = b"PK\3\4"
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a number, which torch before 1.6 pickled first


class InvalidCheckpointError(UserError):
    """A checkpoint that cannot be downloaded, read or loaded into the network."""


@dataclass(frozen=True)
class Checkpoint:
    """A network with the weights of a checkpoint, and where they come from."""

    model: FFNet = field(repr=False)  # in eval mode, on the CPU, float32
    form: str  # "state_dict", "module", "prepared", "equalized", "safetensors" or "release"
    equalized: bool  # batch norms are folded and cross-layer equalization is done; it must not be done again
    sha256: str  # digest of the file at `path`
    path: Path
    notes: tuple[str, ...] = ()  # sentences on what was removed or converted

    @property
    def classes(self) -> int:
        """The number of classes that the network predicts."""
        return self.model.classes


def load_checkpoint(variant: Variant | str, path: Path | str) -> Checkpoint:
    """Load a file's weights into the network of `variant`, which may be a name in VARIANTS.

    The file decides the number of classes. Keys, other shapes and the hyperparameters of a pickled module must be the
    model's. Other dtypes are converted and `num_batches_tracked` may be missing, as in torch's strict loading. A model
    without pre_down accepts the unexpected key `smoothing.weight`, because it has the weights of its pre_down sibling.

    Raises:
        InvalidCheckpointError: If the file cannot be read or does not match.
        UserError: If there is no such variant.
    """
    variant = variant if isinstance(variant, Variant) else find_variant(variant)
    check_type("path", path, (str, Path), "Give the path of a checkpoint file")
    contents, sha256 = read_checkpoint(path, variant.release_file)
    with errors_naming(path):
        model = match_state_dict(variant, contents)
    notes = list(contents.notes)
    weights = [tensor for key, tensor in contents.state_dict.items() if not key.endswith(BATCH_COUNTER)]
    if dtypes := sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights} - {"float32"}):
        notes.append(f"Weights were converted from {' and '.join(dtypes)} to float32.")
    return Checkpoint(model, contents.form, contents.equalized, sha256, Path(path), tuple(notes))


def read_checkpoint(path: Path | str, member: str = "") -> tuple[CheckpointContents, str]:
    """Return the contents and the sha256 of a checkpoint file.

    `member` is the checkpoint to read in a release zip; it may be left out if the zip holds only one.

    Raises:
        InvalidCheckpointError: If the file is not a checkpoint.
    """
    with errors_naming(path):
        check_plain_file(path)
        with Path(path).open("rb") as file:
            if (size := file.seek(0, os.SEEK_END)) > MAX_FILE:
                raise CheckpointProblem(f"this file has {size / 2**30:.1f} GiB, more than any FFNet's", TOO_LARGE)
            contents = read_release(file, member) or read_stream(file)
            file.seek(0)
            return contents, hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def errors_naming(path: Path | str) -> Iterator[None]:
    """Turn any error that a bad file causes into one InvalidCheckpointError that names the file."""
    try:
        yield
    except CheckpointProblem as problem:
        raise InvalidCheckpointError(f"{path}: {printable(str(problem))[:1000]}") from problem
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidCheckpointError(f"{path}: this file cannot be read ({reason}). Name another one.") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise InvalidCheckpointError(f"{path}: {describe_lack(error, ' to read this file')}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidCheckpointError(
            f"{path}: this file is broken or not a checkpoint ({printable(reason)[:200]}). {REMEDY}"
        ) from error


def read_release(file: io.BufferedReader, member: str) -> CheckpointContents | None:
    """Return the contents of a release zip's checkpoint `member`, or of its only one; None for other files."""
    file.seek(0)
    if file.read(4) != ZIP_MAGIC:
        return None
    with zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if name.endswith((".pth", "data.pkl"))]
        if not members or any(name.endswith("data.pkl") for name in members):  # as torch's zips
            return None
        chosen = [name for name in members if name == member or not member]
        if len(chosen) != 1:
            problem = f"holds no {member}" if member else "holds several checkpoints"
            raise CheckpointProblem(f"this release zip {problem}; it holds {list_names(members)}", "Unpack it.")
        return replace(read_stream(io.BytesIO(archive.open(chosen[0]).read(MAX_BYTES + 1))), form="release")


def read_stream(file: IO[bytes]) -> CheckpointContents:
    """Read one checkpoint, whose form is detected from its first bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(30)
    file.seek(0)
    if head.startswith(ZIP_MAGIC):
        contents = read_torch_zip(file, size)
    elif LEGACY_MAGIC in head:
        contents = read_legacy_format(file)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        if size > MAX_BYTES:
            raise CheckpointProblem(f"this file has {size / 2**20:.0f} MiB, more than any FFNet's weights", TOO_LARGE)
        contents = CheckpointContents("safetensors", safetensors.torch.load(file.read()))
    else:
        remedy = ["Fetch it with `git lfs pull`."] * head.startswith(b"version https://git-lfs")
        raise CheckpointProblem(f"this file begins with {head!r}, unlike a checkpoint", *remedy)
    if not contents.state_dict:
        raise CheckpointProblem("this file holds no tensors", "Name another one.")
    return without_prefix(contents)


def find_in_folder(folder: Path, names: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Return the checkpoint of each named model in a folder and its subfolders, and notes on files that were ignored.

    A file with one of the model's known names is its checkpoint. Without such a file it is the only file that fits the
    model by keys, shapes and hyperparameters and whose name belongs to no other model.

    Raises:
        InvalidCheckpointError: If a model has no checkpoint or several, or if one would be used for models whose
            published weights differ; the message names all these models.
    """
    files = sorted(path for path in folder.rglob("[!.]*") if path.suffix in SUFFIXES and path.is_file())
    found = {name: files_named_for(VARIANTS[name], files) for name in names}
    unnamed = [name for name in names if not found[name]]
    notes = []
    for path in files if unnamed else ():
        try:
            for name in fitting_models(path, unnamed):
                found[name].append(path)
        except InvalidCheckpointError as error:
            notes.append(f"A file in the folder was ignored. {error}")
    if problems := list(choice_problems(found, unnamed)):
        labels = list_names([path.name for path in files]) or "no checkpoints"
        text = " ".join([*problems, f"The folder holds {labels}.", *notes[:1]])
        raise InvalidCheckpointError(f"--checkpoint {folder}: {printable(text)[:1000]}")
    return {name: paths[0] for name, paths in found.items()}, notes


def known_stems(variant: Variant) -> list[str]:
    """Return the names, without suffix, of files that hold a variant's weights: its own, the zoo's, the release's."""
    return [variant.name, f"prepared_{variant.name}", Path(variant.release_file).stem]


def files_named_for(variant: Variant, files: Sequence[Path]) -> list[Path]:
    """Return the files with the first of a variant's known names that any file has; its release zip comes last."""
    for stem in known_stems(variant):
        if paths := [path for path in files if path.stem == stem]:
            return paths
    return [path for path in files if path.name == f"{Path(variant.release_file).parent}.zip"]


def weights_of(name: str) -> str:
    """Return a name of a model's published weights: a pre_down variant and its sibling have the same."""
    return VARIANTS[name].release_file or name


def fitting_models(path: Path, names: Sequence[str]) -> list[str]:
    """Return the models in `names` that a file fits; a file with a known name of other weights fits none.

    Raises:
        InvalidCheckpointError: If the file can't be loaded.
    """
    owners = {weights_of(name) for name, variant in VARIANTS.items() if path.stem in known_stems(variant)}
    wanted = [name for name in names if not owners or weights_of(name) in owners]
    if not wanted or path.suffix == ".zip":  # release zips are found by their names
        return []
    contents, _ = read_checkpoint(path)
    fitting = []
    for name in matching_variants(contents, wanted):
        with contextlib.suppress(CheckpointProblem):
            match_state_dict(VARIANTS[name], contents)
            fitting.append(name)
    return fitting


def choice_problems(found: Mapping[str, Sequence[Path]], unnamed: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong if models have no file or several, or if a file fits `unnamed` models with other weights."""
    if missing := [name for name, paths in found.items() if not paths]:
        yield f"No file fits {list_names(missing)}. Add the missing files, or change --model-name."
    for name, paths in found.items():
        if len(paths) > 1:
            yield f"{name} has several files: {', '.join(map(str, paths))}. Keep one, or name it {name}.pth."
    for path in dict.fromkeys(path for name in unnamed for path in found[name]):
        names = [name for name in unnamed if found[name] == [path]]
        if len(set(map(weights_of, names))) > 1:
            yield (
                f"{path.name} fits {' and '.join(names)}, whose published weights differ. Name it "
                f"{names[0]}{path.suffix} if it is that model's."
            )
