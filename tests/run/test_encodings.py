"""The sentences about calibration and quantization, against cases worked by hand."""

import dataclasses
from pathlib import Path

from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import Config, DataConfig, QuantizationConfig
from ffnet.quantization.encodings import LoadedEncodings
from ffnet.results.result import Calibration
from ffnet.run.encodings import describe_encodings, quantization_notes

CHECKPOINT = Checkpoint(None, "state_dict", equalized=False, sha256="0" * 64, path=Path("a.pth"))
CALIBRATION = Calibration(4, "Calibrated on 4 images.")
FROM_FILE = Config(quantization=QuantizationConfig(encodings=Path("a.encodings")))
ON_VAL = (
    "of the split that is scored, as the published results were; with --calibration-split train no calibration image "
    "is scored."
)
OF_FILE = "Encodings, bit widths and symmetry are those of a.encodings."


def test_a_calibration_on_the_scored_split_says_so():
    assert describe_encodings(Config(), 4, None) == f"Calibrated on 4 images {ON_VAL}"
    assert describe_encodings(Config(), 1, None) == f"Calibrated on 1 image {ON_VAL}"


def test_a_calibration_on_another_split_says_that_none_of_its_images_is_scored():
    config = Config(data=DataConfig(calibration_split="train"))
    assert describe_encodings(config, 3, None) == "Calibrated on 3 images of the train split; none of them is scored."


def test_encodings_of_a_file_that_covers_all_quantizers_are_not_called_calibrated():
    assert describe_encodings(FROM_FILE, 0, LoadedEncodings((), (), ())) == OF_FILE


def test_quantizers_that_a_file_does_not_cover_are_named_and_calibrated():
    loaded = LoadedEncodings(("conv1 weight",), ("x", "y"), ("relu output",))
    assert describe_encodings(FROM_FILE, 4, loaded) == (
        f"{OF_FILE} Quantizers that the file does not cover (1): conv1 weight. "
        "Entries that belong to no quantizer and were ignored (2): x, y. "
        "Quantizers that AIMET 2 shares and the file gives separate encodings (1): relu output. "
        f"Calibrated on 4 images {ON_VAL}"
    )


def test_a_prefix_that_was_removed_from_the_names_in_a_file_is_said():
    loaded = LoadedEncodings((), (), (), "module.model.")
    removed = "The prefix 'module.model.', which a wrapper adds, was removed from its names."
    assert describe_encodings(FROM_FILE, 0, loaded) == f"{OF_FILE} {removed}"


def test_of_many_names_the_first_eight_are_listed():
    described = describe_encodings(FROM_FILE, 0, LoadedEncodings((), tuple("abcdefghi"), ()))
    assert described.endswith(" were ignored (9): a, b, c, d, e, f, g, h and 1 more.")


def test_the_notes_say_how_the_network_was_quantized():
    without_cle = Config(quantization=QuantizationConfig(cle=False))
    equalized = dataclasses.replace(CHECKPOINT, equalized=True)
    already = "The checkpoint is already equalized, so cross-layer equalization was not applied again."
    assert quantization_notes(Config(), CHECKPOINT, {}, CALIBRATION) == ["Calibrated on 4 images."]
    assert quantization_notes(without_cle, CHECKPOINT, {"stem.conv1": 2, "head": 1}, CALIBRATION) == [
        "Cross-layer equalization was not applied.",
        "Weight scales were raised so that biases fit into int32: stem.conv1, head.",
        "Calibrated on 4 images.",
    ]
    changed = dataclasses.replace(CHECKPOINT, notes=("Removed.",))
    assert quantization_notes(Config(), changed, {}, CALIBRATION) == ["Removed.", "Calibrated on 4 images."]
    for config in (Config(), without_cle):
        assert quantization_notes(config, equalized, {}, CALIBRATION) == [already, "Calibrated on 4 images."]
