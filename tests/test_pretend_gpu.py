"""The program on a pretended GPU: the same counts as on a CPU, and an error if a tensor is on the wrong device."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from skimage.io import imsave
from torch.nn.functional import interpolate

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Runtime
from ffnet.evaluation.compilation import prepare_backends
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import warm_up
from ffnet.evaluation.postprocessing import predict
from ffnet.evaluation.scores import FP32
from ffnet.labels import CITYSCAPES
from tests.helpers.names import INT8_ONNX_RUNTIME, INT8_SIMULATED
from tests.helpers.networks import TOY, toy_model
from tests.helpers.pretend_gpu.device import pretend_gpu
from tests.helpers.pretend_gpu.guard import build_guard, missing_requirement
from tests.helpers.pretend_gpu.kernels import Memory
from tests.helpers.pretend_gpu.mistakes import MISTAKES
from tests.helpers.pretend_gpu.program import failure_of, run_program, run_rank
from tests.helpers.program import arguments
from tests.helpers.two_models import counts, options_for, read, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_requirement()), reason=str(missing_requirement())),
]
TOO_SMALL = 2_200_000  # bytes: a layer's output for 4 images, or the upsampled logits of 3


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    return build_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder for two models; the toy network's predictions are the labels, so that its mIoU can drop."""
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    images, model = CityscapesSplit(root, "val"), toy_model()
    for path, (image, labels) in zip(images.targets, images, strict=True):
        with torch.no_grad():
            ids = predict(model(normalize(image[None])), labels.shape)[0]
        imsave(path, CITYSCAPES.label_ids[ids.numpy()].astype(np.uint8), check_contrast=False)
    return root


