"""Trains the demo's two small FFNets on rendered street scenes and scores them on the demo's val split.

    python -m demo.train                                                   # both, about half an hour on two cores
    python -m demo.train --model-name segmentation_ffnet14T_dBBB_mobile

Writes `demo/<name>.pth`, each an FFNet state_dict of float32 CPU tensors.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from datasets.cityscapes import CLASSES, IGNORED, TRAIN_IDS, CityscapesSplit
from datasets.streetscenes import FIRST_FREE_SEED, ensure_scenes, process_pool
from datasets.streetscenes.render import render_scene
from ffnet import build_model
from ffnet.cache import default_cache_dir
from ffnet.evaluate import normalize
from ffnet.metrics import confusion_matrix, iou, mean_iou
from ffnet.variants import DEMO_VARIANTS, NUM_CLASSES

HERE = Path(__file__).parent
CROP = (320, 640)  # height, width
BATCH = 4
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.02
EMA_DECAY = 0.998
MAX_BYTES = 4_000_000  # of a checkpoint, since it is kept in the repository


def main(argv=None):
    args = parse_args(argv)
    start = time.monotonic()
    val = ensure_scenes(args.cache_dir)
    images, labels = render_scenes(args.scenes, FIRST_FREE_SEED + args.seed * args.scenes)
    for name in args.model_name or DEMO_VARIANTS:
        model = train(name, images, labels, args)
        save(model.state_dict(), HERE / f"{name}.pth")
        print_scores(name, model, CityscapesSplit(val, "val"))
        print(f"{(time.monotonic() - start) / 60:.1f} minutes so far")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="train only this one")
    parser.add_argument("--steps", type=int, default=7000, help="optimizer steps a model (%(default)s)")
    parser.add_argument("--scenes", type=int, default=500, help="scenes to train on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="(%(default)s)")
    return parser.parse_args(argv)


def render_scenes(count, first_seed):
    """(N, 3, H, W) uint8 images and (N, H, W) uint8 train ids."""
    seeds = range(first_seed, first_seed + count)
    with process_pool() as pool:
        pairs = list(tqdm(pool.map(render_scene, seeds, chunksize=4), total=count, desc="scenes to train on"))
    images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(TRAIN_IDS[labels])


def train(name, images, labels, args):
    """The named FFNet in eval mode with the moving average of its weights."""
    torch.manual_seed(args.seed)
    model = build_model(name).train().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.steps, pct_start=0.1)
    weights = class_weights(labels)
    for _ in (bar := tqdm(range(args.steps), desc=name, mininterval=5)):
        x, y = random_batch(images, labels)
        loss = loss_of(model(x.contiguous(memory_format=torch.channels_last)), y, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return average.module.eval()


def class_weights(labels):
    """(19,) float32: rare classes count a little more."""
    counts = torch.bincount(labels[::5].flatten(), minlength=256)[:NUM_CLASSES].float()
    weights = (counts / counts.sum()).clamp(min=1e-4) ** -0.25
    return weights / weights.mean()


def random_batch(images, labels):
    """Crops (BATCH, 3, *CROP) float32, mirrored by chance and with other light, and their train ids."""
    height, width = CROP
    x, y = [], []
    for index in torch.randint(len(images), (BATCH,)).tolist():
        top = int(torch.randint(images.shape[2] - height + 1, ()))
        left = int(torch.randint(images.shape[3] - width + 1, ()))
        flip = [-1] if torch.rand(()) < 0.5 else []
        x.append(images[index, :, top : top + height, left : left + width].flip(flip))
        y.append(labels[index, top : top + height, left : left + width].flip(flip))
    gain = torch.empty(BATCH, 3, 1, 1).uniform_(0.93, 1.07) * torch.empty(BATCH, 1, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty(BATCH, 1, 1, 1).uniform_(-0.2, 0.2)
    return normalize(torch.stack(x)) * gain + shift, torch.stack(y)


def loss_of(logits, labels, weights):
    """Cross entropy on every second row and column, a random half of each, which takes a quarter of the time."""
    down, right = torch.randint(2, (2,)).tolist()
    labels = labels[:, down::2, right::2].long()
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, weights, ignore_index=IGNORED)


@torch.inference_mode()
def print_scores(name, model, split):
    """IoU of every class and their mean, in percent, over a split at full size."""
    matrix = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for image, labels in (split[i] for i in range(len(split))):
        logits = F.interpolate(model(normalize(image[None])), labels.shape, mode="bilinear", align_corners=False)
        matrix += confusion_matrix(labels.numpy(), logits[0].argmax(0).to(torch.uint8).numpy())
    for label, value in zip(CLASSES, iou(matrix), strict=True):
        print(f"  {label:15s} {100 * value:6.2f}")
    print(f"{name}: mIoU {100 * mean_iou(matrix):.2f}")


def save(state, path):
    """Plain contiguous CPU tensors, under the final name only when whole."""
    temporary = path.with_suffix(".tmp")
    torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, temporary)
    if temporary.stat().st_size > MAX_BYTES:
        sys.exit(f"{temporary} has {temporary.stat().st_size} bytes; a checkpoint may have {MAX_BYTES}")
    temporary.replace(path)


if __name__ == "__main__":
    main()
