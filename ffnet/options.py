"""The command-line options: their table, the parser, and checks of combinations. Needs no torch."""

import argparse
import difflib
import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from ffnet import __version__
from ffnet.chips import DEFAULT_CHIP
from ffnet.config import ADAROUND_ITERATIONS, CHANNEL_ORDERS, LIST_CHIPS, SEQ_MSE_BITS, VALUE_RANGES, Config
from ffnet.option_types import boolean, chips, integer, model_names, path, percentage_points, plain_text, size
from ffnet.system.errors import UserError
from ffnet.system.process import print_lines
from ffnet.variants import AI_HUB_INPUT_SIZES, DEFAULT_MODEL, DEMO_VARIANTS, MODEL_GROUPS

PROGRAM = "ffnet_quanteval.py"
DATASET_VARIABLE = "CITYSCAPES_DATASET"  # environment variable, used if --dataset-path is not given
PARAM_BIT_WIDTHS, OUTPUT_BIT_WIDTHS = (4, 8, 16), (8, 16)  # ONNX has integers for them, and ONNX Runtime kernels
EXPORT_REMEDY = "remove --export, --execute and --npu (with --demo: add --no-execute)"

# Options that --onnx excludes: it evaluates files on the CPU.
NEEDS_CHECKPOINT = (
    "model.names", "model.checkpoint", "quantization.max_drop", "quantization.seq_mse", "quantization.adaround",
    "runtime.allow_tf32", "runtime.compile", "output.layers", "output.sensitivity", "output.sensitivity_images",
    "output.export", "output.execute",
)  # fmt: skip
BIT_WIDTHS = ("quantization.param_bw", "quantization.output_bw")
CALIBRATION = ("quantization.quant_scheme", "quantization.cle", "quantization.config_file", "data.calibration_images")
NEEDS_QUANTIZATION = (*BIT_WIDTHS, *CALIBRATION, "output.worst", "output.fail_under")  # --onnx alone excludes these
# Options that have no effect if the encodings are complete.
ANSWERED_BY_ENCODINGS = (
    "data.calibration_split", "data.calibration_images", "quantization.quant_scheme", "quantization.param_bw",
    "quantization.output_bw",
)  # fmt: skip
RECOVERY = ("quantization.max_drop", "quantization.seq_mse", "quantization.adaround")
REQUIRES = {  # option -> options; it has no effect without at least one of them
    "quantization.partial_encodings": ("quantization.encodings",),
    "output.sensitivity_images": ("output.sensitivity",),
    "output.worst": ("output.output_dir",),
    "output.layers": ("output.output_dir",),
    "output.resume": ("output.output_dir",),
    "model.onnx_input": ("model.onnx",),
    "model.onnx_channels": ("model.onnx",),
    "npu.images": ("npu.chips",),
    "npu.fallback": ("npu.chips",),
    "quantization.recovery_images": RECOVERY,
    "data.selection_images": RECOVERY,
}


@dataclass(frozen=True)
class Option:
    """One option: where its value goes, and how argparse reads it."""

    flag: str
    target: str  # "section.field" of Config
    help: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # further arguments of argparse's add_argument
    aliases: tuple[str, ...] = ()

    def full_help(self) -> str:
        """Return the help text with the default value, if it is a number or a name."""
        default = lookup(Config(), self.target)
        shown = default is not None and not isinstance(default, bool) and "default" not in self.help
        return f"{self.help} (default: {default})" if shown else self.help


def lookup(config: Config, target: str) -> Any:
    """Return the value of "section.field" of Config."""
    return attrgetter(target)(config)


FLAG: dict[str, Any] = {"action": "store_true"}
SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}  # --name and --no-name
FILE: dict[str, Any] = {"type": path, "metavar": "FILE"}
FOLDER: dict[str, Any] = {"type": path, "metavar": "DIR"}
COUNT: dict[str, Any] = {"type": integer(1), "metavar": "N"}
COUNT_OR_ZERO: dict[str, Any] = {"type": integer(0), "metavar": "N"}
BITS: dict[str, Any] = {"type": integer(4, 16), "metavar": "BITS"}  # float32 cannot simulate many more
SPLIT: dict[str, Any] = {"choices": ("val", "train")}

