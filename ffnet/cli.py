"""The command line, parsed into a Config and checked for every error that can be found without importing torch."""

import argparse
import itertools
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ffnet.backends import SAVED_BACKENDS, short_name
from ffnet.config import (
    LIST_CHIPS,
    OUTPUT_FOLDERS,
    SEQ_MSE_BITS,
    Config,
    DataConfig,
    ModelConfig,
    NpuConfig,
    OutputConfig,
    QuantizationConfig,
    RuntimeConfig,
)
from ffnet.npu.package import check_npu_package
from ffnet.onnx.formats import EXPORT_FILES, NPU_FOLDER, check_bit_widths
from ffnet.options import DATASET_VARIABLE, FLAGS, OPTIONS, lookup
from ffnet.report.file_names import COMPARISON_FILES, PROGRESS_FOLDER, RESULT_FILES
from ffnet.system.errors import UserError
from ffnet.system.files import check_output_folder
from ffnet.system.streams import print_lines
from ffnet.variants import DEMO_VARIANTS, VARIANTS

PROGRAM = "ffnet_quanteval.py"
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "quantization": QuantizationConfig,
    "npu": NpuConfig,
    "runtime": RuntimeConfig,
    "output": OutputConfig,
}


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parse the command line (`sys.argv` if None) into a Config.

    Raises:
        UserError: if an option is wrong, misses another one or contradicts it, or if an input file is missing.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = vars(_build_parser().parse_args(argv))
    config = _build_config(given, shlex.join(["python", PROGRAM, *argv]))
    if not config.list_models and config.npu.chip != LIST_CHIPS:
        _check_combinations(set(given), config)
        _check_recovery(config)
        _check_images(config)
        _check_files(config)
        _check_output(config)
        if config.npu.chip:
            check_npu_package()
    return config


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing the usage and exiting, also if its help can't be printed."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def print_help(self, file: object = None) -> None:
        print_lines(self.format_help().rstrip())


def _build_parser() -> _Parser:
    """Return a parser whose namespace holds only the options that were given, by their target in Config."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [--demo | --dataset-path DIR] [option ...]",
        description="Measure what quantization does to an FFNet: its mIoU on Cityscapes in FP32 and in INT8.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, group in OPTIONS.items():
        add = parser.add_argument_group(title).add_argument
        for option in group:
            add(option.flag, *option.aliases, dest=option.target, help=option.full_help(), **option.settings)
    return parser


def _build_config(given: Mapping[str, Any], command: str) -> Config:
    """Return the Config of the given options, with the defaults that depend on other options or the environment."""
    defaults: dict[str, Any] = {"command": command}
    if given.get("data.demo"):
        defaults |= {"model.names": [DEMO_VARIANTS[:1]], "output.execute": "model.onnx" not in given}
    elif os.environ.get(DATASET_VARIABLE):
        defaults["data.dataset_path"] = Path(os.environ[DATASET_VARIABLE])
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for target, value in (defaults | dict(given)).items():
        if target == "model.names":  # of lists of names
            value = tuple(dict.fromkeys(itertools.chain(*value)))
        section, _, name = target.rpartition(".")
        values[section][name] = value
    return Config(**{name: section(**values[name]) for name, section in SECTIONS.items()}, **values[""])


# Options that --onnx excludes: it evaluates one file as it is, on the CPU.
NEEDS_CHECKPOINT = (
    "model.names", "model.checkpoint", "quantization.param_bw", "quantization.output_bw", "quantization.quant_scheme",
    "quantization.cle", "quantization.config_file", "quantization.encodings", "quantization.partial_encodings",
    "quantization.max_drop", "quantization.seq_mse", "quantization.adaround",
    "data.calibration_split", "data.calibration_images", "runtime.allow_tf32", "runtime.compile", "output.worst",
    "output.sensitivity", "output.sensitivity_images", "output.export", "output.execute", "output.fail_under",
    "runtime.models_at_once",
)  # fmt: skip
# Options that have no effect if the encodings are complete.
ANSWERED_BY_ENCODINGS = (
    "data.calibration_split", "data.calibration_images", "quantization.quant_scheme", "quantization.param_bw",
    "quantization.output_bw",
)  # fmt: skip
RECOVERY = ("quantization.max_drop", "quantization.seq_mse", "quantization.adaround")
REQUIRES = {  # option -> the options without any of which it has no effect
    "quantization.partial_encodings": ("quantization.encodings",),
    "output.sensitivity_images": ("output.sensitivity",),
    "output.worst": ("output.output_dir",),
    "output.resume": ("output.output_dir",),
    "model.onnx_input": ("model.onnx",),
    "model.onnx_channels": ("model.onnx",),
    "npu.images": ("npu.chip",),
    "npu.fallback": ("npu.chip",),
    "quantization.recovery_images": RECOVERY,
    "data.selection_images": RECOVERY,
}
INPUT_FILES = ("quantization.encodings", "model.onnx")


def _check_combinations(given: set[str], config: Config) -> None:
    """Raise UserError if one of the given options would be ignored."""
    excluded = [target for target in NEEDS_CHECKPOINT if target in given]
    if not config.output.execute:
        excluded = [target for target in excluded if target != "output.execute"]
    if config.model.onnx and excluded:
        raise UserError(
            f"{FLAGS[excluded[0]]} cannot be combined with --onnx, which evaluates one file as it is. Remove it."
        )
    if config.model.onnx and config.runtime.use_cuda:
        raise UserError("--use-cuda cannot be combined with --onnx, which runs on the CPU. Remove it.")
    for target, required in REQUIRES.items():
        if target in given and not any(_is_set(config, name) for name in required):
            flags = " or ".join(FLAGS[name] for name in required)
            raise UserError(f"{FLAGS[target]} has no effect without {flags}. Add that option, or remove this one.")
    answered = [target for target in ANSWERED_BY_ENCODINGS if target in given]
    if config.quantization.encodings and not config.quantization.partial_encodings and answered:
        raise UserError(
            f"{FLAGS[answered[0]]} cannot be combined with --encodings, which already determine it. Remove it, or add "
            "--partial-encodings."
        )


def _is_set(config: Config, target: str) -> bool:
    """Return whether an option has a value other than None and False; 0 is a value."""
    value = lookup(config, target)
    return value is not None and value is not False


def _check_recovery(config: Config) -> None:
    """Raise UserError if the options for accuracy recovery contradict others or each other, or can't work."""
    options = config.quantization
    requested = [FLAGS[target] for target in RECOVERY if _is_set(config, target)]
    if requested and options.encodings:
        raise UserError(
            f"{requested[0]} cannot be combined with --encodings, which already determine all ranges and bit widths. "
            "Remove one of them."
        )
    if options.seq_mse and options.param_bw > SEQ_MSE_BITS:
        raise UserError(
            f"--seq-mse: AIMET's sequential MSE takes weights of at most {SEQ_MSE_BITS} bits, and --default-param-bw "
            f"is {options.param_bw}. Remove --seq-mse, or give --default-param-bw {SEQ_MSE_BITS}."
        )
    if options.max_drop is not None:
        if options.seq_mse:
            raise UserError("--seq-mse: --max-drop tries sequential MSE by itself. Remove --seq-mse.")
        check_bit_widths(options.param_bw, options.output_bw, "remove --max-drop, whose result is meant for devices")


