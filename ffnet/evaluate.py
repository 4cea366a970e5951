"""One sweep over the images scores every model at once, so that an image is decoded once."""

import dataclasses
import itertools
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ffnet import metrics
from ffnet.errors import UserError
from ffnet.fast import memory_format
from ffnet.postprocess import confusion_matrices, predict
from ffnet.variants import NUM_CLASSES

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1: what the published weights were trained with
STD = (0.229, 0.224, 0.225)


@dataclass
class Scores:
    """What a sweep found: for every pass a confusion matrix an image, for every two passes the pixels they agree on."""

    confusions: dict[str, np.ndarray]  # pass -> (images, 19, 19) int64, row = label
    agreements: dict[tuple[str, str], np.ndarray]  # two passes -> (images,) int64, pixels predicted alike
    pixels: int  # of one image, scored or not
    seconds: dict[str, float]  # pass -> time in the model, without decoding and scoring
    scoring_seconds: float = 0.0  # from logits to counts, all passes together
    batch_size: int | None = None  # what it came down to where the GPU's memory did not suffice
    unsaved: str | None = None  # why predictions were not all written

    def total(self, name):
        """The confusion matrix (19, 19) int64 of a pass over all images."""
        return self.confusions[name].sum(0)


def loader(dataset, batch_size, workers, device):
    """Batches (images uint8 (N, 3, H, W), train ids uint8 (N, H, W)) in the order of the dataset."""
    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_batched, pin_memory=device.type == "cuda")


def _batched(items):
    """Images and train ids of a batch; of one pair without copying it."""
    return tuple(parts[0][None] if len(parts) == 1 else torch.stack(parts) for parts in zip(*items, strict=True))


def normalize(images):
    """uint8 RGB (N, 3, H, W) -> float32 as the networks take it, on the same device, in its faster memory format."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    inputs = (images.float() / 255 - mean) / std
    return inputs.contiguous(memory_format=memory_format(images.device))


def calibration_inputs(batches, device, progress=True):
    """Normalized batches on `device`, with a bar on stderr where there is to be `progress`."""
    for images, _ in tqdm(batches, "calibrate", unit="batch", dynamic_ncols=True, disable=not progress):
        yield normalize(images.to(device, non_blocking=True))


@torch.inference_mode()
def sweep(passes, batches, device, top_two=None, writer=None, progress=True):
    """Scores of the models in `passes` (name -> callable), each batch of `batches` going through all of them.

    `top_two`: the compiled kernel for postprocess.predict. `writer(index, {name: train ids (H, W) uint8 numpy})` is
    called for every image until it raises an OSError: figures matter more than files. `progress`: a bar on stderr with
    the running mIoU. A batch for which the GPU's memory does not suffice is run in halves, and so are all after it.
    """
    tally = Tally(passes)
    run = Halving(passes, top_two)
    count, unsaved = 0, None
    with tqdm(batches, "evaluate", unit="batch", dynamic_ncols=True, disable=not progress) as bar:
        for images, labels in bar:
            inputs = normalize(images.to(device, non_blocking=True))
            labels = labels.to(device, non_blocking=True)
            predictions = {name: run(name, inputs, labels.shape[1:]) for name in passes}
            begin = clock(device)
            tally.add(labels, predictions)
            run.scoring_seconds += clock(device) - begin
            if writer and not unsaved:
                unsaved = write(writer, count, predictions)
            count += len(labels)
            bar.set_postfix_str(tally.brief())
    return dataclasses.replace(tally.scores(run), unsaved=unsaved)


def write(writer, first, predictions):
    """Gives a batch's predictions to the writer; returns why it failed, or None."""
    try:
        for offset in range(len(next(iter(predictions.values())))):
            writer(first + offset, {name: ids[offset].cpu().numpy() for name, ids in predictions.items()})
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None


class Tally:
    """The counts of a sweep so far."""

    def __init__(self, passes):
        self.confusions = {name: [] for name in passes}  # a list of (19, 19) int64, an image each
        self.agreements = {pair: [] for pair in itertools.combinations(passes, 2)}
        self.running = {name: np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64) for name in passes}
        self.pixels = 0

    def add(self, labels, predictions):
        """Counts a batch: labels (N, H, W) and, for every pass, predictions (N, H, W), uint8 train ids."""
        self.pixels = labels[0].numel()
        for name, predicted in predictions.items():
            matrices = confusion_matrices(labels, predicted)
            self.confusions[name] += list(matrices)
            self.running[name] += matrices.sum(0)
        for (one, other), counts in self.agreements.items():
            counts += (predictions[one] == predictions[other]).sum((1, 2)).tolist()

    def brief(self):
        """The running mIoU of every pass, for the progress bar."""
        return ", ".join(f"{name} {100 * metrics.mean_iou(matrix):.2f}" for name, matrix in self.running.items())

    def scores(self, run):
        confusions = {
            name: np.array(matrices, np.int64).reshape(-1, NUM_CLASSES, NUM_CLASSES)
            for name, matrices in self.confusions.items()
        }
        agreements = {pair: np.array(counts, np.int64) for pair, counts in self.agreements.items()}
        return Scores(confusions, agreements, self.pixels, run.seconds, run.scoring_seconds, run.batch_size)


class Halving:
    """Runs passes on batches, in smaller ones from the moment that the GPU's memory does not suffice."""

    def __init__(self, passes, top_two):
        self.passes, self.top_two = passes, top_two
        self.seconds = dict.fromkeys(passes, 0.0)
        self.scoring_seconds = 0.0
        self.batch_size = None  # None: no batch was ever too large

    def __call__(self, name, inputs, size):
        """Train ids (N, H, W) uint8 of inputs (N, 3, h, w) by the named pass."""
        done = []
        while (at := sum(map(len, done))) < len(inputs):
            chunk = inputs[at : at + (self.batch_size or len(inputs))]
            try:
                begin = clock(inputs.device)
                logits = self.passes[name](chunk)
                between = clock(inputs.device)
                done.append(predict(logits, size, self.top_two).to(inputs.device))
                self.scoring_seconds += clock(inputs.device) - between
                self.seconds[name] += between - begin
            except torch.cuda.OutOfMemoryError as error:
                self.batch_size = halved(len(chunk), error)
        return torch.cat(done)


def halved(batch_size, error):
    """Half the batch size, which is said on stderr; UserError where one image is too much already."""
    if batch_size == 1:
        raise UserError("the GPU's memory does not suffice for one image; give --use-cuda false") from error
    torch.cuda.empty_cache()
    tqdm.write(f"Out of GPU memory: going on with batches of {batch_size // 2}.", file=sys.stderr)
    return batch_size // 2


def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
