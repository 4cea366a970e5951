"""The measurements of `benchmarks.accuracy_recovery`."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.ill_conditioned import ill_conditioned
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.chips import DEFAULT_CHIP
from ffnet.config import (
    ADAROUND_ITERATIONS,
    Config,
    DataConfig,
    ModelConfig,
    NpuConfig,
    OutputConfig,
    QuantizationConfig,
    Runtime,
)
from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_ONNX_RUNTIME, INT8_SIMULATED
from ffnet.results.result import Result
from ffnet.run.inputs import DEMO_FOLDER
from ffnet.run.pipeline import evaluate_models
from ffnet.variants import DEMO_VARIANTS

RUNS = (  # bit widths, options, what they mean
    ("W4A8", "", QuantizationConfig(param_bw=4)),
    ("W4A8", "--seq-mse", QuantizationConfig(param_bw=4, seq_mse=True)),
    ("W4A8", "--seq-mse --adaround", QuantizationConfig(param_bw=4, seq_mse=True, adaround=ADAROUND_ITERATIONS)),
    ("W4A8", "--max-drop 0.3", QuantizationConfig(param_bw=4, max_drop=0.3)),
    ("W4A8", "--max-drop 0.05", QuantizationConfig(param_bw=4, max_drop=0.05)),
    ("W8A8", "", QuantizationConfig()),
    ("W8A8", "--adaround", QuantizationConfig(adaround=ADAROUND_ITERATIONS)),
    ("W8A8", "--max-drop 0", QuantizationConfig(max_drop=0.0)),
)


@dataclass(frozen=True)
class Row:
    """One run of the program; mIoU in percent on the val split, None for what was not measured."""

    network: str
    bit_widths: str
    options: str
    fp32_miou: float
    simulated_miou: float
    drop_interval: tuple[float, float]  # 95 % confidence interval of the drop in percentage points
    onnx_runtime_miou: float
    npu_miou: float | None  # on the images that the NPU ran
    simulated_miou_there: float | None
    cpu_nodes: list[str] | None  # nodes that the NPU refused
    bit_operations: float | None  # relative to W8A8
    weight_bytes: float | None
    chosen: str | None  # configuration that the search chose
    seconds: float | None  # of the recovery


def measure(args: argparse.Namespace) -> list[Row]:
    """Return what `benchmarks.accuracy_recovery` prints for its arguments; show each row on stderr when it is known."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model_name or DEMO_VARIANTS:
            for network, checkpoint in write_checkpoints(name, Path(folder)):
                model = ModelConfig((name,), checkpoint, cache_dir=args.cache_dir)
                for bit_widths, options, quantization in RUNS:
                    rows.append(make_row(network, bit_widths, options, run_program(args, model, quantization)))
                    print(rows[-1], file=sys.stderr)
    return rows


def write_checkpoints(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the checkpoint of a demo network and of its ill-conditioned copy, which is written."""
    original = DEMO_FOLDER / f"{name}.pth"
    yield name, original
    copy = folder / f"{name}.pth"
    torch.save(ill_conditioned(load_checkpoint(name, original).model).state_dict(), copy)
    yield f"{name}, ill-conditioned", copy


def run_program(args: argparse.Namespace, model: ModelConfig, quantization: QuantizationConfig) -> Result:
    """Run the program on the demo's scenes."""
    npu = NpuConfig(DEFAULT_CHIP, args.npu_images) if args.npu_images else NpuConfig()
    data = DataConfig(demo=True, limit=args.limit, calibration_split="train")
    config = Config(model, data, quantization, npu, Runtime(quiet=True), OutputConfig(execute=True))
    (result,) = evaluate_models(config)
    if result.details.failure:
        raise result.details.failure
    return result


def make_row(network: str, bit_widths: str, options: str, result: Result) -> Row:
    """Return the row of a run."""
    mious = {name: entry.miou for name, entry in result.backends.items()}
    there = {name: entry.miou for name, entry in result.npu.backends.items()} if result.npu else {}
    step = result.recovery.chosen_step if result.recovery else None
    return Row(
        network=network,
        bit_widths=bit_widths,
        options=options,
        fp32_miou=mious[FP32],
        simulated_miou=mious[INT8_SIMULATED],
        drop_interval=result.backends[INT8_SIMULATED].drop_interval,
        onnx_runtime_miou=mious[INT8_ONNX_RUNTIME],
        npu_miou=there.get(INT8_NPU),
        simulated_miou_there=there.get(INT8_SIMULATED),
        cpu_nodes=result.npu.cpu_nodes if result.npu else None,
        bit_operations=step.bit_operations if step else None,
        weight_bytes=step.weight_bytes if step else None,
        chosen=step.name if step else None,
        seconds=result.stage_seconds.get("recover accuracy"),
    )
