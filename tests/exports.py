"""The demo's networks, calibrated on a crop of a rendered scene and exported once for all tests."""

import atexit
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets.streetscenes.render import render_scene
from ffnet import VARIANTS, checkpoint, evaluate, export, quantize
from ffnet.biases import fit_biases

SIZE = (128, 256)
DEMO = Path(__file__).parents[1] / "demo"


@dataclass
class Exported:
    model: torch.nn.Module
    sim: object
    folder: Path
    inputs: torch.Tensor  # two scenes, normalized; the first calibrated


@functools.cache
def scratch():
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def scenes():
    images = torch.stack([torch.from_numpy(render_scene(seed)[0]).permute(2, 0, 1) for seed in (1000, 1001)])
    return evaluate.normalize(images[:, :, 192 : 192 + SIZE[0], 384 : 384 + SIZE[1]])


def simulated(name, recipe, model=None):
    model = model or checkpoint.load_model(VARIANTS[name], DEMO / f"{name}.pth").model
    sim = quantize.quantize(model, recipe, [scenes()[:1]])
    fit_biases(sim)
    return model, sim


@functools.cache
def exported(name, param_bw, output_bw):
    model, sim = simulated(name, quantize.Recipe(param_bw, output_bw))
    folder = scratch() / f"{name}-{param_bw}-{output_bw}"
    return Exported(model, sim, export.export(sim, SIZE, folder, {"model": name}), scenes())
