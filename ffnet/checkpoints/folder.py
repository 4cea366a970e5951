"""Find the checkpoint of each requested model in a folder, by what the files hold and not by their names.

A file fits a model if `load_checkpoint` accepts it: keys, shapes, values and, in pickled modules, hyperparameters. The
66 published models have 45 different sets of keys and shapes, so a file may fit two or three models:

- The 16 pairs of a pre_down model and its sibling without: the same weights were published for both, so one file
  serves both.
- ffnet86S_dBBB, ffnet86S_BBB and ffnet150S_BBB and their mobile versions, which differ in the upsampling, and ffnet50
  and ffnet101, each AAA and dAAA, which differ in a stride: other weights were published for each.

The models of the second kind are told apart by the hyperparameters and the Python text of a pickled module, by the
member of a release zip, by a smoothing kernel, which only a pre_down model needs, by a file name that was published or
is the model's own, or by a copy of the same tensors of which one of these is known. A file that is known to hold the
weights of one is never used for the other. A file of which nothing is known is never used for two such models; it is
used for one, if no other file competes, and a note says so.

If several files fit a model, the best one is used: of known weights rather than unknown, with a smoothing kernel only
for a pre_down model, with batch norms rather than equalized, then with a published name. A note names the others. Files
with the same tensors are one. If several files are equally good, the user has to choose.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ffnet.checkpoints.candidates import (
    Candidate,
    best_candidates,
    contested_problems,
    digest_of,
    fitting_models,
    known_from_copies,
    missing_problems,
    several_problems,
    unknown_notes,
    unused_notes,
    weights_told,
)
from ffnet.checkpoints.loading import (
    InvalidCheckpointError,
    begins_like_checkpoint,
    errors_naming,
    printable,
    read_checkpoint,
    release_members,
)
from ffnet.checkpoints.matching import matching_variants
from ffnet.checkpoints.problems import CheckpointProblem
from ffnet.checkpoints.unpickling import MAX_BYTES, CheckpointContents
from ffnet.system.files import visible_files
from ffnet.system.text import count, list_names
from ffnet.variants import VARIANTS

MAX_FILES = 1_000  # in a folder and its subfolders; the releases unpack to 50
MAX_FOLDERS = 200
MAX_RELEASE = 4 * 2**30  # bytes of a release zip; the largest one holds three checkpoints of 378 MiB
HEAD = 512  # bytes that tell whether a file may be a checkpoint


@dataclass(frozen=True)
class FoundCheckpoints:
    """The checkpoints of the requested models."""

    paths: dict[str, Path]  # for `load_checkpoint`, by the name of the model, in the order of the request
    notes: tuple[str, ...]  # sentences on files that were ignored, and on choices that the user should know of


def find_checkpoints(folder: Path, names: Sequence[str]) -> FoundCheckpoints:
    """Return the checkpoint of each named model; the module's docstring says how they are matched.

    Files in subfolders are found too; hidden and operating-system files are ignored. Nothing in a file is run, and the
    tensors of one file at a time are in memory.

    Args:
        folder: the folder that --checkpoint names.
        names: keys of VARIANTS.

    Raises:
        InvalidCheckpointError: if there is no such folder, if it holds no checkpoint, or if any model has no
            checkpoint or several; the message names all these models.
    """
    variants = [VARIANTS[name] for name in dict.fromkeys(names)]
    scan = FolderScan(folder, frozenset(names))
    for path in listed_files(folder):
        scan.add(path)
    if not scan.found_any:
        problems = ["it holds no FFNet checkpoint. Name another folder, or a file.", *scan.notes()]
        raise InvalidCheckpointError(f"--checkpoint {folder}: {' '.join(problems)}")
    candidates = known_from_copies(scan.candidates)
    best = {variant.name: best_candidates(variant, candidates) for variant in variants}
    if problems := [*missing_problems(variants, candidates), *several_problems(best), *contested_problems(best)]:
        raise InvalidCheckpointError(f"--checkpoint {folder}: {' '.join([*problems, *scan.notes()])}")
    chosen = {name: files[0] for name, files in best.items()}
    notes = [*unknown_notes(chosen), *unused_notes(chosen, candidates), *scan.notes()]
    return FoundCheckpoints({name: candidate.path for name, candidate in chosen.items()}, tuple(notes))


def listed_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted; each folder once, even if links form a loop.

    Raises:
        InvalidCheckpointError: if the folder can't be read, or if it holds no files or too many.
    """
    files: list[Path] = []
    waiting = [folder]
    seen: set[Path] = set()
    try:
        if not folder.is_dir():
            problem = "this is not a folder" if folder.exists() else "there is no such file or folder"
            raise InvalidCheckpointError(f"--checkpoint {folder}: {problem}. Name another one.")
        while waiting and len(files) <= MAX_FILES and len(seen) <= MAX_FOLDERS:
            current = waiting.pop()
            if current.resolve() not in seen:
                seen.add(current.resolve())
                paths = visible_files(current)
                waiting += [path for path in paths if path.is_dir()]
                files += [path for path in paths if not path.is_dir()]
    except OSError as error:
        raise InvalidCheckpointError(
            f"--checkpoint {folder}: {error.filename} cannot be read ({error.strerror}). Make it readable, or name "
            "another folder."
        ) from error
    if len(files) > MAX_FILES or len(seen) > MAX_FOLDERS:
        raise InvalidCheckpointError(
            f"--checkpoint {folder}: it holds more than {MAX_FILES} files or {MAX_FOLDERS} folders. Name the folder in "
            "which the checkpoints are."
        )
    if not files:
        raise InvalidCheckpointError(f"--checkpoint {folder}: the folder holds no files. Name another one.")
    return sorted(files)


