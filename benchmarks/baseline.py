"""The baseline of the speed benchmark: FFNet's evaluation as it was published, written anew from its description.

Every backend decodes each image again with PIL, converts label ids in a loop, computes 19 pairs of distance transforms
that nothing uses, takes the softmax of full-size logits and counts with numpy.histogram. INT8 is AIMET's simulation.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from aimet_torch.quantsim import QuantizationSimModel
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import nn

from datasets.cityscapes import CityscapesSplit
from ffnet.config import QuantizationConfig
from ffnet.evaluation.loading import MEAN, STD
from ffnet.labels import CITYSCAPES, IGNORED
from ffnet.model import FFNet
from ffnet.quantization.quantsim import build_quantsim, equalize, quiet_aimet

CLASSES = len(CITYSCAPES.classes)


def run(images: CityscapesSplit, model: FFNet, sim: QuantizationSimModel, device: torch.device) -> list[np.ndarray]:
    """Calibrate on all images, then return the IoU per class of the network and of its simulation."""
    fresh = build_quantsim(equalize(model), QuantizationConfig())
    with quiet_aimet():
        fresh.compute_encodings(lambda network: [network(image.to(device)) for image, _ in load(images)])
    return [score(network, images, device) for network in (model, sim.model)]


def load(images: CityscapesSplit) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Decode every pair and yield its normalized image (1, 3, H, W) float32 and train ids (H, W) uint8."""
    for image_path, label_path in zip(images.images, images.targets, strict=True):
        pixels = np.asarray(Image.open(image_path).convert("RGB"), np.float32) / 255
        normalized = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        label_ids = np.asarray(Image.open(label_path))
        train_ids = np.full(label_ids.shape, IGNORED, np.uint8)
        for label_id, train_id in enumerate(CITYSCAPES.train_ids[:34]):
            train_ids[label_ids == label_id] = train_id
        class_borders(train_ids)
        yield torch.from_numpy(normalized.transpose(2, 0, 1).copy())[None], train_ids


def class_borders(train_ids: np.ndarray, radius: int = 2) -> np.ndarray:
    """Return which pixels (H, W) are near the border of a class, by 19 pairs of distance transforms."""
    near = np.zeros(train_ids.shape, bool)
    for train_id in range(CLASSES):
        mask = train_ids == train_id
        near |= distance_transform_edt(mask) + distance_transform_edt(~mask) <= radius
    return near


@torch.no_grad()
def score(network: nn.Module, images: CityscapesSplit, device: torch.device) -> np.ndarray:
    """Return the IoU per class (19,) of a network over all images."""
    matrix = np.zeros((CLASSES, CLASSES))
    for image, labels in load(images):
        logits = network(image.to(device))
        full = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
        predictions = F.softmax(full, dim=1).max(1).indices[0].cpu().numpy()
        scored = labels < CLASSES
        codes = CLASSES * labels[scored].astype(int) + predictions[scored]
        matrix += np.histogram(codes, bins=CLASSES**2, range=(0, CLASSES**2))[0].reshape(CLASSES, -1)
    return np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1) - np.diag(matrix), 1)
