"""When backends are compiled, and that neither preparing nor compiling them changes their predictions."""

from dataclasses import replace

import pytest
import torch

from ffnet.config import Runtime
from ffnet.evaluation import compilation
from ffnet.evaluation.compilation import PreparedBackends, compile_backends, prepare_backends
from ffnet.evaluation.loop import warm_up
from ffnet.model import FFNet
from ffnet.system.errors import UserError
from tests.helpers.networks import TOY, random_batches, three_layer_network, toy_model


def test_short_runs_are_not_compiled_and_long_ones_are(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    backends = {"FP32": three_layer_network()}
    for count, wish, compiled in ((10, None, False), (500, None, True), (10, True, True), (500, False, False)):
        prepared = prepare_backends(backends, Runtime(), wish, count, (1024, 2048))
        assert bool(prepared.compiled) is compiled and (prepared.kernel is not None) is compiled
        assert prepared.reason.startswith("compiled: " if compiled else "not compiled: ")


def test_without_a_compiler_backends_are_not_compiled_and_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: "no compiler")
    assert "no compiler" in prepare_backends({}, Runtime(), None, 10**6, (1024, 2048)).reason
    with pytest.raises(UserError, match="no compiler"):
        prepare_backends({}, Runtime(), True)


def test_the_batch_size_does_not_change_a_bit_of_an_ffnets_logits():
    """oneDNN's sums depend on the batch size for images as small as these."""
    (backend,) = prepare_backends({"FP32": toy_model()}, Runtime()).backends.values()
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
        prepared = prepare_backends({"FP32": network}, Runtime(), True)
        with torch.inference_mode():
            prepared.backends["FP32"](torch.zeros(1, 3, 64, 128))
    assert len(graphs) == 10


def test_backends_that_are_not_compiled_are_not_warmed_up_on_a_cpu():
    prepared = PreparedBackends({"FP32": None})
    warm_up(prepared, (64, 128), Runtime())


GPU = Runtime(torch.device("cuda"), batch_size=2)


@pytest.fixture
def pretended_times(monkeypatch):
    """Eager networks take 10 ms an image; compiled ones what a test says, by name. Nothing runs on a GPU."""
    times = {}
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    monkeypatch.setattr(compilation, "_eager", lambda backend, runtime: "eager")
    monkeypatch.setattr(compilation, "_compiled", lambda backend, runtime: backend.name)
    monkeypatch.setattr(compilation._Trial, "seconds_per_image", lambda trial, backend: times.get(backend, 0.01))
    return times


def named_networks(*names):
    networks = {name: torch.nn.Identity() for name in names}
    for name, network in networks.items():
        network.name = name
    return networks


def test_on_a_gpu_each_network_is_compiled_if_that_is_faster(pretended_times):
    pretended_times |= {"FP32": 0.012, "INT8 simulated": 0.004}
    networks = named_networks("FP32", "INT8 simulated") | {"INT8 ONNX Runtime": lambda images: images}
    prepared = prepare_backends(networks, GPU, True, 500, (1024, 2048))
    assert prepared.compiled == ("INT8 simulated",) and prepared.kernel is None
    assert list(prepared.backends.values()) == ["eager", "INT8 simulated", "eager"]
    assert prepared.reason == (
        "FP32 not compiled, 12.00 ms per image compiled and 10.00 ms otherwise; "
        "INT8 simulated compiled, 4.00 ms per image compiled and 10.00 ms otherwise"
    )


def test_a_compiled_network_that_is_hardly_faster_is_not_used(pretended_times):
    pretended_times |= {"FP32": 0.0099}
    assert prepare_backends(named_networks("FP32"), GPU, True, 500, (1024, 2048)).compiled == ()


@pytest.mark.parametrize(("images", "compiled"), ((1000, False), (3500, True)))
def test_on_a_gpu_a_run_is_short_if_its_networks_take_less_time_than_compiling(pretended_times, images, compiled):
    """Two networks of 10 ms an image: 20 and 70 s."""
    pretended_times |= {"FP32": 0.004, "INT8 simulated": 0.004}
    prepared = prepare_backends(named_networks("FP32", "INT8 simulated"), GPU, None, images, (64, 128))
    assert bool(prepared.compiled) is compiled
    assert (
        compiled
        or prepared.reason == "not compiled: the networks take about 20 s for all images, less than compilation takes"
    )


def test_what_a_resumed_run_compiled_is_compiled_without_a_trial(pretended_times):
    pretended_times |= {"FP32": 1.0, "INT8 simulated": 0.004}
    networks = named_networks("FP32", "INT8 simulated")
    assert compile_backends(networks, GPU, ("FP32",)).compiled == ("FP32",)
    assert compile_backends(networks, GPU, ()).compiled == ()
    assert compile_backends(networks, Runtime(), ("FP32", "INT8 simulated")).compiled == ("FP32", "INT8 simulated")


def test_a_resumed_run_that_was_compiled_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_problem", lambda device: "there is none")
    with pytest.raises(UserError, match="the run that is resumed has compiled the networks, but there is none"):
        compile_backends(named_networks("FP32"), Runtime(), ("FP32",))
    assert compile_backends(named_networks("FP32"), Runtime(), ()).compiled == ()


def test_without_memory_for_the_eager_network_nothing_is_compiled(monkeypatch):
    def fail(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    monkeypatch.setattr(compilation, "_compiled", lambda backend, runtime: pytest.fail)
    monkeypatch.setattr(torch, "randint", fail)
    prepared = prepare_backends(named_networks("FP32"), Runtime(torch.device("meta")), True, 1, (64, 128))
    assert prepared.reason == "FP32 not compiled, because the memory does not suffice for a trial"


@pytest.mark.parametrize(
    ("error", "reason"),
    (
        (RuntimeError("backend='inductor' raised:\nNo valid triton configs."), "torch.compile fails on it (backend="),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "the memory does not suffice for a trial"),
    ),
)
def test_a_network_that_fails_when_it_is_compiled_on_a_gpu_runs_eagerly(monkeypatch, error, reason):
    def fail(images):
        raise error

    monkeypatch.setattr(compilation, "compiler_problem", lambda device: None)
    monkeypatch.setattr(compilation, "_compiled", lambda backend, runtime: fail)
    runtime = Runtime(torch.device("meta"), batch_size=2)
    prepared = prepare_backends({"FP32": torch.nn.Conv2d(3, 4, 3)}, runtime, True, 1, (64, 128))
    assert prepared.compiled == () and prepared.backends["FP32"] is not fail
    assert prepared.reason.startswith(f"FP32 not compiled, because {reason}")
