"""What can be asked of ffnet_quanteval.py: its options, and every mistake in them that needs nothing heavy to see."""

import argparse
import itertools
import os
from pathlib import Path

from ffnet.errors import UserError
from ffnet.variants import DEMO_VARIANTS, VARIANTS, closest_names

SCHEMES = ("tf_enhanced", "tf")  # AIMET's names; tf takes the least and largest value
DEFAULT_MODEL = "segmentation_ffnet78S_dBBB_mobile"
# Options that mean nothing beside --onnx, which scores one file as it is, on the CPU.
NEEDS_NETWORK = (
    "model_name", "checkpoint", "default_param_bw", "default_output_bw", "quant_scheme", "cle", "config_file",
    "calibration_split", "calibration_images", "encodings", "partial_encodings", "allow_tf32", "compile", "worst",
    "sensitivity", "sensitivity_images", "export", "execute", "fail_under",
)  # fmt: skip
NEEDS = {"partial_encodings": "encodings", "sensitivity_images": "sensitivity", "worst": "output_dir"}
# Options that mean nothing beside --encodings, which say all of that.
CALIBRATES = ("calibration_split", "calibration_images", "quant_scheme", "default_param_bw", "default_output_bw")
BOTH = argparse.BooleanOptionalAction  # --option and --no-option
FOLDERS = ("output_dir", "save_predictions", "export")


class Parser(argparse.ArgumentParser):
    """Mistakes are UserErrors: one line, without the usage."""

    def error(self, message):
        raise UserError(message)


def parse_args(argv):
    """The command line; UserError for what can be told wrong without importing anything heavy."""
    parser = Parser(
        prog="ffnet_quanteval.py",
        usage="%(prog)s [--demo | --dataset-path DIR] [option ...]",
        description="Tells what quantization does to an FFNet: its mIoU on Cityscapes in FP32 and in INT8.",
        allow_abbrev=False,
    )
    add_options(parser)
    args = parser.parse_args(argv)
    if not args.list_models:
        check_lonely({name for name in vars(args) if getattr(args, name) != parser.get_default(name)}, args)
        fill_defaults(args)
        check(args)
    return args


def add_options(parser):
    """Every option, in the groups that --help shows."""
    groups = {
        "model": add_model_options,
        "images": add_image_options,
        "quantization; the defaults are the published recipe": add_recipe_options,
        "run": add_run_options,
        "results": add_result_options,
    }
    for title, add_group in groups.items():
        add_group(parser.add_argument_group(title).add_argument)


def add_model_options(add):
    add("--model-name", "--model-config", type=model_name, metavar="NAME", help=f"default {DEFAULT_MODEL}")
    add("--list-models", action="store_true", help="the 66 variants with sizes and published figures, and nothing else")
    add("--checkpoint", type=path, metavar="FILE", help="default: the published file, downloaded once")
    add("--cache-dir", type=path, metavar="DIR", help="for downloads and rendered scenes; default TORCH_HOME's")
    add("--onnx", type=path, metavar="FILE", help="score an exported FFNet in place of a checkpoint")


def add_image_options(add):
    add("--demo", action="store_true", help="rendered street scenes and a small FFNet: needs nothing else")
    add("--dataset-path", type=path, metavar="DIR", help="has leftImg8bit and gtFine; default $CITYSCAPES_DATASET")
    add("--split", choices=("val", "train"), default="val", help="default %(default)s")
    add("--limit", type=at_least(1), metavar="N", help="of --split, use the first N images only")


def add_recipe_options(add):
    add("--default-param-bw", type=bitwidth, default=8, metavar="BITS", help="of weights, default %(default)s")
    add("--default-output-bw", type=bitwidth, default=8, metavar="BITS", help="of activations, default %(default)s")
    add("--quant-scheme", choices=SCHEMES, default=SCHEMES[0], help="default %(default)s")
    add("--cle", action=BOTH, default=True, help="cross-layer equalization, default on")
    add(
        "--config-file",
        type=filled,
        default="default",
        metavar="FILE",
        help="AIMET's configuration, default its per-channel one",
    )
    add("--calibration-split", choices=("val", "train"), default="val", help="default val, as published")
    add("--calibration-images", type=at_least(1), metavar="N", help="drawn by --seed; default all, as published")
    add("--encodings", type=path, metavar="FILE", help="AIMET encodings in place of calibration")
    add("--partial-encodings", action="store_true", help="calibrate what the file leaves out, ignore its surplus")


def add_run_options(add):
    add("--use-cuda", type=boolean, nargs="?", const=True, metavar="BOOL", help="default: true where there is a GPU")
    add("--allow-tf32", action="store_true", help="FP32 on a GPU with TF32's ten bits of mantissa: faster")
    add("--compile", action=BOTH, help="torch.compile the passes; default: where the run is long enough")
    add("--batch-size", type=at_least(1, 4096), default=8, metavar="N", help="default %(default)s")
    add("--num-workers", type=at_least(0, 256), default=workers(), metavar="N", help="processes that decode images")
    add("--seed", type=at_least(0), default=0, metavar="N", help="default %(default)s")
    add("--quiet", action="store_true", help="no progress on stderr")


