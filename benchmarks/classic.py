"""The classic way to evaluate, written anew from its description: what FFNet users have been running.

Each pass decodes every image again through PIL, loops over the label ids, computes 19 pairs of distance transforms that
nobody reads, takes softmax over full-size logits and counts with a numpy histogram; INT8 is AIMET's eager simulation.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt

from datasets.cityscapes import IGNORED, TRAIN_IDS
from ffnet import quantize
from ffnet.evaluate import MEAN, STD
from ffnet.variants import NUM_CLASSES


def run(images, model, sim, device):
    """Calibrates on all images, then scores FP32 and INT8: IoU a class of both."""
    fresh = quantize.simulate(quantize.equalize(model), quantize.Recipe())
    with quantize.quiet_aimet():
        fresh.compute_encodings(lambda network: [network(image.to(device)) for image, _ in load(images)])
    return [score(network, images, device) for network in (model, sim.model)]


def load(images):
    """Normalized image (1, 3, H, W), train ids (H, W) of every pair, decoded anew."""
    for image_path, label_path in zip(images.images, images.targets, strict=True):
        pixels = np.asarray(Image.open(image_path).convert("RGB"), np.float32) / 255
        normalized = (pixels - np.float32(MEAN)) / np.float32(STD)
        label_ids = np.asarray(Image.open(label_path))
        train_ids = np.full(label_ids.shape, IGNORED, np.uint8)
        for label_id, train_id in enumerate(TRAIN_IDS):
            train_ids[label_ids == label_id] = train_id
        edges(train_ids)
        yield torch.from_numpy(normalized.transpose(2, 0, 1).copy())[None], train_ids


def edges(train_ids, radius=2):
    """Pixels near the border of a class, by 19 pairs of distance transforms."""
    near = np.zeros(train_ids.shape, bool)
    for train_id in range(NUM_CLASSES):
        mask = train_ids == train_id
        distance = distance_transform_edt(mask) + distance_transform_edt(~mask)
        near |= distance <= radius
    return near


@torch.no_grad()
def score(network, images, device):
    matrix = np.zeros((NUM_CLASSES, NUM_CLASSES))
    for image, labels in load(images):
        logits = network(image.to(device))
        full = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)
        predictions = F.softmax(full, dim=1).max(1).indices[0].cpu().numpy()
        scored = labels < NUM_CLASSES
        codes = NUM_CLASSES * labels[scored].astype(int) + predictions[scored]
        matrix += np.histogram(codes, bins=NUM_CLASSES**2, range=(0, NUM_CLASSES**2))[0].reshape(NUM_CLASSES, -1)
    return np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1) - np.diag(matrix), 1)
