"""One sweep over the images scores every model at once, so that an image is decoded once."""

import contextlib
import itertools
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ffnet import fast, metrics
from ffnet.errors import UserError
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
    return inputs.contiguous(memory_format=fast.memory_format(images.device))


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
    tally, unsaved = Tally(passes), None
    run = Halving(passes, device, top_two)
    with tqdm(batches, "evaluate", unit="batch", dynamic_ncols=True, disable=not progress) as bar:
        for batch in bar:
            for scored in run(*batch):
                if writer and not unsaved:
                    unsaved = write(writer, tally.count, scored.predictions)
                tally.add(scored)
            bar.set_postfix_str(tally.brief())
    return tally.scores(run.batch_size, unsaved)


@dataclass(frozen=True)
class Scored:
    """What became of a batch; the keys are those of `passes`, or two of them."""

    predictions: dict  # (N, H, W) uint8 train ids, on the device
    confusions: dict  # (N, 19, 19) int64 numpy
    agreements: dict  # N counts of pixels predicted alike
    seconds: dict  # in the model
    scoring_seconds: float  # behind it, all passes together


def score(passes, images, labels, device, top_two=None):
    """The Scored of uint8 images (N, 3, H, W) and train ids (N, H, W), on the CPU or the device.

    UserError where logits are not finite.
    """
    inputs = normalize(images.to(device, non_blocking=True))
    labels = labels.to(device, non_blocking=True)
    predictions, seconds, begin = {}, {}, clock(device)
    for name, network in passes.items():
        before = clock(device)
        logits = network(inputs)
        seconds[name] = clock(device) - before
        if not logits.sum().isfinite():
            raise UserError(f"{name}: its logits are infinite or no numbers; take another checkpoint or file")
        predictions[name] = predict(logits, labels.shape[1:], top_two).to(device)
    confusions = {name: confusion_matrices(labels, ids) for name, ids in predictions.items()}
    pairs = itertools.combinations(predictions, 2)
    agreements = {(a, b): (predictions[a] == predictions[b]).sum((1, 2)).tolist() for a, b in pairs}
    return Scored(predictions, confusions, agreements, seconds, clock(device) - begin - sum(seconds.values()))


@torch.inference_mode()
def warm_up(quick, size, batch_size, device):
    """Runs fast.Fast's passes once on noise of `size`, (height, width): what compiles then does not count as theirs."""
    if not quick.compiled:
        return
    images = torch.randint(0, 256, (1 if device.type == "cpu" else batch_size, 3, *size), dtype=torch.uint8)
    # Where the memory does not suffice, the sweep is going to say so.
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        score(quick.passes, images, images[:, 0], device, quick.top_two)


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
        self.seconds = dict.fromkeys(passes, 0.0)
        self.scoring_seconds = 0.0
        self.pixels = self.count = 0

    def add(self, scored):
        """Counts a batch."""
        for name, matrices in scored.confusions.items():
            self.confusions[name] += list(matrices)
            self.running[name] += matrices.sum(0)
            self.seconds[name] += scored.seconds[name]
        for pair, counts in scored.agreements.items():
            self.agreements[pair] += counts
        self.scoring_seconds += scored.scoring_seconds
        ids = next(iter(scored.predictions.values()))
        self.count, self.pixels = self.count + len(ids), ids[0].numel()

    def brief(self):
        """The running mIoU of every pass, for the progress bar."""
        return ", ".join(f"{name} {100 * metrics.mean_iou(matrix):.2f}" for name, matrix in self.running.items())

    def scores(self, batch_size, unsaved):
        confusions = {
            name: np.array(matrices, np.int64).reshape(-1, NUM_CLASSES, NUM_CLASSES)
            for name, matrices in self.confusions.items()
        }
        agreements = {pair: np.array(counts, np.int64) for pair, counts in self.agreements.items()}
        return Scores(confusions, agreements, self.pixels, self.seconds, self.scoring_seconds, batch_size, unsaved)


class Halving:
    """Scores batches, in smaller ones from the moment that the GPU's memory does not suffice."""

    def __init__(self, passes, device, top_two):
        self.passes, self.device, self.top_two = passes, device, top_two
        self.batch_size = None  # None: no batch was ever too large

    def __call__(self, images, labels):
        """Yields the Scored of a batch's parts, which are the whole batch as long as that is possible."""
        at = 0
        while at < len(images):
            part = slice(at, at + (self.batch_size or len(images)))
            try:
                scored = score(self.passes, images[part], labels[part], self.device, self.top_two)
            except torch.cuda.OutOfMemoryError as error:
                self.batch_size = halved(len(images[part]), error)
                for network in self.passes.values():
                    fast.shrink(network, self.batch_size)
                continue
            yield scored
            at = part.stop


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
