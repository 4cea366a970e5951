"""Comparisons of single images in FP32 and in the simulation: metrics, predictions, and the pixels that changed."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import uniform_filter
from skimage.color import rgb2gray
from skimage.measure import block_reduce
from skimage.morphology import dilation

from ffnet.evaluation.loading import Images, label_set_of, normalize
from ffnet.evaluation.metrics import image_ious, image_mious
from ffnet.evaluation.postprocessing import predict
from ffnet.evaluation.scores import FP32, ONNX_RUNTIME, SIMULATED, Backend, Scores
from ffnet.labels import IGNORED, LabelSet

MAX_WIDTH = 1024  # pixels; of a panel
MAX_PIXELS = 12 * MAX_WIDTH * MAX_WIDTH // 2  # all panels of one kind together; keeps a page below about 8 MB
LEAST_DROP = 0.1  # percentage points; smaller drops of a class's IoU are not mentioned
DIMMED, GRAYS = 0.45, 24  # brightness of the image under the disagreement marks, and number of its gray levels
ZOOM = 8  # factor by which a part of an image is enlarged

# Codes of the disagreement map. A pixel of a reduced panel shows the largest of its codes.
SAME, OTHER, IMPROVED, REGRESSED = range(4)
MARKS = {
    REGRESSED: (f"regressed: right in {FP32}, wrong when quantized", (255, 0, 90)),
    IMPROVED: (f"improved: wrong in {FP32}, right when quantized", (0, 200, 255)),
    OTHER: ("other disagreement: both wrong, or not scored", (255, 214, 0)),
}


def compared_pair(backends: Iterable[str]) -> tuple[str, str]:
    """Return the backends that are compared: FP32 and the simulation or, without one, the quantized file."""
    return FP32, SIMULATED if SIMULATED in backends else ONNX_RUNTIME


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison."""

    title: str
    mime: str
    data: bytes


@dataclass(frozen=True)
class ImageComparison:
    """The metrics, in percent, and the panels of one image."""

    name: str
    mious: dict[str, float]  # backend -> mean over the classes in the label
    agreement: float  # share of all pixels for which both backends predict the same class
    regressed: float  # share of the scored pixels that are right in FP32 and wrong in the simulation
    improved: float  # share of the scored pixels that are wrong in FP32 and right in the simulation
    largest_drops: list[tuple[str, float, float]]  # at most three classes, with their IoU in both backends
    panels: list[Panel]
    window: tuple[float, float]  # corner of the part with most regressed pixels, as shares of height and width
    enlarged: list[Panel]  # both predictions and their disagreement in it

    @property
    def change(self) -> float:
        """The change of the mIoU in percentage points; minus is worse."""
        before, after = self.mious.values()
        return after - before


def worst_images(scores: Scores, count: int) -> list[int]:
    """Return the indices of the `count` images with the largest mIoU drop from FP32 to the simulation.

    Images without labelled pixels are left out. Of equal drops, the image with the lower agreement comes first.
    """
    pair = compared_pair(scores.confusion_matrices)
    before, after = (image_mious(scores.confusion_matrices[name]) for name in pair)
    order = np.lexsort((scores.agreeing_pixels[pair], after - before))  # nan last
    return [int(index) for index in order if not np.isnan(before[index])][:count]