class FolderScan:
    """Reads the files of a folder, one at a time, and collects what they are."""

    def __init__(self, folder: Path, requested: frozenset[str]) -> None:
        self.folder = folder
        self.requested = requested
        self.candidates: list[Candidate] = []  # those that fit a requested model, or have the same keys and shapes
        self.found_any = False  # whether there is a checkpoint of any FFNet, also of one that is not requested
        self.others: list[str] = []  # files that are not checkpoints of any FFNet
        self.refused: dict[str, str] = {}  # files that begin like checkpoints, and what is wrong with them

    def add(self, path: Path) -> None:
        """Read a file."""
        label = printable(str(path.relative_to(self.folder)))
        with self.collecting_errors(label):
            with errors_naming(path):
                members = members_of(path)
            if members is None:
                self.others.append(label)
            elif members:
                self.add_release(path, label, members)
            else:
                self.add_checkpoint(path, label)

    def add_checkpoint(self, path: Path, label: str) -> None:
        """Read a checkpoint that is not in a release zip."""
        contents, _ = read_checkpoint(path)
        names = matching_variants(contents.state_dict, contents.equalized)
        if names:
            self.add_contents(path, label, path.stem, names, contents)
        else:
            self.others.append(label)

    def add_release(self, path: Path, label: str, members: Sequence[str]) -> None:
        """Read those members of a release zip that `load_checkpoint` would read for a requested model."""
        readers = {member: models_reading(member, members) for member in members}
        if not any(readers.values()):
            raise InvalidCheckpointError(f"{path}: no checkpoint in it is named as in an FFNet release. Unpack it.")
        self.found_any = True
        for member, names in readers.items():
            if not self.requested.isdisjoint(names):
                member_label = printable(f"{label} ({member})")
                with self.collecting_errors(member_label):
                    self.add_member(path, member_label, member, names)

    def add_member(self, path: Path, label: str, member: str, readers: Sequence[str]) -> None:
        """Read a member of a release zip, which `load_checkpoint` would read for the models `readers`."""
        contents, _ = read_checkpoint(path, member)
        matching = matching_variants(contents.state_dict, contents.equalized)
        names = [name for name in readers if name in matching]
        if not names:
            raise InvalidCheckpointError(
                f"{path}: {printable(member)} does not match {' or '.join(readers)}, whose name it has. Download it "
                "again."
            )
        self.add_contents(path, label, Path(member).stem, names, contents)

    def add_contents(
        self, path: Path, label: str, stem: str, names: Sequence[str], contents: CheckpointContents
    ) -> None:
        """Add a checkpoint whose keys and shapes are those of the named models, if one of them is requested."""
        self.found_any = True
        if self.requested.isdisjoint(names):
            return
        smoothed = "smoothing.weight" in contents.state_dict
        with errors_naming(path):
            models = fitting_models(names, contents)
        self.candidates.append(
            Candidate(
                label=label,
                path=path,
                stem=stem,
                models=models,
                weights=weights_told(models, stem, smoothed),
                digest=digest_of(contents.state_dict),
                smoothed=smoothed,
                equalized=contents.equalized,
            )
        )

    @contextlib.contextmanager
    def collecting_errors(self, label: str) -> Iterator[None]:
        """Collect what is wrong with a file, so that others are still read."""
        try:
            yield
        except InvalidCheckpointError as error:
            self.refused[label] = str(error)

    def notes(self) -> Iterator[str]:
        """Yield sentences on the files that were ignored."""
        if self.others:
            files = count(len(self.others), "file")
            yield f"Ignored {files} that no FFNet variant matches: {list_names(self.others)}."
        if self.refused:
            files = count(len(self.refused), "file")
            first = next(iter(self.refused.values()))
            yield f"Ignored {files} that cannot be loaded: {list_names(list(self.refused))}. The first error: {first}"


def members_of(path: Path) -> list[str] | None:
    """Return the checkpoints in a release zip, none for another checkpoint, or None if the first bytes are of neither.

    Raises:
        CheckpointProblem: if the file is larger than any checkpoint.
    """
    if not path.is_file():  # a pipe or a broken link
        return None
    with path.open("rb") as file:
        head = file.read(HEAD)
        if not begins_like_checkpoint(head):
            return None
        file.seek(0)
        if path.stat().st_size > MAX_RELEASE:
            raise CheckpointProblem(f"this file has more than {MAX_RELEASE} bytes", "Remove it from the folder.")
        members = release_members(file)
    if not members and path.stat().st_size > MAX_BYTES:
        raise CheckpointProblem(f"this file has more than {MAX_BYTES} bytes", "Remove it from the folder.")
    return members


def models_reading(member: str, members: Sequence[str]) -> list[str]:
    """Return the models for which `load_checkpoint` reads `member` of a release zip with these members."""
    return [
        name
        for name, variant in VARIANTS.items()
        if variant.release_file == member or (variant.is_demo and len(members) == 1)
    ]
