"""Several processes against one: the same confusion matrices to the last count, the same encodings to the last bit.

Each process has one thread, because oneDNN's sums depend on the number of threads for images as small as these.
"""

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import ffnet_quanteval
from ffnet.config import MODEL_FILE, PROGRESS_FOLDER
from ffnet.options import parse_args
from ffnet.quantization.recovery.search import Candidate
from ffnet.run import ranks as ranks_module
from ffnet.run.pipeline import evaluate_models
from ffnet.run.ranks import Ranks, open_ranks
from ffnet.run.storage import Storage
from ffnet.system.errors import UserError
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.networks import DEMO, TOY, demo_checkpoint
from tests.helpers.program import SCRIPT, arguments, run_on_ranks, start_fork
from tests.helpers.two_models import IMAGES, NAMES, counts, options_for, read

W4 = ("--default-param-bw", "4", "--adaround", "5", "--max-drop", "0.995", "--recovery-images", "1")


def run_program(count, options, folder):
    """Run the program in `count` processes, of which only the first prints the report."""

    def run(_):
        return ffnet_quanteval.main([*map(str, options), "--output-dir", str(folder)])

    logs = folder.with_name(f"{folder.name} logs")
    assert run_on_ranks(count, run, logs) == 0, (logs / "log-0").read_text()
    printed = ["Written to" in (logs / f"log-{rank}").read_text() for rank in range(count)]
    assert printed == [True, *[False] * (count - 1)]
    return folder


def evaluate_on_ranks(count, options, folder):
    """Evaluate in `count` processes; return the list of Results of each, and the saved networks of the models."""

    def evaluate(rank):
        Storage.mark_finished = lambda storage: None  # so that the networks stay
        config = parse_args([*map(str, options), "--output-dir", str(folder / "out")])
        with open_ranks("cpu") as ranks:
            (folder / f"results-{rank}").write_bytes(pickle.dumps(list(evaluate_models(config, ranks))))
        return 0

    assert run_on_ranks(count, evaluate, folder) == 0, (folder / "log-0").read_text()
    networks = [path.read_bytes() for path in sorted((folder / "out").rglob("network.safetensors"))]
    return [pickle.loads((folder / f"results-{rank}").read_bytes()) for rank in range(count)], networks


def values(results, *ignored):
    """Return everything in Results that can be compared, apart from some fields of result.json."""
    found = []
    for result in results:
        matrices = {name: each.tolist() for name, each in result.details.scores.confusion_matrices.items()}
        fields = {name: value for name, value in result.to_json().items() if name not in ("stage_seconds", *ignored)}
        found.append((matrices, result.details.image_names, fields))
    return found


def counted(results):
    """Return what does not depend on the number of processes or on the time that a run takes."""
    steps = [result.recovery and [(step.name, step.miou) for step in result.recovery.steps] for result in results]
    return values(results, "options", "command", "backends", "recovery", "processor_share"), steps


@pytest.mark.slow
def test_all_processes_return_the_same_results_which_are_those_of_one_process(data, tmp_path):
    """Six batches: two processes share four of them, three share three, and each process runs the remaining ones."""
    saved = tmp_path / "saved"
    more = "--batch-size", "1", "--save-predictions", saved, "--force"
    options = options_for(data, *more, names=(TOY.name,))
    (one,), networks = evaluate_on_ranks(1, options, tmp_path / "1")
    assert len(networks) == 1
    for count in (2, 3):
        for path in saved.rglob("*.png"):
            path.unlink()
        several, same_networks = evaluate_on_ranks(count, options, tmp_path / str(count))
        assert all(values(results) == values(several[0]) for results in several)
        assert counted(several[0]) == counted(one) and same_networks == networks
        assert len(list((saved / "simulated").glob("*.png"))) == IMAGES


