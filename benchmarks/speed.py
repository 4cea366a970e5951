"""Measure ratios of what the stages of an evaluation cost: each pair alternately in one run, medians of several rounds.

    python -m benchmarks.speed [--json] [--model-name NAME] [--images N] [--rounds N]

The weights are random, because speed does not depend on them, and the images are rendered at 1024x2048.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from aimet_torch.quantsim import QuantizationSimModel
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset
from torchvision.io import decode_image
from tqdm import tqdm

from benchmarks import baseline
from benchmarks.program import run_program
from benchmarks.tables import markdown
from datasets.cityscapes import IMAGE_SUFFIX, LABEL_SUFFIX, CityscapesSplit
from demo.streetscenes.render import render_scene
from ffnet.config import QuantizationConfig, Runtime
from ffnet.evaluation.backends import FP32, INT8_SIMULATED
from ffnet.evaluation.compilation import PreparedBackends, compiler_problem, prepare_backends
from ffnet.evaluation.loading import Sample, load_batches, normalize, synchronized_clock
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.postprocessing import confusion_matrices, predict
from ffnet.file_names import FLOAT_MODEL_FILE, MODEL_FILE
from ffnet.model import FFNet, build_model
from ffnet.onnx.export import export
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.lowering import lower
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize, quantize
from ffnet.quantization.weighted_layers import raise_weight_scales
from ffnet.run.inputs import allow_tf32
from ffnet.system.text import count
from ffnet.variants import VARIANTS

HEIGHT, WIDTH = 1024, 2048
UPPER_BOUNDS = {  # ratio -> largest allowed value, for 40S_dBBB on two CPU cores
    "simulated_over_fp32": 1.15,
    "scoring_over_fp32": 0.20,
    "loading_over_decoding": 1.20,
    "loop_over_stages": 1.10,
    "run_over_baseline": 0.15,
    "onnx_int8_over_fp32": 0.35,
    "peak_gb": 3.0,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the ratios and the times behind them."""
    args = parse_args(argv)
    runtime = Runtime(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"), batch_size=1, num_workers=1, progress=False
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        allow_tf32(False)
        images = write_images(folder, args.images)
        model = random_model(args.model_name).to(runtime.device)
        sim = build_quantsim(equalize(model), QuantizationConfig())
        begin = time.perf_counter()
        calibrate(sim, [first_batch(images, runtime.device)])
        calibration_seconds = time.perf_counter() - begin
        ratios, details = measure(images, model, sim, runtime, folder, args.rounds)
        details["calibration on one image, s"] = calibration_seconds
        if runtime.device.type == "cpu":
            ratios["peak_gb"] = peak_gb(folder, args.model_name)
    outcome = {"machine": machine(runtime.device), "model": args.model_name, "ratios": ratios, "details": details}
    print(json.dumps(outcome) if args.json else format_outcome(outcome))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    default = "segmentation_ffnet40S_dBBB_mobile"
    parser.add_argument("--model-name", default=default, choices=VARIANTS, metavar="NAME", help="default %(default)s")
    parser.add_argument("--images", type=int, default=4, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    return parser.parse_args(argv)


def write_images(root: Path, count: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> CityscapesSplit:
    """Write and open a val split of `count` rendered scenes of `size` (height, width)."""
    folders = [root / kind / "val" / "bench" for kind in ("leftImg8bit", "gtFine")]
    for folder in folders:
        folder.mkdir(parents=True)
    for seed in tqdm(range(count), "render", disable=None):
        pair = zip(folders, (IMAGE_SUFFIX, LABEL_SUFFIX), render_scene(seed, *size), strict=True)
        for folder, suffix, pixels in pair:
            Image.fromarray(pixels).save(folder / file_name(seed, suffix))
    return CityscapesSplit(root, "val")


def link_images(images: CityscapesSplit, count: int) -> None:
    """Give the folder of `write_images` as many pairs as `count`: further names of its files, in turn."""
    for index in range(len(images), count):
        for paths, suffix in ((images.images, IMAGE_SUFFIX), (images.targets, LABEL_SUFFIX)):
            path = Path(paths[index % len(images)])
            path.with_name(file_name(index, suffix)).hardlink_to(path)


def file_name(index: int, suffix: str) -> str:
    """Return the name of the file of an image or, with the other suffix, of its labels."""
    return f"bench_{index:06d}_000019{suffix}"


def random_model(name: str) -> FFNet:
    """Return the network with He's initial weights, which keep activations in range."""
    torch.manual_seed(0)
    model = build_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.3)
    return model


def first_batch(images: CityscapesSplit, device: torch.device) -> torch.Tensor:
    """Return the first image, normalized."""
    return normalize(images[0][0][None].to(device))


@torch.no_grad()
def measure(
    images: CityscapesSplit, model: FFNet, sim: QuantizationSimModel, runtime: Runtime, folder: Path, rounds: int
) -> tuple[dict[str, float], dict[str, float | str]]:
    """Return the ratios, and the seconds behind them."""
    device = runtime.device
    raise_weight_scales(sim)
    backends = {FP32: model, INT8_SIMULATED: lower(sim)}
    prepared = prepare_backends(backends, runtime, compiler_problem(device) is None, 1, (HEIGHT, WIDTH))
    x = first_batch(images, device)
    label = images[0][1][None].to(device)
    begin = time.perf_counter()
    logits = {name: backend(x) for name, backend in prepared.backends.items()}
    predict(logits[FP32], (HEIGHT, WIDTH), prepared.kernel)
    compile_seconds = time.perf_counter() - begin
    files = [path for pair in zip(images.images, images.targets, strict=True) for path in pair]

    def clock() -> float:
        return synchronized_clock(device)

    def score_all() -> None:
        for value in logits.values():
            confusion_matrices(label, predict(value, (HEIGHT, WIDTH), prepared.kernel))

    def run() -> None:
        quantize(model, images, runtime=runtime)
        evaluate(prepared, images, runtime)

    calls = {
        "fp32": lambda: prepared.backends[FP32](x),
        "simulated": lambda: prepared.backends[INT8_SIMULATED](x),
        "aimet": lambda: sim.model(x),
        "scoring": score_all,
        **onnx_calls(sim, x, folder),
    }
    cpu_calls = {
        "loading": lambda: list(load_batches(images, Runtime(batch_size=1))),
        "decoding": lambda: [decode_image(path) for path in files],
    }
    whole_runs = {"run": run, "baseline run": lambda: baseline.run(images, model, sim, device)}
    seconds = median_seconds(calls, rounds, clock)
    seconds |= median_seconds(cpu_calls, rounds, time.process_time)
    seconds |= median_seconds(whole_runs, max(1, rounds // 2), clock, warm_up=False)
    loop = statistics.median(loop_over_stages(images, prepared, runtime) for _ in range(rounds))
    ratios = ratios_of(seconds, loop)
    details: dict[str, float | str] = {f"{name}, s": value for name, value in seconds.items()}
    return ratios, details | {"compilation, s": compile_seconds, "execution": prepared.reason}


def ratios_of(seconds: Mapping[str, float], loop: float) -> dict[str, float]:
    """Return the ratios of median seconds; `loop`: see `loop_over_stages`."""
    fp32 = seconds["fp32"]
    return {
        "simulated_over_fp32": seconds["simulated"] / fp32,
        "aimet_over_fp32": seconds["aimet"] / fp32,
        "scoring_over_fp32": seconds["scoring"] / 2 / fp32,  # of two backends
        "loading_over_decoding": seconds["loading"] / seconds["decoding"],
        "loop_over_stages": loop,
        "run_over_baseline": seconds["run"] / seconds["baseline run"],
        **{f"{name}_over_fp32": seconds[name] / fp32 for name in ("onnx_fp32", "onnx_int8") if name in seconds},
    }


def onnx_calls(sim: QuantizationSimModel, x: torch.Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return calls of the exported FP32 and INT8 files in ONNX Runtime; none on a GPU."""
    if x.device.type != "cpu":
        return {}
    exported = export(sim, (HEIGHT, WIDTH), folder / "onnx", {})
    fp32, int8 = (OnnxBackend(exported / name) for name in (FLOAT_MODEL_FILE, MODEL_FILE))
    return {"onnx_fp32": lambda: fp32(x), "onnx_int8": lambda: int8(x)}


def median_seconds(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], warm_up: bool = True
) -> dict[str, float]:
    """Return the median seconds of every call by `clock`; each round makes all calls in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm_up else ():
        call()
    for _ in tqdm(range(rounds), ", ".join(calls), disable=None):
        for name, call in calls.items():
            begin = clock()
            call()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def loop_over_stages(images: CityscapesSplit, prepared: PreparedBackends, runtime: Runtime) -> float:
    """Return the wall time of an evaluation loop over the sum of its backends' times and its scoring time."""
    repeated: Dataset[Sample] = ConcatDataset([images] * 3)
    begin = time.perf_counter()
    scores = evaluate(prepared, repeated, runtime)
    return (time.perf_counter() - begin) / (sum(scores.seconds.values()) + scores.scoring_seconds)


def peak_gb(root: Path, model_name: str) -> float:
    """Return the peak memory, in 10**9 bytes, of a process that makes a whole run on two images, batch size 1."""
    checkpoint = root / "weights.pth"
    torch.save(random_model(model_name).state_dict(), checkpoint)
    options: list[str | Path] = ["--dataset-path", root, "--checkpoint", checkpoint, "--model-name", model_name]
    options += ["--limit", "2", "--batch-size", "1", "--num-workers", "1"]
    return run_program(options).peak_bytes / 1e9


def machine(device: torch.device) -> str:
    """Return one line about the processor or GPU."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    instructions = " with AVX-512 VNNI" if "avx512_vnni" in cpuinfo else ""
    cpu = names[0] if names else platform.machine()
    return f"{cpu}{instructions}, {count(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"


def format_outcome(outcome: dict[str, Any]) -> str:
    """Return the outcome as two Markdown tables."""
    lines = [f"{outcome['model']}, {HEIGHT}x{WIDTH}, batch size 1: {outcome['machine']}", ""]
    bounds = {name: f"at most {value:.2f}" for name, value in UPPER_BOUNDS.items()}
    ratios = [(name, f"{value:.3f}", bounds.get(name, "")) for name, value in outcome["ratios"].items()]
    details = [
        (name, value if isinstance(value, str) else f"{value:.3f}") for name, value in outcome["details"].items()
    ]
    lines += [*markdown([("ratio", "measured", "bound"), *ratios]), "", *markdown([("what", ""), *details])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
