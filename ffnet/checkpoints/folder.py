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
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.system_files import visible_files
from ffnet.checkpoints.download import published_file
from ffnet.checkpoints.loading import (
    InvalidCheckpointError,
    begins_like_checkpoint,
    errors_naming,
    printable,
    read_checkpoint,
    release_members,
)
from ffnet.checkpoints.matching import COUNTER, match_state_dict, matching_variants
from ffnet.checkpoints.problems import CheckpointProblem
from ffnet.checkpoints.unpickling import MAX_BYTES, CheckpointContents
from ffnet.variants import VARIANTS, Variant
from ffnet.wording import count, list_names

MAX_FILES = 1_000  # in a folder and its subfolders; the releases unpack to 50
MAX_FOLDERS = 200
MAX_RELEASE = 4 * 2**30  # bytes of a release zip; the largest one holds three checkpoints of 378 MiB
SHOWN_FILES = 8  # that match one model, in a message
HEAD = 512  # bytes that tell whether a file may be a checkpoint


@dataclass(frozen=True)
class FoundCheckpoints:
    """The checkpoints of the requested models."""

    paths: dict[str, Path]  # for `load_checkpoint`, by the name of the model, in the order of the request
    notes: tuple[str, ...]  # sentences on files that were ignored, and on choices that the user should know of


@dataclass(frozen=True)
class Candidate:
    """A checkpoint in the folder, without its tensors."""

    label: str  # names it in messages: its path in the folder, with the member of a release zip
    path: Path
    stem: str  # of its file name, or of the member's
    models: tuple[str, ...]  # that it fits
    weights: frozenset[str]  # published weights, as `weights_of` names them, that it may hold
    digest: str  # of its tensors
    smoothed: bool  # whether it holds a smoothing kernel
    equalized: bool


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


def fitting_models(names: Sequence[str], contents: CheckpointContents) -> tuple[str, ...]:
    """Return those of the named models, which have the file's keys and shapes, that the whole content fits.

    The Python text of a prepared file names the upsampling; it decides between models that differ only in that.

    Raises:
        CheckpointProblem: if no model fits, for example because a value is not finite.
    """
    fitting, problems = [], []
    for name in names:
        try:
            match_state_dict(VARIANTS[name], contents)
            fitting.append(name)
        except CheckpointProblem as problem:
            problems.append(problem)
    if not fitting:
        raise problems[0]
    modes = {mode for mode in ("nearest", "bilinear") if any(repr(mode) in text for text in contents.code)}
    return tuple(name for name in fitting if VARIANTS[name].upsampling in modes) or tuple(fitting)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a sha256 of all tensors that results depend on."""
    digest = hashlib.sha256()
    for key in sorted(key for key in state if not key.endswith(COUNTER)):
        digest.update(f"{key} {state[key].dtype} ".encode())
        digest.update(state[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_of(model: str) -> str:
    """Return a name of a model's published weights, which is the same for all models that share them."""
    return VARIANTS[model].release_file or model


def published_stems(variant: Variant) -> list[str]:
    """Return the names, without their ends, by which the user or the publisher marks a file as the variant's."""
    published = [] if variant.is_demo else [published_file(variant)[1], variant.release_file]
    return [variant.name, *(Path(name).stem for name in published)]


def weights_told(models: Sequence[str], stem: str, smoothed: bool) -> frozenset[str]:
    """Return which published weights a file that fits these models may hold.

    A known file name decides, else a smoothing kernel, which tells that the weights are those of a pre_down model.
    """
    named = [name for name in models if stem in published_stems(VARIANTS[name])]
    pre_down = [name for name in models if smoothed and VARIANTS[name].pre_down]
    return frozenset(weights_of(name) for name in named or pre_down or models)