@pytest.mark.slow
def test_what_the_main_process_recovered_is_what_all_processes_score(data, tmp_path, monkeypatch):
    """Ranges, rounded weights and bit widths, none of which another process would compute by itself.

    The drop is replaced by one that only more bits make smaller, so that a quantizer is raised.
    """
    monkeypatch.setattr(Candidate, "drop", property(lambda candidate: 1 - len(candidate.raised) / 100))
    options = options_for(data, *W4, "--limit", "3", names=(TOY.name,))
    ((one,), _), (several, _) = (evaluate_on_ranks(count, options, tmp_path / str(count)) for count in (1, 2))
    assert values(several[0]) == values(several[1])
    assert counted(several[0]) == counted(one) and one[0].recovery.raised


@pytest.mark.slow
def test_a_run_continues_with_other_numbers_of_processes(data, tmp_path):
    """From two processes to one and to three, with some records of each rank lost in between."""
    options, out = options_for(data), tmp_path / "out"
    whole = counts(run_program(1, options, tmp_path / "whole"))
    for processes, lost in ((2, 0), (1, 1), (3, 1)):
        for path in out.glob(f"*/{PROGRESS_FOLDER}/images-*.jsonl") if lost else ():
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lost]))
        run_program(processes, [*options, *(["--resume"] if lost else [])], out)
    names = {path.name for path in (out / TOY.name / PROGRESS_FOLDER).glob("*.jsonl")}
    assert names > {"images-1.jsonl"} and counts(out) == whole
    for name in NAMES:
        assert read(out / name)["images"] == IMAGES


@pytest.mark.slow
def test_onnx_files_are_scored_by_all_processes(data, small_export, tmp_path):
    file = small_export.folder / MODEL_FILE
    options = ["--onnx", file, "--dataset-path", data, "--num-workers", "0"]
    one, two = (run_program(count, options, tmp_path / str(count)) for count in (1, 2))
    assert counts(two, (file,)) == counts(one, (file,))