def add_result_options(add):
    add("--output-dir", type=path, metavar="DIR", help="for result.json, report.html and CSV files")
    add("--worst", type=at_least(0), default=6, metavar="N", help="images that lose most, in the report; default 6")
    add("--sensitivity", action="store_true", help="which layers cost the loss: every quantizer alone on and off")
    add("--sensitivity-images", type=at_least(1), default=8, metavar="N", help="default %(default)s")
    add("--save-predictions", type=path, metavar="DIR", help="labelId PNGs for Cityscapes' evaluation server")
    add("--export", type=path, metavar="DIR", help="ONNX files, encodings and manifest for a device's runtime")
    add(
        "--execute", action=BOTH, help="a third pass: ONNX Runtime's integer kernels on the export; default in the demo"
    )
    add("--force", action="store_true", help="write into folders that hold other files")
    add("--fail-under", type=points, metavar="DROP", help="exit status 1 if INT8 loses more than DROP points of mIoU")


def workers():
    """Processes that decode: a core each, up to four."""
    return min(4, os.cpu_count() or 1)


def model_name(text):
    if text in VARIANTS:
        return text
    close = " or ".join(closest_names(text)) or DEFAULT_MODEL
    raise argparse.ArgumentTypeError(f"{text!r} is no FFNet segmentation model; did you mean {close}?")


def boolean(text):
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false; take one of {', '.join(words)}")
    return words[text.lower()]


def at_least(least, most=10**9):
    """An argparse type: whole numbers from `least` to `most`."""

    def number(text):
        if not (text.isascii() and text.isdecimal()) or len(text) > len(str(most)) or not least <= int(text) <= most:
            bounds = f"of at least {least}" if most == 10**9 else f"from {least} to {most}, at least {least}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number {bounds}")
        return int(text)

    return number


def filled(text):
    """An argparse type: text that is not empty and can be written as UTF-8."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no UTF-8, which not all libraries can open; rename it"
        ) from error
    return text


def path(text):
    return Path(filled(text))


def bitwidth(text):
    if not text.isdecimal() or len(text) > 2 or int(text) not in range(4, 17):  # float32 carries few bits more
        raise argparse.ArgumentTypeError(f"{text!r} is not a bit width that can be simulated, 4 to 16")
    return int(text)


def points(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of points, 0 to 100")
    return value


def fill_defaults(args):
    """Options whose default depends on others or on the environment."""
    if args.model_name is None and not args.onnx:
        args.model_name = DEMO_VARIANTS[0] if args.demo else DEFAULT_MODEL
    if args.dataset_path is None and not args.demo and os.environ.get("CITYSCAPES_DATASET"):
        args.dataset_path = Path(os.environ["CITYSCAPES_DATASET"])
    if args.execute is None:
        args.execute = args.demo and not args.onnx


def check_lonely(given, args):
    """UserError where an option of those `given` would be ignored."""
    beside = [name for name in NEEDS_NETWORK if name in given and (name != "execute" or args.execute)]
    if args.onnx and beside:
        raise UserError(f"--onnx scores one file as it is: leave out {flag(beside[0])}")
    if args.onnx and args.use_cuda:
        raise UserError("--onnx runs on the CPU: leave out --use-cuda")
    for name, needed in NEEDS.items():
        if name in given and not getattr(args, needed):
            raise UserError(f"{flag(name)} means nothing without {flag(needed)}; add that, or leave it out")
    unread = [name for name in CALIBRATES if name in given]
    if args.encodings and not args.partial_encodings and unread:
        raise UserError(f"{flag(unread[0])}: --encodings say it, unless --partial-encodings; leave it out")


def flag(name):
    return f"--{name.replace('_', '-')}"


def check(args):
    """UserError for combinations and paths that can't work."""
    check_images(args)
    for name in ("checkpoint", "encodings", "onnx"):
        place = getattr(args, name)
        if place and not place.is_file():
            reason = "is a folder; name a file in it" if place.is_dir() else "no such file"
            raise UserError(f"--{name} {place}: {reason}")
    check_apart({name: getattr(args, name).resolve() for name in FOLDERS if getattr(args, name)})
    if args.export or args.execute:
        from ffnet.export import check_bitwidths, check_folder

        check_bitwidths(args.default_param_bw, args.default_output_bw)
        if args.export:
            check_folder(args.export, args.force)


def check_apart(folders):
    """UserError where one of the folders for results is, or lies in, another one."""
    for one, other in itertools.permutations(folders, 2):
        if folders[one].is_relative_to(folders[other]):
            raise UserError(f"{flag(one)} {folders[one]}: lies in the folder of {flag(other)}; name one beside it")


def check_images(args):
    """UserError unless it is clear where the images come from."""
    if args.demo and args.dataset_path:
        raise UserError("--demo renders its own images: leave out --dataset-path, or leave out --demo")
    if args.demo and args.model_name not in (None, *DEMO_VARIANTS):
        raise UserError(f"--demo has weights for {' and '.join(DEMO_VARIANTS)} only, not for {args.model_name}")
    if not args.demo and args.dataset_path is None:
        raise UserError(
            "no images: give --dataset-path, the folder that holds leftImg8bit and gtFine, or set CITYSCAPES_DATASET "
            "to it; --demo needs neither"
        )
