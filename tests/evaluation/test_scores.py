"""Scores of shards against the scores that the shards were cut from."""

import numpy as np
import pytest

from ffnet.evaluation.scores import Scores, Shard, merge_shards

MATRICES, AGREEING, PIXELS = np.arange(5 * 19 * 19).reshape(5, 19, 19), np.arange(5), np.arange(8, 13)


def shard_of(indices, seconds=1.0, batch_size=None):
    indices = np.array(indices)
    agreeing = {("A", "B"): AGREEING[indices]}
    scores = Scores({"A": MATRICES[indices]}, agreeing, PIXELS[indices], {"A": seconds}, 0.5, batch_size=batch_size)
    return Shard(indices, scores)


@pytest.mark.parametrize("parts", (([0, 3], [1, 4], [2]), ([4, 0], [3, 1], [2]), ([2, 1, 0], [3, 4], [0, 4])))
def test_shards_are_merged_in_the_order_of_the_images_and_each_image_counts_once(parts):
    merged = merge_shards([shard_of(part, seconds, 5 - seconds) for seconds, part in enumerate(parts, 1)])
    assert merged.indices.tolist() == [0, 1, 2, 3, 4] and merged.scores.images == 5
    assert np.array_equal(merged.scores.confusion_matrices["A"], MATRICES)
    assert np.array_equal(merged.scores.agreeing_pixels["A", "B"], AGREEING)
    assert np.array_equal(merged.scores.pixels, PIXELS) and merged.scores.batch_size == 2


def test_times_are_those_of_the_slowest_rank_and_add_up_over_successive_runs():
    shards = [shard_of([0, 1], 3.0), shard_of([2], 2.0)]
    assert merge_shards(shards).scores.seconds == {"A": 3.0}
    together = merge_shards(shards, sum).scores
    assert together.seconds == {"A": 5.0} and together.scoring_seconds == 1.0
