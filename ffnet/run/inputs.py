"""Open what a run needs: the device, the images, the encodings and the checkpoint."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from datasets import DatasetError
from datasets.cityscapes import CityscapesSplit
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir, download_published
from ffnet.checkpoints.loading import Checkpoint, InvalidCheckpointError, load_checkpoint
from ffnet.checkpoints.loading import find_checkpoints as find_in_folder
from ffnet.config import Config, DataConfig, Runtime
from ffnet.evaluation.loading import Sample, evenly_spaced
from ffnet.quantization.encodings_file import EncodingsFile, read_encodings
from ffnet.quantization.quantsim import check_config_file, check_finite_logits
from ffnet.system.errors import UserError
from ffnet.system.memory import memory_bytes
from ffnet.system.text import count
from ffnet.variants import VARIANTS, Variant

MOST_KEPT = 2**32  # bytes of decoded images and labels: all 500 of Cityscapes val
MOST_SELECTION_IMAGES = 32  # unless --selection-images gives another number
DEMO_FOLDER = Path(__file__).parents[2] / "demo"


@dataclass(frozen=True)
class Inputs:
    """The data of a run, its file names and headers checked."""

    images: CityscapesSplit  # that are scored
    calibration_images: CityscapesSplit | Subset[Sample] | None  # None if nothing needs them
    selection_images: Subset[Sample] | None  # on which recovery measures its steps; None without recovery
    encodings: EncodingsFile | None


def select_device(config: Runtime) -> torch.device:
    """Return the device to run on, and set whether it may use TF32.

    Raises:
        UserError: if a GPU is required and torch finds none, or if TF32 is allowed on a CPU.
    """
    available = torch.cuda.is_available()
    if config.use_cuda and not available:
        raise UserError("--use-cuda: torch finds no CUDA device. Remove the option, or give --use-cuda false.")
    device = torch.device("cuda" if available and config.use_cuda is not False else "cpu")
    if device.type == "cpu" and config.allow_tf32:
        raise UserError("--allow-tf32 has an effect on GPUs only. Remove it.")
    allow_tf32(config.allow_tf32)
    return device


def allow_tf32(allowed: bool) -> None:
    """Set whether a GPU may compute FP32 convolutions and matrix products in TF32.

    This is the older of torch's two interfaces: torch.compile reads it, which fails once the newer one was used.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def open_inputs(config: Config) -> Inputs:
    """Open encodings, scored images and calibration images.

    Raises:
        UserError: if AIMET refuses the configuration file, or if the encodings or options are wrong.
        DatasetError: if an image or label is missing or wrong.
    """
    quantization = config.quantization
    if quantization.config_file != "default":
        check_config_file(quantization.config_file)
    encodings = read_encodings(quantization.encodings) if quantization.encodings else None
    images = open_images(config)
    calibration: CityscapesSplit | Subset[Sample] | None = None
    selection: Subset[Sample] | None = None
    if encodings is None or quantization.partial_encodings or config.output.sensitivity:
        split = images
        if config.data.calibration_split != config.data.split:
            split = CityscapesSplit(images.root, config.data.calibration_split)
        chosen = selection_indices(len(split), config.data) if quantization.recovers else []
        selection = Subset(split, chosen) if chosen else None
        calibration = _calibration_images(split, chosen, config.data)
    return Inputs(images, calibration, selection, encodings)


