"""What files take: given by options, said by their metadata, or found by a trial; and the conversion to it."""

import itertools

import pytest
import torch
from onnx import helper

from ffnet.evaluation.loading import normalize
from ffnet.onnx.input_format import InputFormat, choose_input, decide
from tests.helpers.onnx_files import convolution_network

NAN = float("nan")
RANGES, ORDERS = ("normalized", "0-1", "0-255"), ("rgb", "bgr")
FOREIGN = convolution_network()


def said_to_take(value_range, channels):
    """A file whose metadata says what it takes."""
    proto = convolution_network()
    helper.set_model_props(proto, {"ffnet.input": value_range, "ffnet.channels": channels})
    return proto


def no_trial(choice):
    pytest.fail("was tried")


def scores(**best):
    """The mIoU of every choice: 5 percent if `best` does not say otherwise."""
    names = {f"{value_range}_{order}": (value_range, order) for value_range, order in itertools.product(RANGES, ORDERS)}
    return dict.fromkeys(names.values(), 5.0) | {names[name]: miou for name, miou in best.items()}


@pytest.mark.parametrize(
    ("mious", "expected"),
    (
        (scores(**{"normalized_rgb": 80.0, "normalized_bgr": 70.0}), ("normalized", "rgb")),
        (scores(**{"0-1_bgr": 80.0, "0-1_rgb": 60.0, "normalized_rgb": 30.0}), ("0-1", "bgr")),
        (scores(**{"0-1_rgb": 80.0, "0-1_bgr": 78.0}), ("0-1", None)),  # the channels are not clear
        (scores(**{"0-1_rgb": 80.0, "0-255_rgb": 78.0}), (None, None)),
        (scores(**{"0-1_rgb": 15.0}), (None, None)),  # no choice is any good
        (scores(**{"0-1_rgb": 60.0, "0-255_bgr": NAN}), ("0-1", "rgb")),
        (dict.fromkeys(itertools.product(RANGES, ORDERS), NAN), (None, None)),
        ({("0-1", "rgb"): 60.0, ("0-1", "bgr"): 40.0}, ("0-1", "rgb")),  # the range is known
        ({("0-1", "rgb"): 6.0, ("0-1", "bgr"): 4.0}, ("0-1", None)),
    ),
)
def test_a_trial_decides_only_if_one_choice_is_clearly_right(mious, expected):
    assert decide(mious) == expected


def test_options_are_taken_without_a_trial_even_if_the_metadata_differs():
    chosen = choose_input(said_to_take("0-1", "rgb"), ("normalized", "bgr"), no_trial)
    assert (chosen.value_range, chosen.channels) == ("normalized", "bgr")
    assert (
        chosen.describe() == "The file is fed images in BGR, normalized. --onnx-input says so. --onnx-channels says so."
    )


def test_metadata_is_taken_without_a_trial():
    chosen = choose_input(said_to_take("0-255", "bgr"), (None, None), no_trial)
    assert chosen.describe() == "The file is fed images in BGR, 0..255. Its metadata says so."
    chosen = choose_input(said_to_take("0-255", "bgr"), ("0-1", None), no_trial)
    assert chosen.describe() == "The file is fed images in BGR, 0..1. --onnx-input says so. Its metadata says so."


@pytest.mark.parametrize(
    ("proto", "given"),
    ((FOREIGN, ("0-255", None)), (said_to_take("0-255", "CMYK"), (None, None))),
    ids=("option", "metadata"),
)
def test_only_what_is_not_known_is_tried(proto, given):
    tried = []
    chosen = choose_input(proto, given, lambda choice: tried.append(choice) or 90.0 - 20 * len(tried))
    assert [(choice.value_range, choice.channels) for choice in tried] == [("0-255", "rgb"), ("0-255", "bgr")]
    assert (chosen.value_range, chosen.channels) == ("0-255", "rgb")
    assert "mIoU on a few images, in percent: RGB, 0..255: 70.00; BGR, 0..255: 50.00." in chosen.describe()


def test_without_a_clear_choice_normalized_rgb_is_fed_and_the_options_are_named():
    chosen = choose_input(FOREIGN, (None, None), lambda _: 4.0)
    assert (chosen.value_range, chosen.channels) == ("normalized", "rgb")
    assert chosen.describe().endswith(
        "This is inconclusive; if the choice is wrong, give --onnx-input and --onnx-channels."
    )
    chosen = choose_input(FOREIGN, (None, "bgr"), lambda _: 4.0)
    assert (chosen.value_range, chosen.channels) == ("normalized", "bgr")
    assert chosen.describe().endswith("if the choice is wrong, give --onnx-input.")


def test_every_byte_is_converted_back_exactly():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    image = torch.stack([values[0, 0], values[0, 1].flip(0), values[0, 2].T])[None]
    inputs = normalize(image)
    assert torch.equal(InputFormat().convert(inputs), inputs)
    assert torch.equal(InputFormat("0-255").convert(inputs), image.float())
    assert torch.equal(InputFormat("0-1", "bgr").convert(inputs), image.float()[:, [2, 1, 0]] / 255)
