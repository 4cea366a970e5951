"""Sequential MSE: for every channel of a weight, the range whose quantization changes the layer's output least.

AIMET's own search, layer after layer, among 20 shares of the calibrated range. It takes weights of at most 4 bits.
"""

import contextlib
import io
import sys
from collections.abc import Sequence

import torch
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse as aimet_seq_mse
from torch.utils.data import DataLoader

from ffnet.quantization.quiet import quiet_aimet


def apply_seq_mse(sim: QuantizationSimModel, images: Sequence[torch.Tensor], progress: bool = True) -> None:
    """Search the ranges of all weights of 4 bits and freeze them; calibrate the activations afterwards.

    Args:
        sim: a simulation.
        images: normalized images (1, 3, H, W) float32 on the device of `sim`.
        progress: show a progress bar on stderr.
    """
    with quiet_aimet(), contextlib.redirect_stderr(sys.stderr if progress else io.StringIO()):
        aimet_seq_mse(sim, DataLoader(images, batch_size=None))  # type: ignore[arg-type]