class KeptPredictions:
    """The predictions of the images with the largest mIoU drops so far, which then need not be computed again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._drops: dict[int, float] = {}  # index of an image -> drop
        self.predictions: dict[int, dict[str, np.ndarray]] = {}  # index of an image -> {backend: train ids (H, W)}

    def add(self, indices: Sequence[int], scores: Scores, predictions: Mapping[str, torch.Tensor]) -> None:
        """Keep those of a batch, given the indices of its images, that are among the worst so far."""
        pair = compared_pair(predictions)
        if not self._most or not predictions.keys() >= set(pair):
            return
        before, after = (image_mious(scores.confusion_matrices[name]) for name in pair)
        for position, index in enumerate(indices):
            drop = float(before[position] - after[position])
            least = min(self._drops, key=self._drops.__getitem__) if len(self._drops) == self._most else None
            if math.isnan(drop) or (least is not None and drop <= self._drops[least]):
                continue
            if least is not None:
                del self._drops[least], self.predictions[least]
            self._drops[index] = drop
            self.predictions[index] = {name: predictions[name][position].cpu().numpy() for name in pair}


@torch.inference_mode()
def compare_images(
    indices: Sequence[int],
    images: Images,
    names: Sequence[str],
    backends: Mapping[str, Backend],
    scores: Scores,
    device: str,
    kept: Mapping[int, dict[str, np.ndarray]] = {},
) -> list[ImageComparison]:
    """Compare the images at `indices`, whose `names` follow the order of `images`, in FP32 and in the simulation.

    The backends, which must not be compiled, predict the images again whose predictions are not `kept`, see
    KeptPredictions.
    """
    comparisons, label_set, pair = [], label_set_of(images), compared_pair(backends)
    for index in indices:
        image, labels = (tensor.numpy() for tensor in images[index])
        height, width = labels.shape
        factor = reduction_factor(height, width, len(indices))
        predictions = kept.get(index)
        if predictions is None:
            inputs = normalize(torch.from_numpy(image)[None].to(device))
            predictions = {name: predict(backends[name](inputs), labels.shape)[0].cpu().numpy() for name in pair}
        matrices = {name: scores.confusion_matrices[name][index : index + 1] for name in pair}
        before, after = (100 * image_ious(matrices[name])[0] for name in pair)
        largest = [i for i in np.argsort(after - before)[:3] if before[i] - after[i] >= LEAST_DROP]
        codes = disagreement(labels, *predictions.values())
        scored = max(1, (labels != IGNORED).sum())
        shown = np.array(Image.fromarray(image.transpose(1, 2, 0)).resize((width, height)))  # it may have --input-size
        (top, left), predicted = most_regressed(codes), predictions.items()
        part = slice(top, top + height // ZOOM), slice(left, left + width // ZOOM)
        comparison = ImageComparison(
            name=names[index],
            mious={name: 100 * float(image_mious(matrices[name])[0]) for name in pair},
            agreement=100 * float(scores.agreeing_pixels[pair][index] / scores.pixels[index]),
            regressed=100 * float((codes == REGRESSED).sum() / scored),
            improved=100 * float((codes == IMPROVED).sum() / scored),
            largest_drops=[(label_set.names[i], float(before[i]), float(after[i])) for i in largest],
            panels=draw_panels(shown, labels, predictions, label_set, factor),
            window=(top / height, left / width),
            enlarged=draw_panels(shown[part], labels[part], {n: ids[part] for n, ids in predicted}, label_set, 1)[2:],
        )
        comparisons.append(comparison)
    return comparisons


def reduction_factor(height: int, width: int, count: int) -> int:
    """Return the integer factor by which height and width of the panels of `count` images are reduced."""
    return max(1, math.ceil(width / MAX_WIDTH), math.ceil(math.sqrt(height * width * count / MAX_PIXELS)))


def disagreement(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return codes (H, W) uint8, SAME to REGRESSED, from train ids (H, W) of labels and both backends' predictions."""
    conditions = [before == after, before == labels, after == labels]  # the first that is true decides
    return np.select(conditions, [SAME, REGRESSED, IMPROVED], OTHER).astype(np.uint8)


def most_regressed(codes: np.ndarray) -> tuple[int, int]:
    """Return the upper left corner of the part, 1 / ZOOM as high and wide, with most regressed pixels."""
    size = tuple(length // ZOOM for length in codes.shape)
    share = uniform_filter((codes == REGRESSED).astype(np.float32), [max(1, length) for length in size])
    inside = share[size[0] // 2 :, size[1] // 2 :][: codes.shape[0] - size[0] + 1, : codes.shape[1] - size[1] + 1]
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    return int(row), int(column)


def draw_panels(
    image: np.ndarray, labels: np.ndarray, predictions: dict[str, np.ndarray], label_set: LabelSet, factor: int
) -> list[Panel]:
    """Return five panels of an image (H, W, 3) uint8, its labels and both predictions, train ids (H, W) uint8."""
    small = block_reduce(image, (factor, factor, 1), np.mean).round().astype(np.uint8)
    pngs = {
        title: _encode_palette(ids[::factor, ::factor], label_set.colors)
        for title, ids in {"label": labels, **predictions}.items()
    }
    pngs["disagreement"] = _marks(small, disagreement(labels, *predictions.values()), factor)
    photo = Panel("image", "image/jpeg", _encode(Image.fromarray(small), "JPEG", quality=85))
    return [photo, *(Panel(title, "image/png", data) for title, data in pngs.items())]


def _marks(image: np.ndarray, codes: np.ndarray, factor: int) -> bytes:
    """Return a PNG of the image, gray and dimmed, with disagreement in strong colors, one pixel wider on each side."""
    marked = (rgb2gray(image) * (GRAYS - 1)).round().astype(np.uint8)
    codes = block_reduce(codes, factor, np.max)
    codes = np.where(codes == SAME, dilation(codes, np.ones((3, 3))), codes)  # single pixels would be invisible
    marked = np.where(codes == SAME, marked, GRAYS + codes)
    grays = np.linspace(0, 255 * DIMMED, GRAYS).round().astype(np.uint8)[:, None].repeat(3, 1)
    colors = [MARKS[code][1] if code in MARKS else (0, 0, 0) for code in range(max(MARKS) + 1)]
    return _encode_palette(marked, np.vstack([grays, np.array(colors, np.uint8)]))


def _encode_palette(indices: np.ndarray, colors: np.ndarray) -> bytes:
    """Return a PNG of indices (H, W) uint8 into RGB colors (N, 3) uint8; those from N on are black."""
    picture = Image.fromarray(indices)
    picture.putpalette(colors.tobytes().ljust(3 * 256, b"\0"))
    return _encode(picture, "PNG")


def _encode(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
