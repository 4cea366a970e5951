"""The benchmark of the emulated NPU, on a small network."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import npu, npu_measurements


@pytest.mark.slow
@pytest.mark.npu
def test_costs_of_a_network_are_measured_in_one_and_in_two_processes(toy_variant):
    costs = npu_measurements.measure_network(toy_variant.name, (64, 128), 2, 1)
    assert costs.throughput[1] == 1 and set(costs.throughput) == {1, 2}
    assert min(costs.compilation_seconds, costs.image_seconds, costs.processor_seconds, costs.throughput[2]) > 0
    assert 0.1 < costs.peak_gb < 0.4  # torch and AIMET alone would take more
    table = npu.format_outcome({"machine": "a processor", "networks": [costs]}).splitlines()
    assert table[0] == "a processor" and table[-1].startswith(f"| {toy_variant.name} | 64x128 | ")
    assert table[-1].count("|") == table[2].count("|")


@pytest.mark.parametrize("module", ["accuracy", "accuracy_recovery", "measured_program", "npu", "worker_usage"])
def test_the_processes_of_the_npu_import_a_benchmark_without_torch(module):
    program = f"import sys, benchmarks.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(npu.__file__).parents[1])