@pytest.mark.slow
def test_torchrun_starts_the_program_and_ends_it_with_the_error_of_a_rank(tmp_path):
    write_tree(tmp_path, "val", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    command += arguments(tmp_path, demo_checkpoint(DEMO), model=DEMO)

    def run():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    succeeded = run()
    assert succeeded.returncode == 0, succeeded.stderr
    assert succeeded.stdout.count("IoU % per class") == 1
    write_tree(tmp_path, "train", 2)
    damaged = sorted(tmp_path.glob("leftImg8bit/val/*/*.png"))[1]  # the second rank's
    damaged.write_bytes(damaged.read_bytes()[:3000])
    command += ["--calibration-split", "train"]
    failed = run()
    assert failed.returncode != 0 and "mIoU" not in failed.stdout
    assert f"error: {damaged}: this PNG file is truncated" in failed.stderr


def test_ranks_exchange_values_and_all_get_the_error_of_the_main_process(tmp_path):
    order = tmp_path / "order"

    def note(text):
        with order.open("a") as file:
            file.write(text)
        return text

    def fail():
        raise UserError(f"fails on rank {os.environ['RANK']}")

    def check(rank):
        with open_ranks("cpu") as ranks:
            assert (ranks.rank, ranks.world_size, ranks.is_main) == (rank, 2, rank == 0)
            assert ranks.once(os.getpid) == ranks.all_gather(os.getpid())[0]
            assert ranks.all_gather(rank) == [0, 1]
            assert ranks.share_of(np.array([5, 6, 7])).tolist() == ([5, 7], [6])[rank]
            assert ranks.main_first(note, str(rank)) == str(rank)
            with pytest.raises(UserError, match="fails on rank 0"):
                ranks.once(fail)
            ranks.once(order.exists)
        return 0

    assert run_on_ranks(2, check, tmp_path) == 0, [path.read_text() for path in tmp_path.glob("log-*")]
    assert order.read_text() == "01"


def start_rank(log, environment, meeting_seconds=1.5):
    """Start a fork that opens the ranks as the program does; return its process id."""
    defaults = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

    def run():
        os.environ.update(defaults | environment)
        ranks_module.NOTICE_SECONDS, ranks_module.MEETING_SECONDS = 0.3, meeting_seconds

        def open_and_close(_):
            logging.getLogger("ffnet").handlers = [logging.StreamHandler(sys.stderr)]
            with open_ranks("cpu") as ranks:
                ranks.all_gather(0)

        ffnet_quanteval.run = open_and_close
        return ffnet_quanteval.main(["--demo"])

    return start_fork(run, log)


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def port():
    """A port that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(("rank", "number"), (("0", signal.SIGTERM), ("1", signal.SIGINT)))
def test_a_lonely_rank_says_for_whom_it_waits_and_ends_on_signals_at_once(tmp_path, port, rank, number):
    log = tmp_path / "log"
    log.touch()
    child = start_rank(log, {"RANK": rank, "MASTER_PORT": port}, meeting_seconds=60)
    waiting = f"127.0.0.1:{port}: rank {rank} of 2 is waiting for rank {1 - int(rank)}.\n"
    deadline = time.monotonic() + 30
    while log.read_text() != waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child, number)
    begin = time.monotonic()
    assert status_of(child) == 128 + number and time.monotonic() - begin < 5
    assert log.read_text() == waiting


@pytest.mark.parametrize(
    ("environments", "message"),
    (
        ([{}], "rank 0 of 2 is waiting for rank 1, and gives up after 2 s. Start 2 processes"),
        ([{"RANK": "1"}], "rank 1 of 2 is waiting for rank 0, and gives up"),
        ([{"RANK": rank, "WORLD_SIZE": "4"} for rank in "110"], "(another process is rank 1, too)"),
        ([{}, {"RANK": "1", "WORLD_SIZE": "3"}], "rank 0 of 2 is waiting for rank 1, and gives up"),
        ([{"MASTER_PORT": "99999"}], "WORLD_SIZE: the variables that torchrun sets"),
        ([{"MASTER_ADDR": ""}], "WORLD_SIZE: the variables that torchrun sets"),
        ([{"WORLD_SIZE": "two"}], "WORLD_SIZE: the variables that torchrun sets"),
        ([{"RANK": "2"}], "WORLD_SIZE: the variables that torchrun sets"),
        ([{"MASTER_ADDR": "no.such.host.invalid"}], "ranks can't meet at this MASTER_ADDR and MASTER_PORT ([Errno"),
        ([{"MASTER_PORT": "used"}], "ranks can't meet at this MASTER_ADDR and MASTER_PORT ("),
    ),
)
def test_ranks_that_cannot_meet_are_an_error_of_one_line(tmp_path, port, environments, message):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        logs = [tmp_path / str(number) for number in range(len(environments))]
        given = [{"MASTER_PORT": port} | each for each in environments]
        if given[0]["MASTER_PORT"] == "used":
            given[0]["MASTER_PORT"] = str(taken.getsockname()[1])
        children = [start_rank(*each) for each in zip(logs, given, strict=True)]
        assert {status_of(child) for child in children} == {2}
    text = "".join(log.read_text() for log in logs)
    assert message in text and "Traceback" not in text


def test_a_rank_whose_other_rank_ended_says_so(tmp_path):
    def check(rank):
        with open_ranks("cpu") as ranks:
            ranks.all_gather(rank)
            if rank == 1:
                os._exit(0)
            for exchange in (ranks.all_gather, lambda value: ranks.once(int, value)):
                with pytest.raises(UserError, match="WORLD_SIZE: another rank of the run has ended .* all ranks again"):
                    exchange(0)
        return 0

    assert run_on_ranks(2, check, tmp_path) == 0, (tmp_path / "log-0").read_text()


def test_a_single_process_is_the_main_process_and_takes_all_images(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_ranks("cpu") as ranks:
        assert ranks == Ranks(0, 1, "cpu") and ranks.is_main
        assert ranks.share_of(np.arange(3)).tolist() == [0, 1, 2] and ranks.all_gather("x") == ["x"]
        assert ranks.main_first(lambda value: value, 1) == 1


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    environment = {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "7", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1 GPU"), open_ranks("cuda"):
        pass
