"""Several processes under torchrun against one: the same matrices to the last count.

Each with one thread, for on images as small as these oneDNN's sums depend on the number of threads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ffnet_quanteval
from ffnet import build_model
from ffnet.errors import UserError
from ffnet.evaluate import Scores
from ffnet.ranks import join, merged
from tests.conftest import write_tree
from tests.test_main import MODEL, arguments
from tests.test_model import golden_state

SCRIPT = Path(ffnet_quanteval.__file__)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Five images and a checkpoint: shards of two or three processes differ in size."""
    root = tmp_path_factory.mktemp("ranks")
    write_tree(root, "val", 5)
    torch.save(golden_state(build_model(MODEL)), root / "weights.pth")
    return root


def torchrun(count, tree, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(SCRIPT)]
    return subprocess.run(
        [*command, *arguments(tree, tree / "weights.pth", *more)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("count", "limit"), ((2, 5), (3, 5), (3, 2)))
def test_ranks_count_what_one_process_counts(tree, tmp_path, count, limit):
    results = []
    for processes in (1, count):
        out = tmp_path / str(processes)
        options = ["--output-dir", str(out / "results"), "--execute", "--save-predictions", str(out / "saved")]
        run = torchrun(processes, tree, "--limit", str(limit), *options)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("mIoU %") == 1
        assert len(list(out.glob("saved/INT8/*.png"))) == limit
        results.append(json.loads((out / "results" / "result.json").read_text()))
    one, many = results
    for name, entry in one["passes"].items():
        assert many["passes"][name]["confusion_matrix"] == entry["confusion_matrix"]
    assert many["agreement"] == one["agreement"] and many["images"] == limit


@pytest.mark.slow
def test_a_failing_rank_ends_the_run_with_its_error(tree, tmp_path):
    write_tree(tmp_path, "val", 4)
    torch.save(golden_state(build_model(MODEL)), tmp_path / "weights.pth")
    write_tree(tmp_path, "train", 2)
    broken = sorted(tmp_path.glob("leftImg8bit/val/*/*.png"))[1]  # the second rank's
    broken.write_bytes(broken.read_bytes()[:3000])
    run = torchrun(2, tmp_path, "--calibration-split", "train")
    assert run.returncode != 0
    assert f"error: {broken}: truncated" in run.stderr
    assert "mIoU" not in run.stdout


@pytest.mark.parametrize(("world", "rank"), (("2", None), ("two", "0"), ("", "0")))
def test_a_launchers_environment_that_is_not_whole_is_an_error(monkeypatch, world, rank):
    monkeypatch.setenv("WORLD_SIZE", world)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    if rank is None:
        monkeypatch.delenv("RANK")
    with pytest.raises(UserError, match="WORLD_SIZE is set, but"):
        join(torch.device("cpu"))


def test_shards_are_woven_back_in_order():
    whole = np.arange(5 * 19 * 19).reshape(5, 19, 19)
    parts = [
        Scores({"FP32": whole[rank::3]}, {("FP32", "INT8"): np.arange(5)[rank::3]}, 8, {"FP32": 1.0 + rank})
        for rank in range(3)
    ]
    scores = merged(parts)
    assert np.array_equal(scores.confusions["FP32"], whole)
    assert np.array_equal(scores.agreements["FP32", "INT8"], np.arange(5)) and scores.seconds == {"FP32": 3.0}
