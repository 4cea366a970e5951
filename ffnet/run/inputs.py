"""Open what a run needs: the device, the images, the encodings and the checkpoints."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from datasets import DatasetError, Split
from demo.streetscenes.scenes import ensure_scenes
from ffnet.checkpoints.download import default_cache_dir, download_published
from ffnet.checkpoints.loading import Checkpoint, InvalidCheckpointError, find_in_folder, load_checkpoint
from ffnet.config import Config, DataConfig, OutputConfig
from ffnet.evaluation.loading import decoding_threads, evenly_spaced
from ffnet.labels import LabelSet, read_label_set
from ffnet.options import FLAGS, lookup
from ffnet.quantization.encodings_file import read_encodings
from ffnet.quantization.quantsim import check_config_file, check_finite_logits
from ffnet.run.baseline import ScoredRun, open_baselines
from ffnet.run.ranks import Ranks
from ffnet.system.errors import UserError
from ffnet.system.files import create_output_folder, sha256_of
from ffnet.system.memory import memory_bytes
from ffnet.system.text import count, describe_size
from ffnet.variants import VARIANTS, Variant

MOST_DECODED = 2**32  # bytes of decoded images and labels in memory; all 500 of Cityscapes val fit
MOST_SELECTION_IMAGES = 64  # default of --selection-images, if the split has enough images
DEMO_FOLDER = Path(__file__).parents[2] / "demo"


@dataclass(frozen=True)
class Inputs:
    """The data of a run, with its file names and headers checked."""

    images: Split  # images that are scored
    calibration_images: Split | None  # None if nothing needs them
    selection_images: Split | None  # images on which recovery measures its steps; None without recovery
    notes: tuple[str, ...]  # sentences for the report
    digest: str  # digest of the images that are scored; "" if the run neither saves work nor has a baseline
    baselines: Mapping[str, ScoredRun] = field(default_factory=dict)  # model -> run to compare with


def select_device(config: Config) -> str:
    """Return torch's name of the device to run on, and set whether it may use TF32.

    Raises:
        UserError: If a GPU is required and torch finds none, or if TF32 is allowed on a CPU.
    """
    available = torch.cuda.is_available()
    if config.use_cuda and not available:
        raise UserError("--use-cuda: torch finds no CUDA device. Remove the option, or give --use-cuda false.")
    device = "cuda" if available and config.use_cuda is not False else "cpu"
    allowed = config.runtime.allow_tf32
    if device == "cpu" and allowed:
        raise UserError("--allow-tf32 has an effect on GPUs only. Remove it.")
    # The older of torch's two interfaces: torch.compile reads it, which fails once the newer one was used.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    return device


def open_inputs(config: Config, ranks: Ranks) -> Inputs:
    """Open encodings, scored images and calibration images, and create the output folders.

    Raises:
        UserError: If AIMET refuses the configuration file, or if encodings, options or output folders are wrong.
        DatasetError: If an image or label is missing or wrong.
    """
    inputs = ranks.main_first(_open_checked, config)
    digest, baselines = "", dict[str, ScoredRun]()
    if config.output.output_dir or config.output.save_predictions:
        ranks.once(_create_output_folders, config.output)
    if config.output.output_dir or config.output.baseline:
        digest = ranks.once(images_digest, inputs.images, decoding_threads(config.runtime))
    if config.output.baseline:
        baselines = ranks.once(open_baselines, config, inputs.images, digest)
    if ranks.device != "cpu":
        keep_decoded(inputs, config.data)
    return replace(inputs, digest=digest, baselines=baselines)


def _open_checked(config: Config) -> Inputs:
    quantization = config.quantization
    if quantization.config_file != "default":
        check_config_file(quantization.config_file)
    if quantization.encodings and not config.model.onnx:
        read_encodings(quantization.encodings)
    images = open_images(config)
    calibration = selection = None
    split = images
    if config.needs_calibration_images:
        if not config.data.scores_calibration_images:
            split = _open_split(images.root, config.data, config.data.calibration_split)
        chosen = selection_indices(len(split), config.data) if quantization.recovers else []
        selection = split.select(chosen) if chosen else None
        calibration = split.select(calibration_indices(len(split), chosen, config.data))
    check_one_size(config, images, ("output.export", "output.execute", "npu.chips"))
    check_one_size(config, calibration or images, ("quantization.seq_mse", "quantization.max_drop"))  # AIMET's SeqMSE
    return Inputs(images, calibration, selection, tuple(_ignored_files_notes(images, split)), digest="")


def open_images(config: Config) -> Split:
    """Open the images that are scored; in the demo, render them first if necessary."""
    data = config.data
    if data.dataset_path is not None:
        return _open_split(data.dataset_path, data, data.split, data.limit)
    cache_dir = config.model.cache_dir or default_cache_dir()
    try:
        scenes = ensure_scenes(cache_dir, not config.runtime.quiet)
    except OSError as error:
        raise UserError(
            f"{error.filename or cache_dir}: the demo's scenes can't be written there. Name another --cache-dir."
        ) from error
    try:
        return _open_split(scenes, data, data.split, data.limit)
    except DatasetError as error:
        raise DatasetError(f"{error} Or delete {scenes}, so that the demo renders its scenes again.") from error


def _open_split(root: Path, data: DataConfig, split: str, limit: int | None = None) -> Split:
    """Open one split of the data set whose layout, label set and input size `data` names."""
    label_set = read_label_set(data.classes) if data.classes else None
    return Split(data.dataset, root, split, limit, label_set, data.input_size)


def check_one_size(config: Config, images: Split, targets: Sequence[str]) -> None:
    """Raise a UserError if one of the options is set, which need images of one size, and the images differ in size."""
    flags = [FLAGS[target] for target in targets if lookup(config, target) not in (None, False, ())]
    if flags and images.size is None:
        sizes = " and ".join(sorted({describe_size(size) for size in images.sizes})[:2])
        raise UserError(
            f"{flags[0]} needs images of one size, and those in {images.root} differ ({sizes}). Add --input-size, "
            f"such as --input-size {describe_size(images.sizes[0])}."
        )


def check_classes(what: str, classes: int, label_set: LabelSet) -> None:
    """Raise a UserError if a network has another number of classes than the label set."""
    if classes != len(label_set.classes):
        raise UserError(
            f"{what}: this network has {classes} classes, and the label set {label_set.name!r} has "
            f"{len(label_set.classes)}. Name the network's label set with --classes, or another file."
        )


def selection_indices(number: int, data: DataConfig) -> list[int]:
    """Return which of `number` images recovery measures its steps on, spread evenly.

    Without `data.selection_images` it is a third of the images, at most MOST_SELECTION_IMAGES.
    """
    wanted = data.selection_images or min(max(number // 3, 1), MOST_SELECTION_IMAGES)
    if wanted >= number:
        raise UserError(
            f"--selection-images: {wanted} of the {count(number, 'image')} of the {data.calibration_split} split would "
            "be used to choose recovery steps, and calibration needs at least one other. Give a smaller number, or a "
            "split or --limit with more images."
        )
    return evenly_spaced(number, wanted).tolist()


def calibration_indices(number: int, reserved: Sequence[int], data: DataConfig) -> list[int]:
    """Return which of `number` images are used for calibration, sorted: all not reserved, or some at random."""
    available = np.setdiff1d(np.arange(number), reserved)
    wanted = data.calibration_images
    if wanted is None:
        return available.tolist()
    if wanted > len(available):
        apart = f", apart from {len(reserved)} for the choice of recovery steps" if reserved else ""
        raise UserError(
            f"--calibration-images {wanted}: the {data.calibration_split} split has only "
            f"{count(len(available), 'image')}{apart}. Give a smaller number."
        )
    return sorted(np.random.default_rng(data.seed).choice(available, wanted, replace=False).tolist())


def _ignored_files_notes(*splits: Split) -> list[str]:
    """Return a note on the files in the folders of the splits that were ignored; none if there were none."""
    number = len(set().union(*(split.ignored for split in splits)))
    verb = "was" if number == 1 else "were"
    return [f"{count(number, 'hidden or operating-system file')} in the dataset folder {verb} ignored."] * bool(number)


def keep_decoded(inputs: Inputs, data: DataConfig) -> None:
    """Decode images only once, as far as memory allows, because a GPU runs the networks faster than they are decoded.

    Decoded images take at most MOST_DECODED bytes and an eighth of the memory.
    """
    most = min(MOST_DECODED, memory_bytes() // 8 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    splits = 1 if data.scores_calibration_images else 2
    for images in filter(None, (inputs.images, inputs.calibration_images)):
        images.keep_decoded(most // splits)


def images_digest(images: Split, threads: int) -> str:
    """Return a sha256 of the names and contents of all images and labels, and of the label set."""
    paths = [Path(path) for path in (*images.images, *images.targets)]
    with ThreadPoolExecutor(max(1, threads)) as executor:
        lines = executor.map(lambda path: f"{sha256_of(path)} {path.name}\n", paths)
        return hashlib.sha256("".join((*lines, repr(images.label_set))).encode("utf-8", "surrogateescape")).hexdigest()


def _create_output_folders(output: OutputConfig) -> None:
    """Create the folders for results, and check that they can be written to."""
    if output.output_dir:
        create_output_folder("--output-dir", output.output_dir)
    if output.save_predictions:
        create_output_folder("--save-predictions", output.save_predictions)


def find_checkpoints(config: Config) -> tuple[dict[str, Path], list[str]]:
    """Return the file of each model's weights, and notes on the other files in a folder.

    The files are those given, the demo's, or the published ones, which are downloaded on first use.

    Raises:
        InvalidCheckpointError: If a model has no file.
    """
    names, given = config.model.names, config.model.checkpoint
    if given is None:
        return {name: _own_checkpoint(VARIANTS[name], config) for name in names}, []
    if given.is_dir():
        return find_in_folder(given, names)
    return dict.fromkeys(names, given), []


def _own_checkpoint(variant: Variant, config: Config) -> Path:
    """Return the demo's file of a variant, or the published one."""
    if variant.is_demo:
        return DEMO_FOLDER / f"{variant.name}.pth"
    return download_published(variant, config.model.cache_dir or default_cache_dir(), config.runtime.quiet)


def check_checkpoints(paths: Mapping[str, Path], label_set: LabelSet) -> None:
    """Load every model's file once, one at a time.

    Raises:
        InvalidCheckpointError: If some can't be used; the message names all of them.
    """
    problems = []
    for name, path in paths.items():
        try:
            load_model(name, path, label_set)
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InvalidCheckpointError(" ".join(problems))


def load_model(name: str, path: Path, label_set: LabelSet) -> Checkpoint:
    """Load the network of a variant with the weights of a file.

    Raises:
        UserError: If they don't match, if the label set has another number of classes, or if the network computes
            infinite or NaN logits.
    """
    checkpoint = load_checkpoint(VARIANTS[name], path)
    check_classes(str(path), checkpoint.classes, label_set)
    check_finite_logits(checkpoint.model, path)
    return checkpoint
