"""The earlier run of --baseline: its scores per image, and how much each backend has changed since then."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets import Split
from ffnet.config import PROGRESS_FOLDER, Config
from ffnet.evaluation.metrics import known, mean_iou, percent, statistics
from ffnet.evaluation.scores import FP32, NPU, ONNX_FILE, ONNX_RUNTIME, SIMULATED, BackendNames, Shard
from ffnet.results.result import Baseline, BaselineChange
from ffnet.run.earlier import IMAGES_DIGEST, SETTINGS, EarlierRun, baseline_run
from ffnet.run.records import RecordedImages, read_records
from ffnet.run.storage import IMAGES, damage_named, scored_backends
from ffnet.system.errors import UserError
from ffnet.system.files import read_utf8


@dataclass(frozen=True)
class ScoredRun:
    """A finished run of one model, and its scores by the kind of their records."""

    folder: Path
    run: EarlierRun
    scores: Mapping[str, Shard] = field(repr=False)

    def compare(self, shards: Mapping[str, Shard], names: BackendNames) -> Baseline:
        """Return the paired change of each backend that both runs scored, on the images that both scored.

        Args:
            shards: Kind of records -> the scores of this run.
            names: Names of its backends.
        """
        changes, before = [], BackendNames(self.run.precision)
        for kind in [kind for kind in shards if kind in self.scores]:
            earlier, now = self.scores[kind], shards[kind]
            chip = "" if kind == IMAGES or len(shards) == 2 else f", {kind.partition('-')[2]}"
            for backend in now.scores.confusion_matrices:
                if backend in earlier.scores.confusion_matrices and (kind == IMAGES or backend == NPU):
                    changes.append(_change((before.of(backend), names.of(backend) + chip), backend, earlier, now))
        return Baseline(str(self.folder), self.run.model, changes)


def _change(names: tuple[str, str], backend: str, earlier: Shard, now: Shard) -> BaselineChange:
    """Return the change of a backend, whose names are those in the earlier and in this run."""
    _, *positions = np.intersect1d(earlier.indices, now.indices, return_indices=True)
    shards = zip((earlier, now), positions, strict=True)
    before, after = (shard.scores.confusion_matrices[backend][chosen] for shard, chosen in shards)
    change = statistics(after).labelled_miou - statistics(before).labelled_miou
    return BaselineChange(
        backend=names[1],
        baseline_backend=names[0],
        images=len(before),
        baseline_miou=percent(mean_iou(before.sum(0))),
        miou=percent(mean_iou(after.sum(0))),
        change=known(change.value),
        change_interval=change.interval,
    )


def open_baselines(config: Config, images: Split, digest: str) -> dict[str, ScoredRun]:
    """Return the earlier run of every model; `digest`: that of the images.

    Raises:
        UserError: If it scored other images or no backend of this run, or if its records are damaged.
    """
    return {name: _open(config.for_model(name), images, digest) for name in config.model.names}


def _open(config: Config, images: Split, digest: str) -> ScoredRun:
    run, folder = baseline_run(config), Path(config.output.baseline or "")
    settings = folder / PROGRESS_FOLDER / SETTINGS
    with damage_named(settings, "Repeat the run in this folder"):
        earlier_digest = dict(json.loads(read_utf8(settings)))[IMAGES_DIGEST]
    if earlier_digest != digest:
        raise UserError(
            f"--baseline {folder}: that run scored other images or labels ({run.images}; this one scores "
            f"{len(images)}). Score the same ones, with the same --split and --limit, or name another run."
        )
    names, scores = BackendNames(run.precision), {}
    backends = tuple(each for each in (ONNX_FILE, FP32, SIMULATED, ONNX_RUNTIME) if names.of(each) in run.backends)
    if not set(backends).intersection(scored_backends(config)[IMAGES]):
        raise UserError(
            f"--baseline {folder}: that run and this one have no backend in common (there: {', '.join(run.backends)}). "
            "Name another run."
        )
    pixels, classes = [height * width for height, width in images.sizes], len(images.label_set.classes)
    for kind in scored_backends(config):
        expected = RecordedImages(backends if kind == IMAGES else (*backends, NPU), pixels, classes)
        paths = sorted((folder / PROGRESS_FOLDER).glob(f"{kind}-[0-9]*.jsonl"))
        if shard := read_records(paths, expected, repair=False)[0]:
            scores[kind] = shard
    if IMAGES not in scores or scores[IMAGES].scores.images < len(images):
        raise UserError(f"--baseline {folder}: scores in {PROGRESS_FOLDER} are missing or damaged. Repeat that run.")
    return ScoredRun(folder, run, scores)