def keep_decoded(inputs: Inputs) -> None:
    """Have images that are read several times decoded once, as far as the memory allows.

    A GPU runs the networks in less time than decoding takes. Calibration reads the images of its split once for each
    model, and scoring reads those of its split once for each group of models.
    """
    calibration = inputs.calibration_images
    splits = [inputs.images, calibration.dataset if isinstance(calibration, Subset) else calibration]
    found = {id(split): split for split in splits if isinstance(split, CityscapesSplit)}
    for split in found.values():
        split.keep_decoded(kept_bytes() // len(found))


def kept_bytes() -> int:
    """Return how many bytes of decoded images a process keeps: MOST_KEPT, and at most an eighth of its memory."""
    return min(MOST_KEPT, memory_bytes() // 8 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def selection_indices(number: int, data: DataConfig) -> list[int]:
    """Return the indices of the images, of `number`, that recovery measures its steps on, spread evenly.

    Without `data.selection_images` it is a third of the images, at most MOST_SELECTION_IMAGES.
    """
    wanted = data.selection_images or min(max(number // 3, 1), MOST_SELECTION_IMAGES)
    if wanted >= number:
        raise UserError(
            f"--selection-images: {wanted} of the {count(number, 'image')} of the {data.calibration_split} split would "
            "be used to choose recovery steps, and calibration needs at least one other. Give a smaller number, or a "
            "split or --limit with more images."
        )
    return [int(index) for index in evenly_spaced(number, wanted)]


def open_images(config: Config) -> CityscapesSplit:
    """Open the images that are scored; in the demo, render them first if necessary."""
    data = config.data
    if data.dataset_path is not None:
        return CityscapesSplit(data.dataset_path, data.split, data.limit)
    cache_dir = config.model.cache_dir or default_cache_dir()
    try:
        scenes = ensure_scenes(cache_dir, not config.runtime.quiet)
    except OSError as error:
        raise UserError(
            f"{error.filename or cache_dir}: the demo's scenes can't be written there. Name another --cache-dir."
        ) from error
    try:
        return CityscapesSplit(scenes, data.split, data.limit)
    except DatasetError as error:
        raise DatasetError(f"{error} Or delete {scenes}, so that the demo renders its scenes again.") from error


def ignored_files_notes(
    images: CityscapesSplit, calibration: CityscapesSplit | Subset[Sample] | None = None
) -> list[str]:
    """Return a note on the files in the folders of both splits that were ignored; none if there were none."""
    splits = [images, calibration.dataset if isinstance(calibration, Subset) else calibration]
    number = len(set().union(*(split.ignored for split in splits if isinstance(split, CityscapesSplit))))
    verb = "was" if number == 1 else "were"
    return [f"{count(number, 'hidden or operating-system file')} in the dataset folder {verb} ignored."] * bool(number)


def _calibration_images(
    split: CityscapesSplit, reserved: Sequence[int], data: DataConfig
) -> CityscapesSplit | Subset[Sample]:
    """Return the calibration images in sorted order: all that are not reserved, or the requested number at random."""
    number = data.calibration_images
    if number is None and not reserved:
        return split
    available = np.setdiff1d(np.arange(len(split)), reserved)
    if number is None:
        return Subset(split, available.tolist())
    if number > len(available):
        apart = f", apart from {len(reserved)} for the choice of recovery steps" if reserved else ""
        raise UserError(
            f"--calibration-images {number}: the {data.calibration_split} split has only "
            f"{count(len(available), 'image')}{apart}. Give a smaller number."
        )
    drawn = np.random.default_rng(data.seed).choice(available, number, replace=False)
    return Subset(split, sorted(drawn.tolist()))


def find_checkpoints(config: Config) -> tuple[dict[str, Path], list[str]]:
    """Return the file of each model's weights, and notes on what else a folder holds.

    They are the given ones, the demo's, or the published ones, which are downloaded on first use.

    Raises:
        InvalidCheckpointError: if a model has no file.
    """
    names, given = config.model.names, config.model.checkpoint
    if given is None:
        return {name: _own_checkpoint(VARIANTS[name], config) for name in names}, []
    if given.is_dir():
        found = find_in_folder(given, names)
        return found.paths, list(found.notes)
    return dict.fromkeys(names, given), []


def _own_checkpoint(variant: Variant, config: Config) -> Path:
    """Return the demo's file of a variant, or the published one."""
    if variant.is_demo:
        return DEMO_FOLDER / f"{variant.name}.pth"
    return download_published(variant, config.model.cache_dir or default_cache_dir())


def check_checkpoints(paths: Mapping[str, Path]) -> None:
    """Load every model's file once, one at a time.

    Raises:
        InvalidCheckpointError: if some of them are unfit; it names all of these.
    """
    problems = []
    for name, path in paths.items():
        try:
            load_model(name, path)
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InvalidCheckpointError(" ".join(problems))


def load_model(name: str, path: Path) -> Checkpoint:
    """Load the network of a variant with the weights of a file.

    Raises:
        UserError: if they don't match, or if the network computes infinite or NaN logits with them.
    """
    checkpoint = load_checkpoint(VARIANTS[name], path)
    check_finite_logits(checkpoint.model, path)
    return checkpoint
