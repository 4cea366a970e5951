"""Ratios of what the evaluator's parts cost, each pair measured alternately in one run; medians of several rounds.

    python -m benchmarks.speed [--json] [--model-name NAME] [--images N] [--rounds N]

The weights are random (speed does not depend on them) and the images are rendered, 1024x2048.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.io import decode_image
from tqdm import tqdm

from benchmarks import classic
from datasets.cityscapes import CityscapesSplit
from datasets.streetscenes.render import render_scene
from ffnet import build_model, evaluate, fast, quantize
from ffnet.biases import fit_biases
from ffnet.lower import lower
from ffnet.postprocess import confusion_matrices, predict

HEIGHT, WIDTH = 1024, 2048
TARGETS = {  # ratio -> at most, 40S_dBBB on two CPU cores
    "int8_over_fp32": 1.15,
    "post_over_fp32": 0.20,
    "loader_over_decode": 1.20,
    "sweep_over_parts": 1.10,
    "run_over_classic": 0.15,
    "executed_over_fp32": 0.35,
    "peak_gb": 3.0,
}


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), args.images)
        model = random_model(args.model_name).to(device)
        sim = quantize.simulate(quantize.equalize(model), quantize.Recipe())
        begin = time.perf_counter()
        quantize.calibrate(sim, inputs(images, device)[:1])
        fixed = time.perf_counter() - begin
        ratios, details = measure(images, model, sim, device, Path(folder), args)
        details["calibrating on one image, s"] = fixed
        if device.type == "cpu":
            ratios["peak_gb"] = peak_gb(Path(folder), args)
    outcome = {"machine": machine(device), "model": args.model_name, "ratios": ratios, "details": details}
    print(json.dumps(outcome) if args.json else table(outcome))


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--model-name", default="segmentation_ffnet40S_dBBB_mobile")
    parser.add_argument("--images", type=int, default=4, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    return parser.parse_args(argv)


def write_images(root, count):
    """A val split of `count` rendered scenes, 1024x2048."""
    from PIL import Image

    for seed in tqdm(range(count), "rendering", disable=None):
        for kind, name, pixels in zip(
            ("leftImg8bit", "gtFine"),
            ("leftImg8bit", "gtFine_labelIds"),
            render_scene(seed, HEIGHT, WIDTH),
            strict=True,
        ):
            folder = root / kind / "val" / "bench"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"bench_{seed:06d}_000019_{name}.png")
    return CityscapesSplit(root, "val")


def random_model(name):
    """The network with He's initial weights, which keep activations in range."""
    torch.manual_seed(0)
    model = build_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.3)
    return model


def inputs(images, device):
    return [evaluate.normalize(image[None].to(device)) for image, _ in images]


