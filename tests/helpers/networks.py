"""Networks with weights that anyone can make again, and inputs for them."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ffnet.model import FFNet, build_model
from ffnet.variants import SegHead, UpHead, Variant

DEMO = "segmentation_ffnet14T_dBBB_mobile"
PRE_DOWN = "segmentation_ffnet14T_BCC_mobile_pre_down"
DEMO_FOLDER = Path(__file__).parents[2] / "demo"
TOY = Variant(
    name="segmentation_ffnet_toy",
    stem="C",
    bottleneck=False,
    blocks=(1, 1, 1),
    strides=(2, 2, 2),
    channels=(8, 8, 8, 8),
    up_head=UpHead((8, 8, 8, 8), (8, 8, 8, 8)),
    seg_head=SegHead(8, 1),
    upsampling="nearest",
    pre_down=False,
    release_file="",
    parameters=0.0,
)


def demo_checkpoint(name):
    """Return the file of the demo's trained weights."""
    return DEMO_FOLDER / f"{name}.pth"


def golden_state(model):
    """Return the weights of the golden outputs, which depend on the crc32 of each key alone."""
    return {key: golden_tensor(key, tensor) for key, tensor in model.state_dict().items()}


def golden_tensor(key, tensor):
    if key == "smoothing.weight":
        return tensor
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(tensor)
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(tensor.shape))
    if n.ndim == 4:
        value = n * np.sqrt(2 / np.prod(n.shape[1:]))
    elif key.endswith("running_mean"):
        value = 0.1 * n
    elif key.endswith("running_var"):
        value = 1 + 0.5 * abs(n)
    elif key.endswith("weight"):
        value = (1.0 if key.startswith("head.") else 0.3) * (1 + 0.1 * n)
    else:
        value = 0.02 * n
    return torch.from_numpy(value.astype(np.float32))


def golden_model(name):
    """Return the named FFNet with golden weights."""
    model = build_model(name)
    model.load_state_dict(golden_state(model))
    return model


def toy_model():
    """Return the smallest FFNet of the tests, with golden weights."""
    model = FFNet(TOY).eval()
    model.load_state_dict(golden_state(model))
    return model


def three_layer_network(seed=0):
    """Return three convolutions with ReLUs: (N, 3, H, W) -> logits (N, 19, H / 4, W / 4); not an FFNet."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 19, 1)
    ).eval()


def random_batches(count=2, size=(64, 128)):
    """Return batches (2, 3, H, W) of normal noise, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, *size, generator=generator) for _ in range(count)]