OPTIONS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("--model-name", "model.names", "FFNet segmentation models that are evaluated and compared: names, "
               "`published` for the five with published INT8 results, `ai-hub` for Qualcomm AI Hub's five at its input "
               f"sizes, `all` for the 66, or the demo's two (default: {DEFAULT_MODEL})",
               {"type": model_names, "nargs": "+", "action": "extend", "metavar": "NAME"}, ("--model-config",)),
        Option("--list-models", "list_models", "list the 66 models with sizes and published mIoU, and exit", FLAG),
        Option("--checkpoint", "model.checkpoint", "weights, or a folder whose files are matched with the models by "
               "name or content (default: the published files, downloaded once)", FOLDER | {"metavar": "FILE_OR_DIR"}),
        Option("--cache-dir", "model.cache_dir", "folder for downloads and rendered scenes (default: "
               "$TORCH_HOME/hub/ffnet)", FOLDER),
        Option("--onnx", "model.onnx", "evaluate an ONNX file instead of a checkpoint: as it is, or a float file "
               "beside what --encodings or, with --calibration-split, aimet-onnx make of it", FILE),
        Option("--onnx-input", "model.onnx_input", "range of the values that the ONNX file takes (default: detected)",
               {"choices": VALUE_RANGES}),
        Option("--onnx-channels", "model.onnx_channels", "channel order of the ONNX file's input (default: detected)",
               {"choices": CHANNEL_ORDERS}),
    ),
    "images": (
        Option("--demo", "data.demo", "evaluate a small FFNet on rendered street scenes; needs no data set", FLAG),
        Option("--dataset-path", "data.dataset_path", "folder that holds the data set, for Cityscapes leftImg8bit and "
               f"gtFine (default: ${DATASET_VARIABLE})", FOLDER),
        Option("--dataset", "data.dataset", "layout of --dataset-path: cityscapes, kitti, bdd100k, or folders for your "
               "own data; cityscapes:foggy_beta_0.02 and the like for foggy and rainy variants",
               {"type": plain_text, "metavar": "LAYOUT"}),
        Option("--classes", "data.classes", "JSON file of the label set (default: that of --dataset)", FILE),
        Option("--input-size", "data.input_size", "resize the images to height x width, as Qualcomm AI Hub does "
               "(default: their own size)", {"type": size, "metavar": "HxW"}),
        Option("--split", "data.split", "the split that is scored", SPLIT),
        Option("--limit", "data.limit", "score only the first N images of --split", COUNT),
    ),
    "quantization; the defaults are the published configuration": (
        Option("--default-param-bw", "quantization.param_bw", "bit width of weights, 4 to 16", BITS),
        Option("--default-output-bw", "quantization.output_bw", "bit width of activations, 4 to 16", BITS),
        Option("--quant-scheme", "quantization.quant_scheme", "how ranges are chosen; tf takes minimum and maximum",
               {"choices": ("tf_enhanced", "tf")}),
        Option("--cle", "quantization.cle", "cross-layer equalization (default: on)", SWITCH),
        Option("--config-file", "quantization.config_file",
               "AIMET's quantization configuration, or the name of one of its own (default: its per-channel one)",
               {"type": plain_text, "metavar": "FILE"}),
        Option("--calibration-split", "data.calibration_split", "the split of the calibration images", SPLIT),
        Option("--calibration-images", "data.calibration_images",
               "number of calibration images, drawn with --seed (default: all, as published)", COUNT),
        Option("--seed", "data.seed", "seed for drawing the calibration images", COUNT_OR_ZERO),
        Option("--encodings", "quantization.encodings", "load AIMET encodings instead of calibrating", FILE),
        Option("--partial-encodings", "quantization.partial_encodings",
               "calibrate the quantizers that --encodings does not cover (with --onnx: leave them in float), and "
               "ignore its unexpected entries", FLAG),
    ),
    "accuracy recovery": (
        Option("--seq-mse", "quantization.seq_mse", "choose the ranges of 4-bit weights by sequential MSE", FLAG),
        Option("--adaround", "quantization.adaround", "round weights up or down so that each layer's output changes "
               f"least; ITERATIONS per layer (without a number: {ADAROUND_ITERATIONS})",
               {"type": integer(1, 10**6), "nargs": "?", "const": ADAROUND_ITERATIONS, "metavar": "ITERATIONS"}),
        Option("--max-drop", "quantization.max_drop", "try sequential MSE, then AdaRound, then more bits for the most "
               "sensitive layers, until the mIoU drop is at most POINTS percentage points",
               {"type": percentage_points, "metavar": "POINTS"}),
        Option("--recovery-images", "quantization.recovery_images",
               "number of calibration images for sequential MSE and AdaRound, spread evenly", COUNT),
        Option("--selection-images", "data.selection_images",
               "number of images of --calibration-split on which recovery measures its steps; none of them is used for "
               "calibration (default: a third, at most 64)", COUNT),
    ),
    "NPU": (
        Option("--npu", "npu.chips", "add a backend: the exported file on Qualcomm's NPU, emulated unless the PC has "
               f"one; several chips, or `all`, are compared; `--npu {LIST_CHIPS}` prints the chips (without a "
               f"name: {DEFAULT_CHIP})", {"type": chips, "nargs": "*", "metavar": "CHIP"}),
        Option("--npu-images", "npu.images", "number of images for --npu, every n-th of those scored, or `all`",
               {"type": integer(1, word="all"), "metavar": "N"}),
        Option("--npu-fallback", "npu.fallback", "run nodes that the NPU refuses on the CPU, and name them", FLAG),
    ),
    "runtime": (
        Option("--use-cuda", "use_cuda", "true or false (default: true if a CUDA device is available)",
               {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}),
        Option("--allow-tf32", "runtime.allow_tf32", "on a GPU, compute FP32 in TF32: faster and less exact", FLAG),
        Option("--compile", "runtime.compile", "compile the networks (default: if the run is long enough)", SWITCH),
        Option("--batch-size", "runtime.batch_size", "images per batch; the encodings depend on it, because "
               "TF-Enhanced takes the range of its histograms from the first batch",
               {"type": integer(1, 4096), "metavar": "N"}),
        Option("--num-workers", "runtime.num_workers", "threads that decode images; 0: the main thread (default: up to "
               "4, with a GPU up to 16, at most one per processor)", {"type": integer(0, 256), "metavar": "N"}),
        Option("--quiet", "runtime.quiet", "show no progress on stderr", FLAG),
    ),
    "results": (
        Option("--output-dir", "output.output_dir", "write report.html, result.json and CSV files", FOLDER),
        Option("--resume", "output.resume", "continue a run with the same options and --output-dir where it stopped; "
               "if there is none, start from the beginning", FLAG),
        Option("--worst", "output.worst", "number of images with the largest mIoU drop in the report", COUNT_OR_ZERO),
        Option("--layers", "output.layers", "number of images on which the report compares every layer with FP32, ONNX "
               "Runtime and the NPU; 0: none", COUNT_OR_ZERO),
        Option("--sensitivity", "output.sensitivity", "rank quantizers by their effect on the logits: with only one "
               "enabled, and with only one disabled", FLAG),
        Option("--sensitivity-images", "output.sensitivity_images", "calibration images for --sensitivity", COUNT),
        Option("--save-predictions", "output.save_predictions", "write predictions as PNGs of label ids", FOLDER),
        Option("--export", "output.export", "write ONNX files, encodings and a manifest for device runtimes", FOLDER),
        Option("--execute", "output.execute", "add a backend: the exported file on ONNX Runtime's integer kernels "
               "(default: on in the demo)", SWITCH),
        Option("--force", "output.force", "write into folders that hold other files", FLAG),
        Option("--baseline", "output.baseline", "compare every backend with that of an earlier run on the same images, "
               "whose --output-dir was DIR", FOLDER),
        Option("--fail-under", "output.fail_under", "exit with status 1 if an INT8 backend's mIoU drop, or any "
               "backend's mIoU drop against --baseline, exceeds DROP percentage points",
               {"type": percentage_points, "metavar": "DROP"}),
    ),
}  # fmt: skip
FLAGS = {option.target: option.flag for option in itertools.chain(*OPTIONS.values())}


