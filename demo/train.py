"""Train the demo's two small FFNets on rendered street scenes, or give one of them a head for your own classes.

    python -m demo.train                                                   # both, about half an hour on two cores
    python -m demo.train --model-name segmentation_ffnet14T_dBBB_mobile
    python -m demo.train --dataset-path DIR --output weights.pth           # a head for the classes of DIR/classes.json

The first two write `demo/<name>.pth`, a state_dict of float32 CPU tensors for each network. The third takes the
backbone of the demo's network as it is, trains only the head on the train split of a data set, and shows the IoU on its
val split: a quick way to a small network for other classes, not to a good one.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from datasets import Split
from datasets.cityscapes import CityscapesSplit
from demo.streetscenes.render import render_scene
from demo.streetscenes.scenes import FIRST_FREE_SEED, ensure_scenes, process_pool
from ffnet.checkpoints.download import default_cache_dir
from ffnet.checkpoints.loading import load_checkpoint
from ffnet.config import Runtime
from ffnet.evaluation.loading import Images, Sample, label_set_of, normalize
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.metrics import iou
from ffnet.evaluation.scores import FP32
from ffnet.labels import CITYSCAPES, IGNORED, LabelSet, read_label_set
from ffnet.model import build_model
from ffnet.run.inputs import DEMO_FOLDER
from ffnet.system.files import write_atomically
from ffnet.variants import DEMO_VARIANTS

CROP_SIZE = (320, 640)  # height, width
BATCH_SIZE = 4
STEPS, HEAD_STEPS = 7000, 400
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.02
EMA_DECAY = 0.998
MAX_BYTES = 4_000_000  # largest checkpoint, because the repository holds it


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save and evaluate the networks that the command line names."""
    args = parse_args(argv)
    if args.dataset_path:
        learn_head(args)
    else:
        train_demo(args)


def train_demo(args: argparse.Namespace) -> None:
    """Train, save and evaluate the demo's networks."""
    start = time.monotonic()
    root = ensure_scenes(args.cache_dir)
    samples = render_scenes(args.scenes, FIRST_FREE_SEED + args.seed * args.scenes)
    for name in args.model_name or DEMO_VARIANTS:
        torch.manual_seed(args.seed)
        model = train(build_model(name).train(), samples, CITYSCAPES, args.steps or STEPS)
        save(model, DEMO_FOLDER / f"{name}.pth")
        print_scores(name, model, CityscapesSplit(root, "val"))
        print(f"{(time.monotonic() - start) / 60:.1f} minutes so far")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", action="append", choices=DEMO_VARIANTS, help="train only this network")
    parser.add_argument("--steps", type=int, help=f"optimizer steps per network ({STEPS}, or {HEAD_STEPS} for a head)")
    parser.add_argument("--scenes", type=int, default=500, help="number of training scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="(%(default)s)")
    parser.add_argument("--dataset-path", type=Path, help="train a head on this data set instead")
    parser.add_argument("--dataset", default="folders", help="its layout (%(default)s)")
    parser.add_argument("--classes", type=Path, help="JSON file of the label set; default: that of the layout")
    parser.add_argument("--output", type=Path, default=Path("weights.pth"), help="file of the weights (%(default)s)")
    return parser.parse_args(argv)


def learn_head(args: argparse.Namespace) -> None:
    """Train a head for the classes of a data set on the backbone of the demo's network, save it, and evaluate it."""
    name = (args.model_name or DEMO_VARIANTS)[0]
    label_set = read_label_set(args.classes) if args.classes else None
    images, scored = (Split(args.dataset, args.dataset_path, split, None, label_set) for split in ("train", "val"))
    torch.manual_seed(args.seed)
    model = build_model(name, len(images.label_set.classes)).requires_grad_(False)
    weights = load_checkpoint(name, DEMO_FOLDER / f"{name}.pth").model.state_dict()
    own = model.state_dict()
    model.load_state_dict(
        {key: weights[key] if weights[key].shape == value.shape else value for key, value in own.items()}
    )
    model.head.requires_grad_(True).train()
    samples = [images[index] for index in range(len(images))]
    model = train(model, samples, images.label_set, args.steps or HEAD_STEPS)
    save(model, args.output)
    print_scores(name, model, scored)


def render_scenes(count: int, first_seed: int) -> list[Sample]:
    """Return the images (3, H, W) uint8 and train ids (H, W) uint8 of `count` rendered scenes."""
    seeds = range(first_seed, first_seed + count)
    with process_pool() as pool:
        pairs = list(tqdm(pool.map(render_scene, seeds, chunksize=4), total=count, desc="render training scenes"))
    return [
        (torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(CITYSCAPES.train_ids[labels]))
        for image, labels in pairs
    ]


def train(model: nn.Module, samples: Sequence[Sample], label_set: LabelSet, steps: int) -> nn.Module:
    """Return a network in eval mode with the moving average of its weights while those with gradients are trained."""
    model = model.to(memory_format=torch.channels_last)
    decay = min(EMA_DECAY, 1 - 10 / steps)  # a short training must forget its initial weights
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    weights = class_weights(samples, len(label_set.classes))
    for _ in (bar := tqdm(range(steps), desc="train", mininterval=5)):
        x, y = random_batch(samples)
        loss = cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return average.module.eval()


def class_weights(samples: Sequence[Sample], classes: int) -> torch.Tensor:
    """Return weights (classes,) float32 of the loss, a little larger for rare classes."""
    counts = sum(torch.bincount(labels.flatten(), minlength=256)[:classes].float() for _, labels in samples[::5])
    weights = (counts / counts.sum()).clamp(min=1e-4) ** -0.25
    return weights / weights.mean()


def random_batch(samples: Sequence[Sample]) -> Sample:
    """Return random crops (BATCH_SIZE, 3, h, w) float32 and their train ids.

    They have CROP_SIZE, or less if an image is smaller. Crops are mirrored at random, and their brightness, contrast
    and colors vary.
    """
    chosen = [samples[index] for index in torch.randint(len(samples), (BATCH_SIZE,)).tolist()]
    height, width = (min(side, *sides) for side, *sides in zip(CROP_SIZE, *(y.shape for _, y in chosen), strict=True))
    x, y = [], []
    for image, labels in chosen:
        top = int(torch.randint(labels.shape[0] - height + 1, ()))
        left = int(torch.randint(labels.shape[1] - width + 1, ()))
        flip = [-1] if torch.rand(()) < 0.5 else []
        x.append(image[:, top : top + height, left : left + width].flip(flip))
        y.append(labels[top : top + height, left : left + width].flip(flip))
    gain = torch.empty(BATCH_SIZE, 3, 1, 1).uniform_(0.93, 1.07) * torch.empty(BATCH_SIZE, 1, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty(BATCH_SIZE, 1, 1, 1).uniform_(-0.2, 0.2)
    return normalize(torch.stack(x)) * gain + shift, torch.stack(y)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy on every second row and column, starting at random: a quarter of the computation."""
    down, right = torch.randint(2, (2,)).tolist()
    labels = labels[:, down::2, right::2].long()
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, weights, ignore_index=IGNORED)


def print_scores(name: str, model: nn.Module, images: Images) -> None:
    """Print the IoU per class and the mIoU of the network, in percent."""
    scores = evaluate({FP32: model}, images, Runtime(batch_size=1))
    for label, value in zip(label_set_of(images).names, iou(scores.total(FP32)), strict=True):
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
