"""Checks before the work: input files, output folders and packages, found without importing torch."""

import importlib.util
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path

from datasets import Split, find_label_set, find_layout
from ffnet.chips import check_npu_package
from ffnet.config import (
    COMPARISON_FILES,
    EXPORT_FILES,
    NPU_FOLDER,
    OUTPUT_FOLDERS,
    PROGRESS_FOLDER,
    RESULT_FILES,
    Config,
    DataConfig,
)
from ffnet.labels import LabelSet
from ffnet.options import FLAGS, lookup
from ffnet.run.earlier import baseline_run, finished_run
from ffnet.run.predictions import PREDICTION_FOLDERS
from ffnet.system.errors import UserError
from ffnet.system.files import check_output_folder, check_plain_file
from ffnet.variants import VARIANTS

INPUT_FILES = ("quantization.encodings", "quantization.config_file", "model.onnx", "data.classes")


def check(config: Config) -> None:
    """Raise a UserError if an input file is missing, an output folder can't be used or a package is not installed."""
    _check_input_files(config)
    label_set = _check_images(config.data, config.needs_calibration_images)
    _check_nesting(_output_folders(config))
    _check_output_folders(config)
    if config.output.baseline:
        _check_baseline(config, label_set)
    if config.npu.chips:
        check_npu_package()
    if config.calibrates_onnx and not importlib.util.find_spec("aimet_onnx"):
        raise UserError(
            "--calibration-split: aimet-onnx, which quantizes the file of --onnx, is not installed. Install it with "
            "`pip install -r requirements-aimet-onnx.txt`, or give --encodings."
        )


def _check_images(data: DataConfig, calibrates: bool) -> LabelSet:
    """Check the names and headers of the files of every split that is read, and return the label set."""
    label_set = find_label_set(find_layout(data.dataset), data.dataset_path or Path(), data.classes)
    if data.dataset_path:
        Split(data.dataset, data.dataset_path, data.split, data.limit, label_set)
        if calibrates and not data.scores_calibration_images:
            Split(data.dataset, data.dataset_path, data.calibration_split, label_set=label_set)
    return label_set


def _check_input_files(config: Config) -> None:
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
        raise UserError("--encodings belongs to one model, and --model-name has several. Name one model.")
    for target in INPUT_FILES:
        path = lookup(config, target)
        if path in (None, "default"):
            continue
        try:
            check_plain_file(path)
        except OSError as error:
            raise UserError(f"{FLAGS[target]} {path}: {error.strerror}. Name a file.") from error
        if isinstance(path, Path) and not path.exists():  # a configuration may also be an alias that AIMET knows
            raise UserError(f"{FLAGS[target]} {path}: there is no such file. Check the path.")


def _check_baseline(config: Config, label_set: LabelSet) -> None:
    """Raise a UserError unless --baseline holds a finished run of each model with the same classes."""
    _check_nesting(_output_folders(config) | {"output.baseline": config.output.baseline or Path()})
    for name in config.model.names:
        run = baseline_run(config.for_model(name))
        if list(run.classes) != list(label_set.names):
            raise UserError(
                f"--baseline {config.output.baseline}: that run has the label set {run.label_set!r} with other classes "
                f"than {label_set.name!r}. Name a run with the same --dataset and --classes."
            )


def _check_nesting(folders: Mapping[str, Path]) -> None:
    """Raise a UserError if the folder of one option is inside that of another."""
    for one, other in itertools.permutations(folders, 2):
        if folders[one].resolve().is_relative_to(folders[other].resolve()):
            raise UserError(
                f"{FLAGS[one]} {folders[one]}: this is inside the folder of {FLAGS[other]}. Name a folder beside it."
            )


def _output_folders(config: Config) -> dict[str, Path]:
    """Return the folder of every option that names one, by its target."""
    folders = {f"output.{name}": getattr(config.output, name) for name in OUTPUT_FOLDERS}
    return {target: folder for target, folder in folders.items() if folder}


def _check_output_folders(config: Config) -> None:
    """Raise UserError if the folders, or those of each model in them, hold other files than an earlier run's own."""
    resume, names = config.output.resume or _is_repeated(config), config.model.names
    exported = (*EXPORT_FILES, NPU_FOLDER)
    of_one_model: dict[str, Collection[str]] = {"output.export": exported}
    of_several: dict[str, Collection[str]] = {"output.export": VARIANTS}
    if resume:
        of_one_model["output.output_dir"] = (*RESULT_FILES, PROGRESS_FOLDER)
        of_one_model["output.save_predictions"] = PREDICTION_FOLDERS
        of_several["output.output_dir"] = (*VARIANTS, *COMPARISON_FILES)
        of_several["output.save_predictions"] = VARIANTS
    checks = [(config, of_several)] if len(names) > 1 else []
    checks += [(config.for_model(name), of_one_model) for name in names]
    for checked, own_files in checks:
        for target, folder in _output_folders(checked).items():
            remedy = "Name a new folder"
            if not resume and target == "output.output_dir" and _holds_saved_work(config):
                remedy = "Add --resume to continue the run whose results it holds, name a new folder"
            check_output_folder(FLAGS[target], folder, own_files.get(target, ()), config.output.force, remedy)


def _is_repeated(config: Config) -> bool:
    """Return whether the output folder holds the complete results of the same command, which may be replaced."""
    models = [config.for_model(name) for name in config.model.names]
    return all((run := finished_run(each.output.output_dir)) and run.repeats(each) for each in models)


def _holds_saved_work(config: Config) -> bool:
    """Return whether the output folder holds what --resume may continue."""
    folders = [config.for_model(name).output.output_dir for name in config.model.names]
    return any(folder is not None and (folder / PROGRESS_FOLDER).is_dir() for folder in folders)
