"""Inputs of the benchmarks: options, networks with random weights, and rendered images.

Speed does not depend on the weights.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from datasets import LAYOUTS
from datasets.cityscapes import CityscapesSplit
from demo.streetscenes.render import render_scene
from ffnet.evaluation.loading import normalize
from ffnet.model import FFNet, build_model
from ffnet.variants import INPUT_SIZE, VARIANTS

DEMO_FOLDER = Path(__file__).parents[1] / "demo"  # holds the trained weights of the demo's networks


def option_parser(name: str, description: str | None, model_name: str | None = None) -> argparse.ArgumentParser:
    """Return a parser for `python -m benchmarks.<name>`, with the option --model-name if it has a default."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description, formatter_class=formatter)
    if model_name:
        parser.add_argument(
            "--model-name", default=model_name, choices=VARIANTS, metavar="NAME", help="default %(default)s"
        )
    return parser


def write_images(
    root: Path, number: int, size: tuple[int, int] = INPUT_SIZE, scenes: int | None = None
) -> CityscapesSplit:
    """Write and open a val split of rendered images.

    Args:
        root: Folder of the dataset.
        number: Number of images.
        size: Height and width.
        scenes: Number of different images, to which the others are hard links in turn; None makes all different.
    """
    folders = [root / kind / "val" / "bench" for kind in ("leftImg8bit", "gtFine")]
    for folder in folders:
        folder.mkdir(parents=True)
    layout = LAYOUTS["cityscapes"]
    suffixes = (layout.images.suffixes[0], layout.labels.suffixes[0])
    scenes = min(scenes or number, number)
    for seed in tqdm(range(scenes), "render", disable=None):
        for folder, suffix, pixels in zip(folders, suffixes, render_scene(seed, *size), strict=True):
            Image.fromarray(pixels).save(folder / f"bench_{seed:06d}_000019{suffix}")
    for index in range(scenes, number):
        for folder, suffix in zip(folders, suffixes, strict=True):
            scene = folder / f"bench_{index % scenes:06d}_000019{suffix}"
            scene.with_name(f"bench_{index:06d}_000019{suffix}").hardlink_to(scene)
    return CityscapesSplit(root, "val")


def first_image(images: CityscapesSplit, device: str = "cpu") -> torch.Tensor:
    """Return the first image, normalized (1, 3, H, W) float32."""
    return normalize(images[0][0][None].to(device))


def random_model(name: str) -> FFNet:
    """Return the network with He's initial weights, which keep activations in range."""
    torch.manual_seed(0)
    model = build_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.3)
    return model


def write_checkpoint(name: str, path: Path) -> Path:
    """Write random weights of the network `name` to `path` and return it."""
    torch.save(random_model(name).state_dict(), path)
    return path
