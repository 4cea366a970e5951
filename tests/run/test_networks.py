"""The sentences about calibration and quantization, against cases worked by hand."""

from dataclasses import replace
from pathlib import Path

from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import Config, DataConfig, QuantizationConfig
from ffnet.quantization.encodings import LoadedEncodings
from ffnet.results.result import Calibration
from ffnet.run.networks import describe_encodings, quantization_notes

CHECKPOINT = Checkpoint(None, "state_dict", equalized=False, sha256="0" * 64, path=Path("a.pth"))
CALIBRATION = Calibration(4, 8, "Calibrated on 4 images.")
FROM_FILE = Config(quantization=QuantizationConfig(encodings=Path("a.encodings")))
ON_VAL = (
    "of the split that is scored, as the published results were; with --calibration-split train no calibration image "
    "is scored."
)
OF_FILE = "Encodings, bit widths and symmetry are those of a.encodings."


def test_the_calibration_set_is_described():
    assert describe_encodings(Config(), 1, None) == f"Calibrated on 1 image {ON_VAL}"
    config = Config(data=DataConfig(calibration_split="train"))
    assert describe_encodings(config, 3, None) == "Calibrated on 3 images of the train split; none of them is scored."


def test_encodings_of_a_file_that_covers_all_quantizers_are_not_called_calibrated():
    assert describe_encodings(FROM_FILE, 0, LoadedEncodings((), (), ())) == OF_FILE


def test_differences_between_a_file_and_the_simulation_are_listed():
    loaded = LoadedEncodings(("conv1 weight",), tuple("abcdefghi"), ("relu output",), "module.model.")
    assert describe_encodings(FROM_FILE, 4, loaded) == (
        f"{OF_FILE} The prefix 'module.model.', which a wrapper adds, was removed from its names. "
        "Quantizers that the file does not cover (1): conv1 weight. "
        "Entries that belong to no quantizer and were ignored (9): a, b, c, d, e, f, g, h and 1 more. "
        "Quantizers that AIMET 2 shares and the file gives separate encodings (1): relu output. "
        f"Calibrated on 4 images {ON_VAL}"
    )


def test_the_notes_say_how_the_network_was_quantized():
    without_cle = Config(quantization=QuantizationConfig(cle=False))
    changed, equalized = replace(CHECKPOINT, notes=("Removed.",)), replace(CHECKPOINT, equalized=True)
    already = "The checkpoint is already equalized, so cross-layer equalization was not applied again."
    assert quantization_notes(Config(), changed, {}, CALIBRATION) == ["Removed.", "Calibrated on 4 images."]
    assert quantization_notes(without_cle, CHECKPOINT, {"stem.conv1": 2, "head": 1}, CALIBRATION) == [
        "Cross-layer equalization was not applied.",
        "Weight scales were raised so that biases fit into int32: stem.conv1, head.",
        "Calibrated on 4 images.",
    ]
    assert quantization_notes(without_cle, equalized, {}, CALIBRATION) == [already, "Calibrated on 4 images."]
