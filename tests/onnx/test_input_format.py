"""What files take: read from their first operations, found by a trial, and converted to."""

import itertools

import numpy as np
import pytest
import torch

from ffnet.evaluation.loading import normalize
from ffnet.onnx.input_format import InputFormat, choose_input, decide, find_channels, find_value_range
from ffnet.onnx.input_operations import FirstOperations

NAN = float("nan")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
RANGES, ORDERS = ("normalized", "0-1", "0-255"), ("rgb", "bgr")
NOTHING = FirstOperations()


def normalizing(mean, std, **more):
    return FirstOperations(1 / std, -mean / std, ("sub", "div"), **more)


def quantized(low, high):
    return FirstOperations(quantized_range=(low, high))


FIRST = {
    "AI Hub's": (normalizing(MEAN, STD), "0-1", "rgb"),
    "in bytes": (normalizing(255 * MEAN, 255 * STD), "0-255", "rgb"),
    "mean in the order of BGR": (normalizing(255 * MEAN[::-1], 255 * STD[::-1]), "0-255", "bgr"),
    "mean alone": (normalizing(255 * MEAN, np.ones(3)), "0-255", "rgb"),
    "one mean for all channels": (normalizing(np.full(3, 0.5), np.full(3, 0.5)), "0-1", None),
    "reversed": (normalizing(np.full(3, 0.5), np.full(3, 0.5), reversed_by="flip"), "0-1", "bgr"),
    "reversed and mean in RGB": (normalizing(MEAN[::-1], STD[::-1], reversed_by="flip"), "0-1", "bgr"),
    "divided by 255": (FirstOperations(np.full(3, 1 / 255), np.zeros(3), ("div",)), "0-255", None),
    "quantized for 0 to 1": (quantized(0.0, 0.98), "0-1", None),
    "symmetric for 0 to 1": (quantized(-1.008, 1.0), "0-1", None),
    "quantized for bytes": (quantized(0.0, 255.0), "0-255", None),
    "quantized for normalized images": (quantized(-2.118, 2.64), "normalized", None),
    "symmetric for normalized images": (quantized(-2.66, 2.64), "normalized", None),
    "quantized for something else": (quantized(-20.0, 20.0), None, None),
    "nothing": (NOTHING, None, None),
    "other scale": (FirstOperations(np.full(3, 2.0), np.zeros(3), ("mul",)), None, None),
}


@pytest.mark.parametrize("case", FIRST)
def test_first_operations_tell_what_a_file_takes(case):
    first, value_range, channels = FIRST[case]
    assert (find_value_range(first).value, find_channels(first).value) == (value_range, channels)


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


def test_options_are_taken_without_a_trial():
    chosen = choose_input(normalizing(MEAN, STD), ("normalized", "bgr"), lambda _: pytest.fail("was tried"))
    assert (chosen.value_range, chosen.channels) == ("normalized", "bgr")
    assert (
        chosen.describe() == "The file is fed images in BGR, normalized. --onnx-input says so. --onnx-channels says so."
    )


def test_only_what_is_not_known_is_tried():
    tried = []
    chosen = choose_input(NOTHING, ("0-255", None), lambda choice: tried.append(choice) or 90.0 - 20 * len(tried))
    assert [(choice.value_range, choice.channels) for choice in tried] == [("0-255", "rgb"), ("0-255", "bgr")]
    assert (chosen.value_range, chosen.channels) == ("0-255", "rgb")
    assert "mIoU on a few images, in percent: RGB, 0..255: 70.00; BGR, 0..255: 50.00." in chosen.describe()


def test_without_a_clear_choice_normalized_rgb_is_fed_and_the_options_are_named():
    chosen = choose_input(NOTHING, (None, None), lambda _: 4.0)
    assert (chosen.value_range, chosen.channels) == ("normalized", "rgb")
    assert chosen.describe().endswith(
        "This does not tell clearly; if it is wrong, give --onnx-input and --onnx-channels."
    )


def test_every_byte_is_converted_back_exactly():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    image = torch.stack([values[0, 0], values[0, 1].flip(0), values[0, 2].T])[None]
    inputs = normalize(image)
    assert torch.equal(InputFormat().convert(inputs), inputs)
    assert torch.equal(InputFormat("0-255").convert(inputs), image.float())
    assert torch.equal(InputFormat("0-1", "bgr").convert(inputs), image.float()[:, [2, 1, 0]] / 255)
