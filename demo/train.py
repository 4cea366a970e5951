"""Train the demo's two small FFNets on rendered street scenes and evaluate them on the demo's val split.

    python -m demo.train                                                   # both, about half an hour on two cores
    python -m demo.train --model-name segmentation_ffnet14T_dBBB_mobile

Writes `demo/<name>.pth`, a state_dict of float32 CPU tensors for each network.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from datasets.cityscapes import CityscapesSplit
from demo.streetscenes.render import render_scene
from demo.streetscenes.scenes import FIRST_FREE_SEED, ensure_scenes, process_pool
from ffnet.checkpoints.download import default_cache_dir
from ffnet.config import Runtime
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.metrics import iou
from ffnet.evaluation.scores import FP32
from ffnet.labels import CLASSES, IGNORED, NUM_CLASSES, TRAIN_IDS
from ffnet.model import build_model
from ffnet.run.inputs import DEMO_FOLDER
from ffnet.system.files import write_atomically
from ffnet.variants import DEMO_VARIANTS

CROP_SIZE = (320, 640)  # height, width
BATCH_SIZE = 4
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.02
EMA_DECAY = 0.998
MAX_BYTES = 4_000_000  # largest checkpoint, because the repository holds it


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save and evaluate the networks that the command line names."""
    args = parse_args(argv)
    start = time.monotonic()
    root = ensure_scenes(args.cache_dir)
    images, labels = render_scenes(args.scenes, FIRST_FREE_SEED + args.seed * args.scenes)
    for name in args.model_name or DEMO_VARIANTS:
        model = train(name, images, labels, args.steps, args.seed)
        save(model, DEMO_FOLDER / f"{name}.pth")
        print_scores(name, model, CityscapesSplit(root, "val"))
        print(f"{(time.monotonic() - start) / 60:.1f} minutes so far")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="train only this network")
    parser.add_argument("--steps", type=int, default=7000, help="optimizer steps per network (%(default)s)")
    parser.add_argument("--scenes", type=int, default=500, help="number of training scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="(%(default)s)")
    return parser.parse_args(argv)


def render_scenes(count: int, first_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 3, H, W) uint8 and train ids (N, H, W) uint8 of `count` rendered scenes."""
    seeds = range(first_seed, first_seed + count)
    with process_pool() as pool:
        pairs = list(tqdm(pool.map(render_scene, seeds, chunksize=4), total=count, desc="render training scenes"))
    images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(TRAIN_IDS[labels])


def train(name: str, images: torch.Tensor, labels: torch.Tensor, steps: int, seed: int) -> nn.Module:
    """Return the named FFNet in eval mode with the moving average of its trained weights."""
    torch.manual_seed(seed)
    model = build_model(name).train().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    weights = class_weights(labels)
    for _ in (bar := tqdm(range(steps), desc=name, mininterval=5)):
        x, y = random_batch(images, labels)
        loss = cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return average.module.eval()


def class_weights(labels: torch.Tensor) -> torch.Tensor:
    """Return weights (19,) float32 of the loss, a little larger for rare classes."""
    counts = torch.bincount(labels[::5].flatten(), minlength=256)[:NUM_CLASSES].float()
    weights = (counts / counts.sum()).clamp(min=1e-4) ** -0.25
    return weights / weights.mean()


def random_batch(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random crops (BATCH_SIZE, 3, *CROP_SIZE) float32 and their train ids.

    Crops are mirrored at random, and their brightness, contrast and colors vary.
    """
    height, width = CROP_SIZE
    x, y = [], []
    for index in torch.randint(len(images), (BATCH_SIZE,)).tolist():
        top = int(torch.randint(images.shape[2] - height + 1, ()))
        left = int(torch.randint(images.shape[3] - width + 1, ()))
        flip = [-1] if torch.rand(()) < 0.5 else []
        x.append(images[index, :, top : top + height, left : left + width].flip(flip))
        y.append(labels[index, top : top + height, left : left + width].flip(flip))
    gain = torch.empty(BATCH_SIZE, 3, 1, 1).uniform_(0.93, 1.07) * torch.empty(BATCH_SIZE, 1, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty(BATCH_SIZE, 1, 1, 1).uniform_(-0.2, 0.2)
    return normalize(torch.stack(x)) * gain + shift, torch.stack(y)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy on every second row and column, starting at random: a quarter of the computation."""
    down, right = torch.randint(2, (2,)).tolist()
    labels = labels[:, down::2, right::2].long()
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, weights, ignore_index=IGNORED)


def print_scores(name: str, model: nn.Module, images: CityscapesSplit) -> None:
    """Print the IoU per class and the mIoU of the network, in percent."""
    scores = evaluate({FP32: model}, images, Runtime(batch_size=1))
    for label, value in zip(CLASSES, iou(scores.total(FP32)), strict=True):
        print(f"  {label:15s} {100 * value:6.2f}")
    print(f"{name}: mIoU {scores.miou(FP32):.2f}")


def save(model: nn.Module, path: Path) -> None:
    """Write the network's state_dict as contiguous CPU tensors; exit if it has more than MAX_BYTES."""
    file = io.BytesIO()
    torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}, file)
    if file.tell() > MAX_BYTES:
        sys.exit(f"{path}: the checkpoint has {file.tell()} bytes, more than the allowed {MAX_BYTES}.")
    write_atomically(path, file.getvalue())


if __name__ == "__main__":
    main()
