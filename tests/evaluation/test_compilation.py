"""When backends are compiled, and that neither preparing nor compiling them changes their predictions."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ffnet.config import Runtime
from ffnet.evaluation.compilation import choose_compilation, prepare_backends
from ffnet.evaluation.loop import evaluate, warm_up
from ffnet.model import ConvBNReLU
from ffnet.quantization.lowering import lower
from tests.helpers.networks import random_batches, three_layer_network, toy_model
from tests.helpers.simulations import simulate

SIZE = (1024, 2048)
WITHOUT_COMPILER = f"""
from ffnet.config import Runtime
from ffnet.evaluation.compilation import choose_compilation
print(*choose_compilation(Runtime(), 500, {SIZE}))
choose_compilation(Runtime(compile=True), 1, {SIZE})
"""


@pytest.mark.parametrize(
    ("runtime", "images", "compiled"),
    (
        (Runtime(), 10, False),
        (Runtime(compile=False), 500, False),
        (Runtime("cuda:0"), 500, False),
        pytest.param(Runtime(), 500, True, marks=pytest.mark.slow),
        pytest.param(Runtime(compile=True), 1, True, marks=pytest.mark.slow),
    ),
)
def test_networks_are_compiled_on_request_and_in_long_runs_on_a_cpu(runtime, images, compiled):
    chosen, reason = choose_compilation(runtime, images, SIZE)
    assert chosen is compiled and reason.startswith("compiled: " if compiled else "not compiled: ")


@pytest.mark.slow
def test_without_a_compiler_networks_are_compiled_on_request_only_which_is_an_error(tmp_path):
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True)
    assert ran.stdout.startswith("False not compiled: torch.compile does not work here (")
    error = ran.stderr.splitlines()[-1]
    assert error.startswith("ffnet.system.errors.UserError: --compile: torch.compile does not work here (")


def test_the_batch_size_does_not_change_a_bit_of_an_ffnets_logits():
    """oneDNN's sums depend on the batch size for images as small as these."""
    (backend,) = prepare_backends({"FP32": toy_model()}, Runtime()).backends.values()
    images = torch.cat(random_batches(3))
    with torch.inference_mode():
        logits = backend(images)
        for size in (1, 4):
            assert torch.equal(torch.cat([backend(batch) for batch in images.split(size)]), logits)


@pytest.mark.slow
def test_compiled_backends_and_the_compiled_kernel_agree_with_eager_ones(cityscapes):
    runtime, network = Runtime(batch_size=3, quiet=True), three_layer_network()
    eager = {"FP32": network, "INT8": lower(simulate(network, quant_scheme="tf"))}
    prepared = prepare_backends(eager, runtime, compiled=True)
    warm_up(prepared, cityscapes, runtime)
    compiled = {f"{name} compiled": backend for name, backend in prepared.backends.items()}
    scores = evaluate(replace(prepared, backends=eager | compiled), cityscapes, runtime)
    expected = evaluate(eager, cityscapes, runtime)  # upsampled by torch
    for name in eager:
        assert np.array_equal(scores.confusion_matrices[name], expected.confusion_matrices[name])
        assert scores.agreement(name, f"{name} compiled") >= 99.9


def test_more_models_are_compiled_than_torch_keeps_versions_of_one_function(monkeypatch):
    """All FFNets share the code of `forward`, of which torch compiles 8 versions by default."""
    compile, graphs = torch.compile, []

    def trace(backend, dynamic):
        return compile(backend, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph)

    monkeypatch.setattr(torch, "compile", trace)
    for width in range(9):
        networks = {"FP32": ConvBNReLU(3, 8 + width, 3).eval()}
        prepared = prepare_backends(networks, Runtime("cuda:0"), compiled=True)  # without the kernel, as on a GPU
        prepared.backends["FP32"](torch.zeros(1, 3, 8, 8))
    assert len(graphs) == 9
