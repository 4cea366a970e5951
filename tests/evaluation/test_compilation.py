"""When backends are compiled, and that neither preparing nor compiling them changes their predictions."""

from dataclasses import replace

import pytest
import torch

from ffnet.errors import UserError
from ffnet.evaluation import compilation
from ffnet.evaluation.compilation import PreparedBackends, prepare_backends
from ffnet.evaluation.loop import warm_up
from ffnet.evaluation.runtime import Runtime
from ffnet.model import FFNet
from tests.helpers.networks import TOY, random_batches, three_layer_network, toy_model

IMAGE = 1024 * 2048  # pixels


def test_short_runs_are_not_compiled_and_long_ones_are(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    backends = {"FP32": three_layer_network()}
    for count, wish, compiled in ((10, None, False), (500, None, True), (10, True, True), (500, False, False)):
        prepared = prepare_backends(backends, count * IMAGE, Runtime(), wish)
        assert prepared.compiled is compiled and (prepared.kernel is not None) is compiled
        assert prepared.reason.startswith("compiled: " if compiled else "not compiled: ")


def test_without_a_compiler_backends_are_not_compiled_and_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: "no compiler")
    assert "no compiler" in prepare_backends({}, 10**12, Runtime(), None).reason
    with pytest.raises(UserError, match="no compiler"):
        prepare_backends({}, 1, Runtime(), True)


def test_the_batch_size_does_not_change_a_bit_of_an_ffnets_logits():
    """oneDNN's sums depend on the batch size for images as small as these."""
    (backend,) = prepare_backends({"FP32": toy_model()}, 1, Runtime(), None).backends.values()
    images = torch.cat(random_batches(3))
    with torch.inference_mode():
        logits = backend(images)
        for size in (1, 4):
            assert torch.equal(torch.cat([backend(batch) for batch in images.split(size)]), logits)


def test_more_models_are_compiled_than_torch_keeps_versions_of_one_function(monkeypatch):
    """All FFNets share `forward`; torch's tracer alone takes seconds where its compiler takes minutes."""
    compile, graphs = torch.compile, []
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    monkeypatch.setattr(
        torch,
        "compile",
        lambda backend, **_: compile(backend, dynamic=False, backend=lambda g, _: graphs.append(g) or g),
    )
    for width in range(8, 18):
        network = FFNet(replace(TOY, channels=(width,) * 4)).eval()
        prepared = prepare_backends({"FP32": network}, 1, Runtime(), True)
        with torch.inference_mode():
            prepared.backends["FP32"](torch.zeros(1, 3, 64, 128))
    assert len(graphs) == 10


def test_backends_that_are_not_compiled_are_not_warmed_up_on_a_cpu():
    prepared = PreparedBackends({"FP32": None})
    warm_up(prepared, (64, 128), Runtime())
