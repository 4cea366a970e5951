"""Scores of shards against the scores that the shards were cut from."""

import numpy as np

from ffnet.evaluation.scores import Scores, merge_shards


def test_shards_are_merged_in_the_order_of_the_images():
    matrices, agreeing = np.arange(5 * 19 * 19).reshape(5, 19, 19), np.arange(5)
    shards = [
        Scores({"A": matrices[rank::3]}, {("A", "B"): agreeing[rank::3]}, 8, {"A": 1.0 + rank}, batch_size=4 - rank)
        for rank in range(3)
    ]
    scores = merge_shards(shards)
    assert np.array_equal(scores.confusion_matrices["A"], matrices) and scores.images == 5
    assert np.array_equal(scores.agreeing_pixels["A", "B"], agreeing)
    assert scores.seconds == {"A": 3.0} and scores.batch_size == 2