def option_values(config: Config) -> dict[str, Any]:
    """Return the value of every option, keyed by its name with underscores; paths and lists of names as text."""
    return {
        flag.removeprefix("--").replace("-", "_"): plain_value(lookup(config, target)) for target, flag in FLAGS.items()
    }


def plain_value(value: Any) -> Any:
    """Return the value of an option as JSON can hold it: a path, a size or a list of names as text."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return "x".join(map(str, value)) if isinstance(next(iter(value), ""), int) else " ".join(value) or None
    return value


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Parse the command line (`sys.argv` if None) into a Config.

    Raises:
        UserError: If an option is wrong, lacks another one or contradicts it.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        close = difflib.get_close_matches(name, parser.flags(), 1)
        parser.error(f"{name}: there is no such option. {f'Did you mean {close[0]}?' if close else 'See --help.'}")
    given = vars(namespace)
    config = _build_config(given, shlex.join(["python", PROGRAM, *argv]))
    if not config.lists:
        _check_combinations(set(given), config)
        _check_recovery(config)
        _check_images(config)
        if config.output.export or config.output.execute or config.npu.chips:
            check_bit_widths(config.quantization.param_bw, config.quantization.output_bw)
    return config


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing the usage and exiting, also if its help can't be printed."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def flags(self) -> list[str]:
        """Return the names of all options."""
        return [flag for action in self._actions for flag in action.option_strings]

    def print_help(self, file: object = None) -> None:
        print_lines(self.format_help().rstrip())


def _build_parser() -> _Parser:
    """Return a parser whose namespace holds only the options that were given, by their target in Config."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [--demo | --dataset-path DIR] [option ...]",
        description="Measure what quantization does to an FFNet: its mIoU in FP32 and in INT8.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    for title, group in OPTIONS.items():
        add = parser.add_argument_group(title).add_argument
        for option in group:
            add(option.flag, *option.aliases, dest=option.target, help=option.full_help(), **option.settings)
    return parser


