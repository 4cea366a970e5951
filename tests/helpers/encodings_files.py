"""Encodings files that AIMET itself wrote, and the calibrated simulation that they came from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffnet.config import QuantizationConfig
from ffnet.quantization.encodings import load_encodings
from ffnet.quantization.encodings_file import read_encodings
from ffnet.quantization.quantsim import build_quantsim, calibrate, equalize, quiet_aimet
from tests.helpers.networks import random_batches
from tests.helpers.simulations import encodings, logits

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
BY_LAYER = "layers.json"
FILES = (BY_LAYER, "old_torch.encodings", "old.encodings", *(f"tensors_{version}.encodings" for version in VERSIONS))

PLAIN = {
    "bitwidth": 8,
    "dtype": "int",
    "is_symmetric": "False",
    "min": -1.0,
    "max": 1.55,
    "offset": -100,
    "scale": 0.01,
}


@dataclass(frozen=True)
class Case:
    prepared: Any
    sim: Any  # calibrated
    folder: Path  # holds the FILES that AIMET wrote
    x: Any

    def content(self, name=BY_LAYER):
        return json.loads((self.folder / name).read_text())

    def read(self, content):
        """Return the EncodingsFile of a file or of its content."""
        return read_encodings(content if isinstance(content, Path) else write(self.folder, content))

    def load(self, content, partial=False):
        """Return a new simulation with the encodings of a file or of its content, and its LoadedEncodings."""
        sim = build_quantsim(self.prepared, QuantizationConfig())
        return sim, load_encodings(sim, self.read(content), partial)

    def assert_same(self, sim):
        assert encodings(sim) == encodings(self.sim)
        assert torch.equal(logits(sim.model, self.x), logits(self.sim.model, self.x))


def make_case(model, folder, names=FILES):
    """Return the Case of a network, with the files in `names`."""
    prepared = equalize(model)
    sim = build_quantsim(prepared, QuantizationConfig())
    calibrate(sim, random_batches())
    x = random_batches(3)[2]
    with quiet_aimet():
        sim.save_encodings_to_json(str(folder), Path(BY_LAYER).stem)
        if "old.encodings" in names:
            sim.export(str(folder), "old", dummy_input=x)  # writes old.encodings and old_torch.encodings
        for version in VERSIONS:
            if f"tensors_{version}.encodings" in names:
                export(sim, x, folder / f"tensors_{version}.onnx", version, dynamo=False)
    return Case(prepared, sim, folder, x)


def export(sim, x, path, version, dynamo):
    sim.onnx.export(
        (x,), str(path), input_names=["image"], output_names=["logits"], encoding_version=version, dynamo=dynamo
    )


def write(folder, content):
    path = folder / "written.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
