"""Several processes under torchrun against one process: the same confusion matrices to the last count.

Each process has one thread, because oneDNN's sums depend on the number of threads for images as small as these.
"""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from ffnet.config import PROGRESS_FOLDER, Config, OutputConfig, QuantizationConfig
from ffnet.evaluation.scores import INT8_SIMULATED, short_name
from ffnet.onnx.export import export_float
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize
from ffnet.run import ranks as distributed
from ffnet.run.scoring import node_notes
from ffnet.run.session import Run
from ffnet.system.errors import UserError
from tests.helpers.cityscapes_tree import SIZE, write_tree
from tests.helpers.networks import DEMO, PRE_DOWN, golden_model, random_batches, three_layer_network
from tests.helpers.program import SCRIPT, arguments
from tests.helpers.simulations import encodings, logits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Five images, so that shards of two or three processes differ in size, and a checkpoint."""
    root = tmp_path_factory.mktemp("distributed")
    write_tree(root, "val", 5)
    torch.save(golden_model(DEMO).state_dict(), root / "weights.pth")
    return root


def run_with_processes(count, options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(SCRIPT)]
    return subprocess.run(
        [*command, *map(str, options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def result_of(count, options, folder):
    """Return result.json of a run with so many processes, of which only one may print the report."""
    run = run_with_processes(count, [*options, "--output-dir", folder])
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("IoU % per class") == 1
    return json.loads((folder / "result.json").read_text())


def assert_same_matrices(one, several):
    for name, entry in one["backends"].items():
        assert several["backends"][name]["confusion_matrix"] == entry["confusion_matrix"]


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "option"), ((5, "--execute"), (2, "--no-execute")))
def test_three_processes_count_what_one_process_counts(tree, tmp_path, limit, option):
    results = []
    for processes in (1, 3):
        saved = tmp_path / f"saved by {processes}"
        more = ["--limit", limit, option, "--save-predictions", saved]
        options = arguments(tree, tree / "weights.pth", *more, model=DEMO)
        results.append(result_of(processes, options, tmp_path / str(processes)))
        assert len(list((saved / short_name(INT8_SIMULATED)).glob("*.png"))) == limit
    one, several = results
    assert_same_matrices(one, several)
    assert several["agreement"] == one["agreement"] and several["images"] == limit


@pytest.mark.slow
def test_what_the_main_process_recovered_is_what_all_processes_score(tree, tmp_path):
    """Ranges, rounded weights and bit widths: none of them is what another process would compute by itself."""
    more = ["--default-param-bw", "4", "--adaround", "5", "--max-drop", "0", "--no-execute"]
    options = arguments(tree, tree / "weights.pth", *more, model=DEMO)
    one, several = (result_of(processes, options, tmp_path / str(processes)) for processes in (1, 2))
    assert_same_matrices(one, several)
    assert several["recovery"]["chosen"] == one["recovery"]["chosen"]


@pytest.mark.slow
def test_encodings_that_separate_shared_quantizers_reach_every_process(tree, tmp_path):
    sim = build_quantsim(equalize(golden_model(DEMO)), QuantizationConfig())
    calibrate(sim, random_batches())
    sim.save_encodings_to_json(str(tmp_path), "encodings")
    path = tmp_path / "encodings.json"
    content = json.loads(path.read_text())
    for bits, layer in enumerate(("module_interpolate_3", "module_interpolate_4", "module_cat"), start=5):
        step = 2.0**-bits
        content["activation_encodings"][layer]["output"]["0"] |= {"scale": step, "min": 0.0, "max": 255 * step}
        content["activation_encodings"][layer]["output"]["0"]["offset"] = 0
    path.write_text(json.dumps(content))
    options = arguments(tree, tree / "weights.pth", "--encodings", path, model=DEMO)
    one, two = (result_of(count, options, tmp_path / str(count)) for count in (1, 2))
    assert "separate encodings" in one["calibration"]["description"]
    assert_same_matrices(one, two)


@pytest.mark.slow
def test_onnx_files_are_scored_by_all_processes(tree, tmp_path):
    export_float(golden_model(DEMO), SIZE, tmp_path / "x.onnx")
    options = ["--onnx", tmp_path / "x.onnx", "--dataset-path", tree, "--num-workers", "0"]
    assert_same_matrices(*(result_of(count, options, tmp_path / str(count)) for count in (1, 2)))


@pytest.mark.slow
def test_processes_calibrate_together_to_the_encodings_of_one_process(tree, tmp_path):
    """Five batches: two processes share all but the first, three share three and run the last one each."""
    for processes in (1, 2, 3):
        more = ["--batch-size", "1", "--no-execute", "--export", tmp_path / str(processes)]
        run = run_with_processes(processes, arguments(tree, tree / "weights.pth", *more, model=DEMO))
        assert run.returncode == 0, run.stderr
    one, *several = ((tmp_path / str(processes) / "model.encodings").read_bytes() for processes in (1, 2, 3))
    assert several == [one, one]


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(tree, tmp_path):
    """Of two models; from two processes to one and to three, with some records of each rank lost in between."""
    (tmp_path / "weights").mkdir()
    for name in (DEMO, PRE_DOWN):
        torch.save(golden_model(name).state_dict(), tmp_path / "weights" / f"{name}.pth")
    options = arguments(tree, tmp_path / "weights", "--no-execute", model=DEMO)
    options.insert(options.index(DEMO), PRE_DOWN)
    whole, out = tmp_path / "whole", tmp_path / "out"
    for folder, processes, lost in ((whole, 1, 0), (out, 2, 0), (out, 1, 1), (out, 3, 1)):
        for path in folder.glob(f"*/{PROGRESS_FOLDER}/images-*.jsonl") if lost else ():
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lost]))
        for path in folder.glob(f"*/{PROGRESS_FOLDER}/finished") if lost else ():
            path.unlink()
        run = run_with_processes(processes, [*options, "--output-dir", folder, *(["--resume"] if lost else [])])
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("Comparison of 2 models") == 1
    assert {path.name for path in (out / DEMO / PROGRESS_FOLDER).glob("*.jsonl")} > {"images-1.jsonl", "images-2.jsonl"}
    for name in (DEMO, PRE_DOWN):
        one, several = (json.loads((folder / name / "result.json").read_text()) for folder in (whole, out))
        assert_same_matrices(one, several)
        assert several["agreement"] == one["agreement"] and several["images"] == one["images"] == 5


@pytest.mark.slow
def test_a_failing_rank_ends_the_run_with_its_error(tree, tmp_path):
    write_tree(tmp_path, "val", 4)
    write_tree(tmp_path, "train", 2)
    damaged = sorted(tmp_path.glob("leftImg8bit/val/*/*.png"))[1]  # the second rank's
    damaged.write_bytes(damaged.read_bytes()[:3000])
    options = arguments(tmp_path, tree / "weights.pth", "--calibration-split", "train", model=DEMO)
    run = run_with_processes(2, options)
    assert run.returncode != 0
    assert f"error: {damaged}: this PNG file is truncated" in run.stderr
    assert "mIoU" not in run.stdout


@pytest.mark.parametrize(("world_size", "rank"), (("2", None), ("two", "0"), ("", "0"), ("2", "2")))
def test_an_incomplete_launcher_environment_is_an_error(monkeypatch, world_size, rank):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(UserError, match="WORLD_SIZE: the variables that torchrun sets"), distributed.session(CPU):
        pass


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "8",
        "RANK": "7",
        "LOCAL_RANK": "7",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="only 1 GPU found"), distributed.session(torch.device("cuda")):
        pass


@pytest.mark.parametrize(("here", "saved", "notes"), ((8, True, 1), (16, True, 0), (8, False, 0)))
def test_a_note_says_where_several_nodes_leave_predictions(monkeypatch, tmp_path, here, saved, notes):
    """Without processes: rank 3 of 16, of which so many are on its node."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, ("16", "3", "3", "x", "1", str(here)), strict=True):
        monkeypatch.setenv(name, value)
    functions = {"init_process_group": None, "destroy_process_group": None, "get_rank": 3, "get_world_size": 16}
    for name, value in functions.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value, **__: value)
    config = Config(output=OutputConfig(save_predictions=tmp_path if saved else None))
    with distributed.session(CPU) as ranks:
        found = node_notes(Run(config, ranks))
    assert len(found) == notes and all(f"to its own {tmp_path}" in note for note in found)