def _build_config(given: Mapping[str, Any], command: str) -> Config:
    """Return the Config of the given options, with the defaults that depend on other options or the environment."""
    defaults: dict[str, Any] = {}
    if given.get("data.demo"):
        defaults = {"model.names": [DEMO_VARIANTS[:1]], "output.execute": "model.onnx" not in given}
    elif os.environ.get(DATASET_VARIABLE) and given.get("data.dataset", "cityscapes").startswith("cityscapes"):
        defaults = {"data.dataset_path": Path(os.environ[DATASET_VARIABLE])}
    config = Config(command=command)
    for target, value in (defaults | dict(given)).items():
        if target == "model.names" and MODEL_GROUPS["ai-hub"] in value:
            config = replace(config, input_sizes=AI_HUB_INPUT_SIZES)
        if target in ("model.names", "npu.chips"):  # a tuple for each name that was given
            value = tuple(dict.fromkeys(itertools.chain(*value))) or (DEFAULT_CHIP,)
        section, _, name = target.rpartition(".")
        if section:
            name, value = section, replace(getattr(config, section), **{name: value})
        config = replace(config, **{name: value})
    if config.model.onnx:
        asked = tuple(target for target in BIT_WIDTHS if target in given and config.quantization.encodings)
        calibrates = "data.calibration_split" in given and config.quantization.encodings is None
        config = replace(config, calibrates_onnx=calibrates, asked_bits=asked)
    return config


