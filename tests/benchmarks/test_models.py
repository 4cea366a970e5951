"""The tables of `benchmarks.models`, from measurements made by hand, and the processes and networks behind them."""

import subprocess
import sys

import pytest

from benchmarks import models
from benchmarks.measured_program import SMALL_VARIANTS
from benchmarks.models_measurements import Memory, Round, Seconds, Sharing
from benchmarks.program import watch_npu_processes
from benchmarks.worker_usage import memory_bytes, peak_bytes
from ffnet.checkpoints.matching import shapes_of
from ffnet.variants import VARIANTS

ROUNDS = (
    Round(Seconds(10, 4, 9), Seconds(6, 3, 9)),  # two runs, then one
    Round(Seconds(20, 8, 9), Seconds(16, 7, 8)),
    Round(Seconds(10, 5, 9), Seconds(9, 5, 9)),
)
PAIR = Sharing(("segmentation_ffnet_a", "segmentation_ffnet_b"), 6, ROUNDS, (0.4, 0.4, 0.6))
MEMORY = [Memory(50, 10**9, 2 * 10**9), Memory(500, 1_030_000_000, 19 * 10**8)]
SPAWN = (
    "import multiprocessing, time\n"
    "process = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(2,))\n"
    "process.start(); process.join()"
)


def test_ratios_are_medians_over_the_rounds_and_not_ratios_of_medians():
    assert models.one_over_two(ROUNDS, "run") == pytest.approx(0.8)  # of 0.6, 0.8 and 0.9
    assert models.one_over_two(ROUNDS, "evaluation") == pytest.approx(0.875)  # of 0.75, 0.875 and 1
    assert models.decoding_share(PAIR) == pytest.approx(0.1)  # of 0.1, 0.05 and 0.12


def test_the_outcome_is_two_tables_with_sentences_below_each():
    lines = models.format_outcome({"machine": "a processor", "sharing": [PAIR], "memory": MEMORY}).splitlines()
    assert lines == [
        "a processor",
        "",
        "| models | two runs, s | one run, s | one over two |",
        "| --- | --- | --- | --- |",
        "| ffnet_a and ffnet_b, whole run | 10.0 | 9.0 | 0.800 |",
        "| ffnet_a and ffnet_b, evaluation | 5.0 | 5.0 | 0.875 |",
        "| ffnet_a and ffnet_b, processor time of the whole run | 9.0 | 9.0 | 1.000 |",
        "",
        "ffnet_a and ffnet_b: decoding the 6 images once takes 0.40 s alone, 10.0 % of the evaluation in two runs.",
        "",
        "| images | main process, GB | processes of the NPU, GB |",
        "| --- | --- | --- |",
        "| 50 | 1.000 | 2.000 |",
        "| 500 | 1.030 | 1.900 |",
        "| growth | +3.0 % | -5.0 % |",
        "",
        "5 small networks in one run, FP32, simulated, on ONNX Runtime and on the emulated NPU: the target, a growth "
        "of at most 5 %, is met.",
    ]


def test_without_the_npu_its_column_is_missing_and_a_sentence_says_why():
    memory = [Memory(50, 10**9, None), Memory(500, 1_060_000_000, None)]
    assert models.memory_rows(memory) == [
        ["images", "main process, GB"], ["50", "1.000"], ["500", "1.060"], ["growth", "+6.0 %"],
    ]  # fmt: skip
    sentences = models.describe_growth(memory)
    assert "is missed." in sentences and sentences.endswith("because onnxruntime-qnn is not installed.")


def test_the_small_networks_are_told_apart_by_their_shapes_and_are_not_among_the_published_ones():
    assert len({frozenset(shapes_of(variant, folded=False).items()) for variant in SMALL_VARIANTS.values()}) == 5
    assert not VARIANTS.keys() & SMALL_VARIANTS.keys()


def test_memory_is_read_from_the_status_of_a_process():
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert (memory_bytes(status, "VmHWM"), memory_bytes(status, "VmRSS")) == (2 * 2**20, 2**20)
    assert memory_bytes("Name:\tpython\nState:\tZ (zombie)\n", "VmRSS") == 0
    assert peak_bytes() > 10**7


def test_only_processes_that_multiprocessing_has_spawned_are_watched():
    with subprocess.Popen([sys.executable, "-c", SPAWN]) as process:
        assert 5 * 10**6 < watch_npu_processes(process) < 10**8
    other = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(1)'!r}])"
    with subprocess.Popen([sys.executable, "-c", other]) as process:
        assert watch_npu_processes(process) == 0