def _check_images(config: Config) -> None:
    """Raise UserError unless it is clear which images are evaluated."""
    if config.data.demo and config.data.dataset_path:
        raise UserError("--demo renders its own images and cannot be combined with --dataset-path. Remove one of them.")
    others = [name for name in config.model.names if name not in DEMO_VARIANTS]
    if config.data.demo and not config.model.onnx and others:
        names = " and ".join(DEMO_VARIANTS)
        raise UserError(f"--model-name {others[0]}: --demo has weights for {names} only. Name one of these or both.")
    if not config.data.demo and config.data.dataset_path is None:
        raise UserError(
            f"--dataset-path is missing. Give the folder that holds leftImg8bit and gtFine, or set {DATASET_VARIABLE} "
            "to it; --demo needs neither."
        )


def _check_files(config: Config) -> None:
    """Raise UserError if an input file is missing, or if it is of one model and there are several."""
    checkpoint, several = config.model.checkpoint, len(config.model.names) > 1
    if checkpoint and not checkpoint.exists():
        raise UserError(f"--checkpoint {checkpoint}: there is no such file. Check the path.")
    if checkpoint and several and not checkpoint.is_dir():
        raise UserError(
            f"--checkpoint {checkpoint}: this is the file of one model, and --model-name has "
            f"{len(config.model.names)}. Name a folder that holds a file for each."
        )
    if config.quantization.encodings and several:
        raise UserError("--encodings are those of one model, and --model-name has several. Name one model.")
    for target in INPUT_FILES:
        path = lookup(config, target)
        if path and not path.is_file():
            wrong = "this is a folder. Name a file." if path.is_dir() else "there is no such file. Check the path."
            raise UserError(f"{FLAGS[target]} {path}: {wrong}")


def _check_output(config: Config) -> None:
    """Raise UserError if output folders overlap or can't be used, or if the bit widths can't be exported."""
    folders = _output_folders(config)
    for one, other in itertools.permutations(folders, 2):
        if folders[one].resolve().is_relative_to(folders[other].resolve()):
            raise UserError(
                f"{FLAGS[one]} {folders[one]}: this is inside the folder of {FLAGS[other]}. Name a folder beside it."
            )
    if config.output.export or config.output.execute or config.npu.chip:
        check_bit_widths(config.quantization.param_bw, config.quantization.output_bw)
    _check_output_folders(config)


def _output_folders(config: Config) -> dict[str, Path]:
    """Return the folder of every option that names one, by its target."""
    folders = {f"output.{name}": getattr(config.output, name) for name in OUTPUT_FOLDERS}
    return {target: folder for target, folder in folders.items() if folder}


def _check_output_folders(config: Config) -> None:
    """Raise UserError if the folders, or those of each model in them, hold other files than an earlier run's own."""
    resume, names = config.output.resume, config.model.names
    exported = (*EXPORT_FILES, NPU_FOLDER)
    of_one_model: dict[str, Collection[str]] = {"output.export": exported}
    of_several: dict[str, Collection[str]] = {"output.export": VARIANTS}
    if resume:
        of_one_model["output.output_dir"] = (*RESULT_FILES, PROGRESS_FOLDER)
        of_one_model["output.save_predictions"] = [short_name(backend) for backend in SAVED_BACKENDS]
        of_several["output.output_dir"] = (*VARIANTS, *COMPARISON_FILES)
        of_several["output.save_predictions"] = VARIANTS
    checks = [(config, of_several)] if len(names) > 1 else []
    checks += [(config.for_model(name), of_one_model) for name in names]
    for checked, own_files in checks:
        for target, folder in _output_folders(checked).items():
            remedy = "Name a new folder"
            if not resume and target == "output.output_dir" and _holds_kept_work(config):
                remedy = "Add --resume to go on with the run whose results it holds, name a new folder"
            check_output_folder(FLAGS[target], folder, own_files.get(target, ()), config.output.force, remedy)


def _holds_kept_work(config: Config) -> bool:
    """Return whether the output folder holds what --resume may go on with."""
    folders = [config.for_model(name).output.output_dir for name in config.model.names]
    return any(folder is not None and (folder / PROGRESS_FOLDER).is_dir() for folder in folders)
