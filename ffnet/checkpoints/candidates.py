"""Choose the checkpoint of each model among the files that match; `ffnet.checkpoints.folder` has the rules."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ffnet.checkpoints.download import published_file
from ffnet.checkpoints.matching import COUNTER, match_state_dict
from ffnet.checkpoints.problems import CheckpointProblem
from ffnet.checkpoints.unpickling import CheckpointContents
from ffnet.variants import VARIANTS, Variant

SHOWN_FILES = 8  # that match one model, in a message


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