def test_a_single_process_is_the_main_process_and_takes_all_images(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    indices, scores, calls = np.arange(3), object(), []
    with distributed.session(CPU) as ranks:
        assert ranks.is_main and ranks.device == CPU
        assert ranks.share_of(indices).tolist() == [0, 1, 2] and ranks.gather(scores) == [scores]
        assert ranks.share(scores) is scores
        ranks.main_process_first(calls.append, 1)
    assert calls == [1]


def test_every_rank_gets_the_encodings_and_weights_of_the_main_process(monkeypatch):
    """Without processes: what the main process broadcasts is pickled and reaches the other rank."""
    prepared, sent = equalize(three_layer_network()), []
    main, other = (build_quantsim(prepared, QuantizationConfig(param_bw=bits)) for bits in (4, 8))
    calibrate(main, random_batches())
    with torch.no_grad():
        main.model.get_submodule("2").weight.mul_(0.5)

    def broadcast(objects, src):
        if sent:
            objects[:] = pickle.loads(sent[0])
        sent.append(pickle.dumps(objects))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank, sim in enumerate((main, other)):
        distributed.Ranks(rank, 2, CPU).share_state(sim)
    x = random_batches()[0]
    assert len(sent) == 2 and torch.equal(logits(other.model, x), logits(main.model, x))
    assert encodings(other) == encodings(main)
