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
from ffnet import build_model, export, quantize
from ffnet.errors import UserError
from ffnet.evaluate import Scores
from ffnet.ranks import join, merged
from tests.conftest import write_tree
from tests.test_main import MODEL, arguments
from tests.test_model import golden_state
from tests.test_quantize import inputs, network

SCRIPT = Path(ffnet_quanteval.__file__)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Five images and a checkpoint: shards of two or three processes differ in size."""
    root = tmp_path_factory.mktemp("ranks")
    write_tree(root, "val", 5)
    torch.save(golden_state(build_model(MODEL)), root / "weights.pth")
    return root


def launched(count, given):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(SCRIPT)]
    return subprocess.run(
        [*command, *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def scored_by(count, tree, out, *more):
    """result.json of a run by so many processes, in the folder `out`."""
    run = launched(count, arguments(tree, tree / "weights.pth", "--output-dir", str(out), *more))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("mIoU %") == 1
    return json.loads((out / "result.json").read_text())


def assert_same_matrices(one, many):
    for name, entry in one["passes"].items():
        assert many["passes"][name]["confusion_matrix"] == entry["confusion_matrix"]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "limit"), ((2, 5), (3, 5), (3, 2)))
def test_ranks_count_what_one_process_counts(tree, tmp_path, count, limit):
    results = []
    for processes in (1, count):
        saved = tmp_path / f"saved by {processes}"
        options = ["--limit", str(limit), "--execute", "--save-predictions", str(saved)]
        results.append(scored_by(processes, tree, tmp_path / str(processes), *options))
        assert len(list(saved.glob("INT8/*.png"))) == limit
    one, many = results
    assert_same_matrices(one, many)
    assert many["agreement"] == one["agreement"] and many["images"] == limit


@pytest.mark.slow
def test_encodings_that_untie_quantizers_reach_every_rank(tree, tmp_path):
    sim = quantize.quantize(network(MODEL), quantize.Recipe(), inputs())
    sim.save_encodings_to_json(str(tmp_path), "encodings")
    path = tmp_path / "encodings.json"
    content = json.loads(path.read_text())
    for bits, layer in enumerate(("module_interpolate_3", "module_interpolate_4", "module_cat"), start=5):
        step = 2.0**-bits
        content["activation_encodings"][layer]["output"]["0"] |= {"scale": step, "min": 0.0, "max": 255 * step}
        content["activation_encodings"][layer]["output"]["0"]["offset"] = 0
    path.write_text(json.dumps(content))
    one, many = (scored_by(count, tree, tmp_path / str(count), "--encodings", str(path)) for count in (1, 2))
    assert "set apart" in one["calibration"]
    assert_same_matrices(one, many)


@pytest.mark.slow
def test_onnx_files_are_scored_by_all_ranks(tree, tmp_path):
    export.write_fp32(network(MODEL), (64, 128), tmp_path / "x.onnx")
    given = ["--onnx", str(tmp_path / "x.onnx"), "--dataset-path", str(tree), "--num-workers", "0"]
    results = []
    for count in (1, 2):
        run = launched(count, [*given, "--output-dir", str(tmp_path / str(count))])
        assert run.returncode == 0, run.stderr
        results.append(json.loads((tmp_path / str(count) / "result.json").read_text()))
    assert_same_matrices(*results)


@pytest.mark.slow
def test_a_failing_rank_ends_the_run_with_its_error(tree, tmp_path):
    write_tree(tmp_path, "val", 4)
    torch.save(golden_state(build_model(MODEL)), tmp_path / "weights.pth")
    write_tree(tmp_path, "train", 2)
    broken = sorted(tmp_path.glob("leftImg8bit/val/*/*.png"))[1]  # the second rank's
    broken.write_bytes(broken.read_bytes()[:3000])
    run = launched(2, arguments(tmp_path, tmp_path / "weights.pth", "--calibration-split", "train"))
    assert run.returncode != 0
    assert f"error: {broken}: truncated" in run.stderr
    assert "mIoU" not in run.stdout


@pytest.mark.parametrize(("world", "rank"), (("2", None), ("two", "0"), ("", "0"), ("2", "2")))
def test_a_launchers_environment_that_is_not_whole_is_an_error(monkeypatch, world, rank):
    monkeypatch.setenv("WORLD_SIZE", world)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    if rank:
        monkeypatch.setenv("RANK", rank)
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
