"""What is said before and during the work: what is run, and the numbered phases."""

from collections.abc import Callable
from pathlib import Path

from ffnet.config import Config
from ffnet.evaluation.scores import FP32
from ffnet.results.result import device_name
from ffnet.run.inputs import Inputs
from ffnet.system.text import count, describe_size

# Stage -> title, and whether a run has it; in order of execution. Other stages are short and not announced.
PHASES: dict[str, tuple[str, Callable[[Config], bool]]] = {
    "open ONNX file": ("Opening the ONNX file", lambda c: c.model.onnx is not None),
    "quantize": ("Quantizing the ONNX file", lambda c: c.quantizes_onnx),
    "build QuantSim": ("Building the simulation", lambda c: c.model.onnx is None),
    "calibrate": ("Calibrating", lambda c: c.model.onnx is None and c.quantization.calibrates),
    "recover accuracy": ("Recovering accuracy", lambda c: c.quantization.recovers),
    "export": ("Exporting", lambda c: bool(c.output.export or c.output.execute or (c.npu.chips and not c.model.onnx))),
    "compile for the NPU": ("Compiling for the NPU", lambda c: bool(c.npu.chips)),
    "evaluate": ("Evaluating", lambda c: True),
    "diagnose": ("Finding what explains the scores", lambda c: bool(c.output.output_dir or c.output.sensitivity)),
    "evaluate on the NPU": ("Evaluating on the NPU", lambda c: bool(c.npu.chips)),
    "compare layers with the NPU": ("Comparing layers", lambda c: bool(c.npu.chips) and c.model.onnx is None),
}


def phase_titles(config: Config) -> dict[str, str]:
    """Return the numbered titles of a run's phases, such as "[3/6] Calibrating", by the name of the stage."""
    stages = [stage for stage, (_, applies) in PHASES.items() if applies(config)]
    return {stage: f"[{number}/{len(stages)}] {PHASES[stage][0]}" for number, stage in enumerate(stages, 1)}


def describe_run(config: Config, weights: Path, sha256: str, inputs: Inputs, device: str) -> list[str]:
    """Return lines that say what is run: the configuration, weights, images and device."""
    options, images = config.quantization, inputs.images
    what = f"W{options.param_bw}A{options.output_bw}, {options.quant_scheme}"
    what += ", cross-layer equalization" if options.cle else ", no cross-layer equalization"
    if options.encodings:
        what = f"encodings of {options.encodings}"
    if config.model.onnx and not config.quantizes_onnx:
        what = "the ONNX file as it is"
    return [
        f"Configuration: {what if config.model.onnx else f'{config.model.name}, {FP32} and {what}'}",
        f"Weights: {weights} (sha256 {sha256[:12]})",
        f"Images: {count(len(images), 'image')} of {images.root}, {describe_size(images.size)}",
        f"Device: {device_name(device)}",
    ]