def _check_combinations(given: set[str], config: Config) -> None:
    """Raise UserError if one of the given options would be ignored."""
    requested = given if config.output.execute else given - {"output.execute"}  # --no-execute excludes nothing
    for target in NEEDS_CHECKPOINT:
        if config.model.onnx and target in requested:
            raise UserError(
                f"{FLAGS[target]} cannot be combined with --onnx, which evaluates files and no checkpoint. Remove it."
            )
    _check_onnx(given, config)
    if config.model.onnx and config.use_cuda:
        raise UserError("--use-cuda cannot be combined with --onnx, which runs on the CPU. Remove it.")
    for target, required in REQUIRES.items():
        if target in given and not any(_is_set(config, name) for name in required):
            flags = " or ".join(FLAGS[name] for name in required)
            raise UserError(f"{FLAGS[target]} has no effect without {flags}. Add that option, or remove this one.")
    answered = [target for target in ANSWERED_BY_ENCODINGS if target in given - set(config.asked_bits)]
    if config.output.sensitivity:  # it still takes calibration images
        answered = [target for target in answered if not target.startswith("data.")]
    if config.quantization.encodings and not config.quantization.partial_encodings and answered:
        raise UserError(
            f"{FLAGS[answered[0]]} cannot be combined with --encodings, which already determine it. Remove it, or add "
            "--partial-encodings."
        )


def _check_onnx(given: set[str], config: Config) -> None:
    """Raise UserError if an option about quantization has no effect on the ONNX file."""
    if not config.model.onnx or config.calibrates_onnx:
        return
    wrong: Sequence[str] = NEEDS_QUANTIZATION
    where = "alone. Remove it, or add --encodings, or --calibration-split for aimet-onnx"
    if config.quantization.encodings:
        wrong, where = ("data.calibration_split", *CALIBRATION), "and --encodings. Remove it"
    allowed = ("output.fail_under",) if config.output.baseline else ()
    if target := next((target for target in wrong if target in given and target not in allowed), None):
        raise UserError(f"{FLAGS[target]} has no effect with --onnx {where}.")


def _is_set(config: Config, target: str) -> bool:
    """Return whether an option has a value other than None, False and (); 0 is a value."""
    return not any(lookup(config, target) is unset for unset in (None, False, ()))


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
    for target in ("data.dataset_path", "data.dataset", "data.classes"):
        if config.data.demo and lookup(config, target) != lookup(Config(), target):
            flag = FLAGS[target]
            raise UserError(f"--demo renders its own images and cannot be combined with {flag}. Remove one of them.")
    others = [name for name in config.model.names if name not in DEMO_VARIANTS]
    if config.data.demo and not config.model.onnx and others:
        names = " and ".join(DEMO_VARIANTS)
        raise UserError(f"--model-name {others[0]}: --demo has weights for {names} only. Name one of these or both.")
    if not config.data.demo and config.data.dataset_path is None:
        raise UserError(
            f"--dataset-path is missing. Give the folder that holds the data set, or set {DATASET_VARIABLE} to that of "
            "Cityscapes; --demo needs neither."
        )


def check_bit_widths(param_bw: int, output_bw: int, remedy: str = EXPORT_REMEDY) -> None:
    """Raise a UserError unless ONNX Runtime can run weights and activations of these bit widths.

    `remedy` names the alternative to other bit widths.
    """
    for what, bits, supported in (("param", param_bw, PARAM_BIT_WIDTHS), ("output", output_bw, OUTPUT_BIT_WIDTHS)):
        if bits not in supported:
            raise UserError(
                f"--default-{what}-bw: {bits} bits are not among the bit widths of ONNX Runtime's kernels "
                f"({', '.join(map(str, supported))}). Use one of these, or {remedy}."
            )
    if param_bw == output_bw == 16:
        raise UserError(
            "--default-param-bw and --default-output-bw: ONNX Runtime's int32 biases overflow if both are 16 bits. Use "
            "8 for one of them."
        )
