"""What the options choose: the device, the recipe, the images, the network, and where predictions go."""

import os
import sys
from pathlib import Path

from ffnet.errors import UserError
from ffnet.variants import VARIANTS

DEMO_FOLDER = Path(__file__).parent / "demo"


def choose_device(args):
    """The torch.device to run on; UserError where a GPU was asked for and there is none."""
    import torch

    found = torch.cuda.is_available()
    if args.use_cuda and not found:
        raise UserError("--use-cuda: torch finds no CUDA device; leave the option out, or give --use-cuda false")
    if args.use_cuda is None and not found and not args.quiet and os.environ.get("RANK", "0") == "0":
        print("No CUDA device found: running on the CPU.", file=sys.stderr)
    device = torch.device("cuda" if found and args.use_cuda is not False else "cpu")
    if device.type == "cpu" and args.allow_tf32:
        raise UserError("--allow-tf32 is for GPUs: leave it out on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return device


def choose_recipe(args):
    """How to quantize; UserError where AIMET takes no such configuration file."""
    from ffnet import quantize

    if args.config_file != "default":
        quantize.check_config_file(args.config_file)
    return quantize.Recipe(args.default_param_bw, args.default_output_bw, args.quant_scheme, args.config_file, args.cle)


def open_images(args):
    """The images to score and those to calibrate on (None where nothing needs them), all files of both checked."""
    from datasets.cityscapes import CityscapesSplit
    from datasets.streetscenes import ensure_scenes
    from ffnet.cache import default_cache_dir

    root = args.dataset_path
    if args.demo:
        try:
            root = ensure_scenes(args.cache_dir or default_cache_dir(), not args.quiet)
        except OSError as error:
            place = error.filename or args.cache_dir
            raise UserError(f"{place}: no scenes can be written there; name another --cache-dir") from error
    images = CityscapesSplit(root, args.split, args.limit)
    if args.onnx or (args.encodings and not args.partial_encodings and not args.sensitivity):
        return images, None
    same = args.calibration_split == args.split
    return images, draw(images if same else CityscapesSplit(root, args.calibration_split), args)


def draw(images, args):
    """`--calibration-images` of the images, drawn by `--seed` and sorted; all of them where it is left out."""
    import numpy as np
    from torch.utils.data import Subset

    count = args.calibration_images
    if count is None:
        return images
    if count > len(images):
        raise UserError(f"--calibration-images {count}: only {len(images)} images to draw from; give at most so many")
    chosen = np.random.default_rng(args.seed).choice(len(images), count, replace=False)
    return Subset(images, sorted(chosen.tolist()))


def check_outputs(args, images, me=None):
    """Makes the folders for results and tells, before the work, which can't be used."""
    from ffnet import output, predictions

    if me and not me.is_first:
        return
    if args.output_dir:
        output.check_folder("--output-dir", args.output_dir, args.force)
    if args.save_predictions:
        room = output.MEGABYTES + predictions.megabytes(images, saved_passes(args))
        output.check_folder("--save-predictions", args.save_predictions, args.force, room)


def load_model(args):
    """The network with its weights; a checkpoint that isn't given is the demo's or the published one."""
    from ffnet import cache, checkpoint

    variant = VARIANTS[args.model_name]
    path = args.checkpoint
    if path is None and variant.is_demo:
        path = DEMO_FOLDER / f"{variant.name}.pth"
    if path is None:
        path = cache.fetch(variant, args.cache_dir or cache.default_cache_dir())
    return checkpoint.load_model(variant, path)


def saved_passes(args):
    """The passes of which `--save-predictions` keeps the predictions."""
    return ("ONNX",) if args.onnx else ("INT8",)


def prediction_writer(args, images, me=None):
    """A function for the sweep that keeps the predictions of each image, or None."""
    from ffnet import predictions

    if not args.save_predictions:
        return None
    write = predictions.prediction_writer(args.save_predictions, images.images, saved_passes(args))
    first, step = (me.rank, me.world) if me else (0, 1)
    return lambda index, predicted: write(first + index * step, predicted)
