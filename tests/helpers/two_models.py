"""Two small models, their weights in one folder, and what their runs count."""

import csv
import json
from dataclasses import replace

import torch

from ffnet.model import FFNet
from tests.helpers.cityscapes_tree import write_tree
from tests.helpers.networks import TOY, golden_state
from tests.helpers.program import arguments

SMOOTHED = replace(TOY, name="segmentation_ffnet_toy_pre_down", pre_down=True)
NAMES = (TOY.name, SMOOTHED.name)
IMAGES = 6


def write_data(root):
    """Write six val and two train images, and a folder `weights`."""
    write_tree(root, "val", IMAGES)
    write_tree(root, "train", 2, seed=1)
    (root / "weights").mkdir()
    for variant in (TOY, SMOOTHED):
        torch.save(golden_state(FFNet(variant).eval()), root / "weights" / f"{variant.name}.pth")


def options_for(data, *more, names=NAMES, weights=None):
    """Return the options of a small run of the named models on a CPU, followed by `more`."""
    options = arguments(data, weights or data / "weights", *more)
    position = options.index("--model-name") + 1
    return [*options[:position], *names, *options[position + 1 :]]


def read(folder):
    """Return the content of result.json."""
    return json.loads((folder / "result.json").read_text())


def counts(out, names=NAMES):
    """Return everything that a run counts: confusion matrices, agreement and rows per image."""
    found = {}
    for name in names:
        folder = out / name if len(names) > 1 else out
        result = read(folder)
        matrices = {backend: entry["confusion_matrix"] for backend, entry in result["backends"].items()}
        rows = list(csv.DictReader((folder / "per_image.csv").open(encoding="utf-8-sig")))
        found[name] = matrices, result["agreement"], rows
    return found
