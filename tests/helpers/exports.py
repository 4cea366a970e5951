"""Exported simulations, one per network and bit widths in a session."""

import atexit
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from aimet_torch.quantsim import QuantizationSimModel

from demo.streetscenes.render import render_scene
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.config import MODEL_FILE
from ffnet.evaluation.loading import normalize
from ffnet.onnx.export import export
from ffnet.quantization.weighted_layers import raise_weight_scales
from tests.helpers.networks import demo_checkpoint, random_batches
from tests.helpers.simulations import raise_precision, simulate

DEMO_SIZE = (128, 256)


@dataclass(frozen=True)
class Exported:
    model: torch.nn.Module  # the float network before quantization
    sim: QuantizationSimModel
    folder: Path
    inputs: torch.Tensor  # two normalized images; the first was used for calibration
    logits: torch.Tensor  # logits of `sim` before the export

    @property
    def size(self):
        return tuple(self.inputs.shape[2:])


@functools.cache
def scenes():
    """Two normalized crops of the demo's street scenes."""
    images = torch.stack([torch.from_numpy(render_scene(seed)[0]).permute(2, 0, 1) for seed in (1000, 1001)])
    return normalize(images[:, :, 192 : 192 + DEMO_SIZE[0], 384 : 384 + DEMO_SIZE[1]])


def export_simulation(model, sim, inputs, folder=None):
    """An Exported in `folder`, or in a folder that is removed at the end of the session."""
    with torch.no_grad():
        logits = sim.model(inputs).as_subclass(torch.Tensor)
    folder = export(sim, inputs.shape[2:], folder or _temporary_folder(), {"model": "of a test"})
    return Exported(model, sim, folder, inputs, logits)


@functools.cache
def exported(name, param_bw=8, output_bw=8):
    """One of the demo's trained networks."""
    model = load_checkpoint(name, demo_checkpoint(name)).model
    sim = simulate(model, [scenes()[:1]], param_bw=param_bw, output_bw=output_bw)
    raise_weight_scales(sim)
    return export_simulation(model, sim, scenes())


def export_mix(model, tensors, folder, batches=None):
    """The simulation and the file of a W4A8 network whose named activations have 16 bits, weights 8."""
    batches = random_batches() if batches is None else batches
    sim = simulate(model, batches, param_bw=4, quant_scheme="tf")
    raise_weight_scales(sim)
    raise_precision(sim, tensors)
    return sim, export(sim, batches[0].shape[2:], folder, {}) / MODEL_FILE


def _temporary_folder():
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)