def known_from_copies(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates; what is known of one's weights holds for those with the same tensors, too."""
    known: dict[str, frozenset[str]] = {}
    for candidate in candidates:
        if len(candidate.weights) == 1:
            known[candidate.digest] = known.get(candidate.digest, frozenset()) | candidate.weights
    return [replace(candidate, weights=known.get(candidate.digest, candidate.weights)) for candidate in candidates]


def suitable_candidates(variant: Variant, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that fit a variant and may hold its published weights."""
    return [c for c in candidates if variant.name in c.models and weights_of(variant.name) in c.weights]


def best_candidates(variant: Variant, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that match a variant best: none, one or several equally good ones."""
    stems = published_stems(variant)

    def rank(candidate: Candidate) -> tuple[int, ...]:
        named = stems.index(candidate.stem) if candidate.stem in stems else len(stems)
        return len(candidate.weights) > 1, candidate.smoothed != variant.pre_down, candidate.equalized, named

    suitable = suitable_candidates(variant, candidates)
    return [candidate for candidate in suitable if rank(candidate) == min(map(rank, suitable))]


def missing_problems(variants: Sequence[Variant], candidates: Sequence[Candidate]) -> Iterator[str]:
    """Yield what is wrong if variants have no checkpoint."""
    missing = [variant.name for variant in variants if not suitable_candidates(variant, candidates)]
    if not missing:
        return
    whose = "its checkpoint, or leave it" if len(missing) == 1 else "their checkpoints, or leave them"
    yield f"it holds no checkpoint for {', '.join(missing)}. Add {whose} out of --model-name."
    for name in missing:
        if rivals := [c for c in candidates if name in c.models]:
            yield f"{list_labels(rivals)} would fit {name}, but is known to hold the weights of another model."


def several_problems(best: Mapping[str, Sequence[Candidate]]) -> Iterator[str]:
    """Yield what is wrong if equally good files with different tensors match one model."""
    for name, files in best.items():
        if len({candidate.digest for candidate in files}) > 1:
            yield (
                f"{name} matches several files: {list_labels(files)}. Keep only one of them in the folder, or name the "
                f"right one {name}{files[0].path.suffix}."
            )


def contested_problems(best: Mapping[str, Sequence[Candidate]]) -> Iterator[str]:
    """Yield what is wrong if the same tensors would be used for models whose published weights differ."""
    models: dict[str, list[str]] = {}
    for name, files in best.items():
        if len({candidate.digest for candidate in files}) == 1:
            models.setdefault(files[0].digest, []).append(name)
    for names in models.values():
        if len({weights_of(name) for name in names}) > 1:
            file = best[names[0]][0]
            yield (
                f"{file.label} matches {' and '.join(names)}, whose published weights differ, and does not say which "
                f"of them it holds. Name it {names[0]}{file.path.suffix} if it is that model's, and add the other's."
            )


def unknown_notes(chosen: Mapping[str, Candidate]) -> Iterator[str]:
    """Yield a sentence for each model whose file may hold the weights of another one."""
    for name, candidate in chosen.items():
        others = [other for other in candidate.models if weights_of(other) != weights_of(name)]
        if others and len(candidate.weights) > 1:
            yield (
                f"{candidate.label} was used for {name}, but it matches {' and '.join(others)} as well, whose "
                "published weights differ, and does not say which of them it holds."
            )


def unused_notes(chosen: Mapping[str, Candidate], candidates: Sequence[Candidate]) -> Iterator[str]:
    """Yield a sentence for each model that other files match, too, if they are used for no model."""
    used = {candidate.digest for candidate in chosen.values()}
    for name, candidate in chosen.items():
        unused = [c for c in suitable_candidates(VARIANTS[name], candidates) if c.digest not in used]
        if unused:
            yield f"{candidate.label} was used for {name}, which it matches best; not used: {list_labels(unused)}."


def list_labels(candidates: Sequence[Candidate]) -> str:
    """Return the whole names of the first files of a list, and how many more there are."""
    more = f" and {len(candidates) - SHOWN_FILES} more" if len(candidates) > SHOWN_FILES else ""
    return ", ".join(candidate.label for candidate in candidates[:SHOWN_FILES]) + more