@pytest.fixture(scope="module")
def processes():
    """Runs each call in a process of its own, forked from one that has imported the program."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.pretend_gpu.program"])
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as executor:
        yield executor


@pytest.fixture
def run_both(processes, guard, tmp_path):
    """Runs the program on the CPU and on a pretended GPU; returns their output folders."""

    def run(make_options, *only_gpu):
        folders = tmp_path / "cpu", tmp_path / "gpu"
        calls = [
            processes.submit(run_program, [*make_options(folder), "--output-dir", folder / "out", *more], *where)
            for folder, more, where in zip(folders, ((), only_gpu), ((), (guard,)), strict=True)
        ]
        assert [call.result() for call in calls] == [0, 0]
        return [folder / "out" for folder in folders]

    return run


def toy_options(data, *more):
    """Return the options of a run of the toy network, followed by `more`."""
    return arguments(data, data / "weights" / f"{TOY.name}.pth", *more)


def error_of(operation):
    """Return what an operation raises; None if it raises nothing."""
    try:
        operation()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def errors_of_a_gpu(guard):
    with pretend_gpu(guard, count=2, memory=Memory(1000)):
        x = torch.ones(2, 3).to("cuda")
        assert x.device == torch.device("cuda", 0) and (x + torch.tensor(1.0)).sum().item() == 12
        image = torch.ones(1, 1, 5, 5, device="cuda")
        operations = (
            lambda: interpolate(image, (25, 10)),
            lambda: x + torch.ones(3),
            lambda: x + torch.ones(3, device="cuda:1"),
            x.numpy,
            lambda: torch.ones(3, device="cuda:2"),
            lambda: interpolate(image, (251, 1)),
        )
        return [error_of(operation) for operation in operations]


def test_what_a_gpu_refuses_is_refused(processes, guard):
    accepted, *refused = processes.submit(errors_of_a_gpu, guard).result()
    assert accepted is None
    expected = ("same device", "same device", "numpy", "invalid device", "OutOfMemoryError: CUDA out of memory")
    assert all(words in error for words, error in zip(expected, refused, strict=True))


def test_all_backends_files_and_diagnostics_are_those_of_the_cpu(run_both, data):
    def options(folder):
        more = "--export", folder / "export", "--execute", "--sensitivity", "--sensitivity-images", "1"
        return toy_options(data, *more, "--save-predictions", folder / "saved", "--limit", "3")

    cpu, gpu = run_both(options, "--allow-tf32")  # with which the GPU takes the CPU's memory format
    assert read(gpu)["device"] == "CUDA, pretended"
    assert list(read(gpu)["backends"]) == [FP32, INT8_SIMULATED, INT8_ONNX_RUNTIME]
    assert counts(gpu, (TOY.name,)) == counts(cpu, (TOY.name,))
    for name in ("export/model.encodings", "out/sensitivity.csv"):
        assert (gpu.parent / name).read_bytes() == (cpu.parent / name).read_bytes()
    saved = [sorted(path.read_bytes() for path in out.parent.glob("saved/*/*.png")) for out in (cpu, gpu)]
    assert saved[0] == saved[1] and len(saved[0]) == 3


def test_recovery_takes_the_steps_that_it_takes_on_the_cpu(run_both, data):
    few = "--recovery-images", "1", "--selection-images", "1", "--calibration-images", "1"
    options = toy_options(data, "--default-param-bw", "4", "--adaround", "1", "--max-drop", "0", *few)
    cpu, gpu = run_both(lambda _: options)
    steps = [[step["name"] for step in read(out)["recovery"]["steps"]] for out in (cpu, gpu)]
    assert steps[0] == steps[1] and "mixed precision" in " ".join(steps[0])
    assert counts(gpu, (TOY.name,)) == counts(cpu, (TOY.name,))


def test_two_processes_on_two_devices_count_what_one_does_on_the_cpu(processes, guard, data, tmp_path):
    options = toy_options(data, "--execute")
    assert processes.submit(run_program, [*options, "--output-dir", tmp_path / "one"]).result() == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    options += ["--output-dir", tmp_path / "two"]
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    runs = [processes.submit(run_rank, options, guard, environment) for environment in ranks]
    assert [run.result(timeout=300) for run in runs] == [0, 0]
    assert counts(tmp_path / "two", (TOY.name,)) == counts(tmp_path / "one", (TOY.name,))


def test_a_gpu_with_too_little_memory_takes_smaller_batches(processes, guard, data, tmp_path):
    options = toy_options(data)
    position = options.index("--batch-size") + 1
    large, small = ([*options[:position], size, *options[position + 1 :]] for size in (8, 4))
    cpu = processes.submit(run_program, [*small, "--output-dir", tmp_path / "cpu"])
    gpu = processes.submit(run_program, [*large, "--output-dir", tmp_path / "gpu"], guard, 1, Memory(TOO_SMALL))
    assert cpu.result() == gpu.result() == 0
    result = read(tmp_path / "gpu")
    assert "in batches of 4, channels first. The GPU ran out of memory" in result["calibration"]["description"]
    assert "The GPU ran out of memory: the last batches had 2 images." in result["notes"]
    assert counts(tmp_path / "gpu", (TOY.name,)) == counts(tmp_path / "cpu", (TOY.name,))


def test_a_gpu_that_is_too_small_for_a_model_ends_the_run_with_the_remedies(processes, guard, data):
    error = processes.submit(failure_of, options_for(data), guard, memory=Memory(1000)).result()
    assert "error: The GPU's memory does not suffice" in error and "Use --use-cuda false." in error


def inputs_while_warming_up(guard, allow_tf32):
    """Return for each call of a network the number of images, and whether they and the weights are channels_last."""
    calls = []
    runtime = Runtime("cuda", batch_size=3, quiet=True, allow_tf32=allow_tf32)
    images = [(torch.zeros(3, 16, 32, dtype=torch.uint8), torch.zeros(16, 32, dtype=torch.uint8))]
    with pretend_gpu(guard):
        network = torch.nn.Conv2d(3, 19, 4, stride=4).cuda()

        def record(module, arguments):
            tensors = *arguments, module.weight
            formats = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors]
            calls.append((len(arguments[0]), *formats))

        network.register_forward_pre_hook(record)
        warm_up(prepare_backends({FP32: network}, runtime), images, runtime)
    return calls


def test_networks_are_warmed_up_and_channels_last_if_tf32_is_allowed(processes, guard):
    for allowed in (False, True):
        calls = processes.submit(inputs_while_warming_up, guard, allowed).result()
        assert calls == [(3, allowed, allowed)]


def test_halves_are_rounded_to_even_although_aimets_kernels_for_gpus_round_them_up(guard):
    command = [sys.executable, "-m", "tests.helpers.pretend_gpu.halves", str(guard)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"AIMET": 40, "the program": 0}


@pytest.fixture(scope="module")
def toy_encodings(toy_sim, tmp_path_factory):
    """Return a file of encodings, with which runs need no calibration."""
    folder = tmp_path_factory.mktemp("encodings")
    toy_sim.save_encodings_to_json(str(folder), "encodings")
    return folder / "encodings.json"


def test_loaded_encodings_give_the_counts_of_the_cpu(run_both, data, toy_encodings):
    cpu, gpu = run_both(lambda _: toy_options(data, "--encodings", toy_encodings))
    assert read(gpu)["calibration"]["images"] == 0
    assert counts(gpu, (TOY.name,)) == counts(cpu, (TOY.name,))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_errors(processes, guard, data, toy_encodings, tmp_path, name):
    mistake, more = MISTAKES[name], ["--sensitivity", "--sensitivity-images", "1", "--limit", "1"]
    more += ["--encodings", toy_encodings, "--save-predictions", tmp_path / "saved", *mistake.options]
    error = processes.submit(failure_of, toy_options(data, *more), guard, [mistake]).result()
    assert "on the same device" in error or "to numpy" in error