@torch.no_grad()
def measure(images, model, sim, device, folder, args):
    """(ratios, details): every contender once a round, in turn, then the medians."""
    fit_biases(sim)
    lowered = lower(sim)
    quick = fast.make_fast(
        {"FP32": model, "INT8": lowered}, 0, 1, device, compile=fast.compiler_problem(device) is None
    )
    x = inputs(images, device)[0]
    label = images[0][1][None].to(device)
    begin = time.perf_counter()
    logits = {name: run(x) for name, run in quick.passes.items()}
    predict(logits["FP32"], label.shape[1:], quick.top_two)
    compile_seconds = time.perf_counter() - begin

    contenders = {
        "fp32": lambda: quick.passes["FP32"](x),
        "int8": lambda: quick.passes["INT8"](x),
        "aimet": lambda: sim.model(x),
        "post": lambda: [score(value, label, quick.top_two) for value in logits.values()],
        "loader": lambda: list(evaluate.loader(images, 1, 0, torch.device("cpu"))),
        "decode": lambda: [
            decode_image(path) for pair in zip(images.images, images.targets, strict=True) for path in pair
        ],
        **onnx_contenders(sim, x, folder, device),
    }
    seconds = alternate(contenders, args.rounds, device, cpu_time=("loader", "decode"))
    sweeps, ours, classics = [], [], []
    for round_number in tqdm(range(args.rounds), "whole runs", disable=None):
        sweeps.append(sweep_over_parts(images, quick, device))
        if round_number < max(1, args.rounds // 2):
            ours.append(timed(lambda: whole_run(images, model, quick, device), device))
            classics.append(timed(lambda: classic.run(images, model, sim, device), device))
    fp32 = seconds["fp32"]
    ratios = {
        "int8_over_fp32": seconds["int8"] / fp32,
        "aimet_over_fp32": seconds["aimet"] / fp32,
        "post_over_fp32": seconds["post"] / 2 / fp32,
        "loader_over_decode": seconds["loader"] / seconds["decode"],
        "sweep_over_parts": statistics.median(sweeps),
        "run_over_classic": statistics.median(ours) / statistics.median(classics),
        **{f"{name}_over_fp32": seconds[name] / fp32 for name in ("ort_fp32", "executed") if name in seconds},
    }
    details = {f"{name}, s": value for name, value in seconds.items()}
    details |= {"whole run, s": statistics.median(ours), "classic run, s": statistics.median(classics)}
    return ratios, details | {"compiling, s": compile_seconds, "execution": quick.reason}


def score(logits, label, top_two):
    return confusion_matrices(label, predict(logits, label.shape[1:], top_two))


def onnx_contenders(sim, x, folder, device):
    """The FP32 and the quantized ONNX file in ONNX Runtime, on a CPU."""
    if device.type != "cpu":
        return {}
    from ffnet.execute import OnnxNetwork
    from ffnet.export import export

    exported = export(sim, tuple(x.shape[2:]), folder / "onnx", {})
    networks = {"ort_fp32": OnnxNetwork(exported / "model_fp32.onnx"), "executed": OnnxNetwork(exported / "model.onnx")}
    return {name: (lambda network=network: network(x)) for name, network in networks.items()}


def alternate(contenders, rounds, device, cpu_time):
    """Median seconds of every contender, one after the other in every round; processor time for those in `cpu_time`."""
    seconds = {name: [] for name in contenders}
    for work in contenders.values():
        work()
    for _ in tqdm(range(rounds), "rounds", disable=None):
        for name, work in contenders.items():
            seconds[name].append(timed(work, device, time.process_time if name in cpu_time else None))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(work, device, clock=None):
    clock = clock or (lambda: evaluate.clock(device))
    begin = clock()
    work()
    return clock() - begin


def sweep_over_parts(images, quick, device):
    """Wall time of a sweep over the sum of its passes' and of its scoring's."""
    repeated = torch.utils.data.ConcatDataset([images] * 3)
    begin = time.perf_counter()
    with silence():
        scores = evaluate.sweep(quick.passes, evaluate.loader(repeated, 1, 1, device), device, quick.top_two)
    return (time.perf_counter() - begin) / (sum(scores.seconds.values()) + scores.scoring_seconds)


def whole_run(images, model, quick, device):
    """Calibrate, FP32 and INT8, as the evaluator does; compiling is told apart."""
    sim = quantize.simulate(quantize.equalize(model), quantize.Recipe())
    with silence():
        batches = evaluate.loader(images, 1, 1, device)
        quantize.calibrate(sim, evaluate.calibration_inputs(batches, device))
        evaluate.sweep(quick.passes, evaluate.loader(images, 1, 1, device), device, quick.top_two)


@contextlib.contextmanager
def silence():
    """Progress bars go nowhere."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def peak_gb(root, args):
    """Most memory of a process of its own that makes the whole run, batch size 1, in 10**9 bytes."""
    model = random_model(args.model_name)
    torch.save(model.state_dict(), root / "weights.pth")
    options = ["--dataset-path", root, "--checkpoint", root / "weights.pth", "--model-name", args.model_name]
    options += ["--limit", "2", "--batch-size", "1", "--num-workers", "1", "--use-cuda", "false"]
    # VmHWM of the process itself: what getrusage tells of a child begins with its parent's memory.
    program = (
        "import re, pathlib, sys, ffnet_quanteval; ffnet_quanteval.main(sys.argv[1:]);"
        "print(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    command = [sys.executable, "-c", program, *map(str, options)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return int(run.stdout.split()[-1]) * 1024 / 1e9


def machine(device):
    """The machine in a line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    flags = " with AVX-512 VNNI" if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else ""
    cpu = names[0] if names else platform.machine()
    return f"{cpu}{flags}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(outcome):
    lines = [
        f"{outcome['model']}, 1024x2048, batch size 1: {outcome['machine']}",
        "",
        "| ratio | measured | target |",
        "| --- | --- | --- |",
    ]
    for name, value in outcome["ratios"].items():
        target = f"at most {TARGETS[name]:.2f}" if name in TARGETS else ""
        lines.append(f"| {name} | {value:.3f} | {target} |")
    lines += ["", "| what | |", "| --- | --- |"]
    lines += [
        f"| {name} | {value if isinstance(value, str) else f'{value:.3f}'} |"
        for name, value in outcome["details"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
