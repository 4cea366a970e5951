"""The run of one model: what it saves image by image, and what it computes again when files are gone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Config, OutputConfig
from ffnet.evaluation.loop import ScoredBatch
from ffnet.evaluation.scores import no_scores
from ffnet.run.inputs import Inputs
from ffnet.run.ranks import Ranks
from ffnet.run.records import RecordFile
from ffnet.run.session import Run
from ffnet.run.storage import IMAGES
from tests.helpers.cityscapes_tree import write_tree
from tests.run.test_records import PAIR, random_scores


@pytest.fixture
def open_run(tree):
    """Begins a run on the images of `tree`, with an output folder."""
    write_tree(tree, "val", 6)
    inputs = Inputs(CityscapesSplit(tree, "val"), None, None, (), digest="i")

    def begin(**options):
        run = Run(Config(output=OutputConfig(tree / "out", **options)), Ranks(0, 1, "cpu"))
        run.begin(Path("w.pth"), "w", inputs)
        return run

    return begin


def scores_in_batches(indices):
    """Yield random scores of the images in batches of two; the predictions of image N are N."""
    for start in range(0, len(indices), 2):
        batch = indices[start : start + 2]
        pieces = [random_scores(1, seed=index) for index in batch.tolist()]
        matrices = {name: np.concatenate([each.confusion_matrices[name] for each in pieces]) for name in PAIR}
        predictions = {PAIR[1]: torch.stack([torch.full((2, 3), index, dtype=torch.uint8) for index in batch.tolist()])}
        scores = random_scores(len(batch))
        scores.confusion_matrices.update(matrices)
        yield ScoredBatch(np.arange(start, start + len(batch)), scores, predictions)


def test_saved_images_are_not_scored_again(open_run):
    with open_run() as run:
        run.saved_per_image(IMAGES, np.array([4, 1, 2]), no_scores(PAIR, 19), scores_in_batches)
    scored, written = [], {}

    def score(indices):
        scored.extend(indices.tolist())
        return scores_in_batches(indices)

    with open_run(resume=True) as run:
        write = lambda index, ids: written.update({index: ids})  # noqa: E731
        shard = run.saved_per_image(IMAGES, np.arange(6), no_scores(PAIR, 19), score, write)
    assert scored == list(written) == [0, 3, 5] and written[3][PAIR[1]].tolist() == [[3] * 3] * 2
    assert shard.indices.tolist() == list(range(6)) and shard.scores.unsaved is None
    for index in range(6):
        expected = random_scores(1, seed=index).confusion_matrices[PAIR[0]][0]
        assert np.array_equal(shard.scores.confusion_matrices[PAIR[0]][index], expected)


@pytest.mark.parametrize("failing", ("writer", "records"))
def test_a_full_disk_costs_no_scores_and_no_image_is_recorded_without_its_predictions(open_run, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device", "a.png")

    if failing == "records":
        monkeypatch.setattr(RecordFile, "append", fail)
    written = []
    write = fail if failing == "writer" else lambda index, _: written.append(index)
    with open_run() as run:
        shard = run.saved_per_image(IMAGES, np.arange(5), no_scores(PAIR, 19), scores_in_batches, write)
    assert shard.indices.tolist() == list(range(5)) and shard.scores.unsaved == "a.png: No space left on device"
    assert written == ([] if failing == "writer" else [0, 1])
    with open_run(resume=True) as run:
        assert run.saved_work.scores == {}
