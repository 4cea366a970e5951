"""The images that lose most, as rows of pictures: image, label, predictions, and where the predictions disagree."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from datasets.cityscapes import CLASSES, COLORS, IGNORED
from ffnet.evaluate import normalize
from ffnet.postprocess import predict
from ffnet.tables import image_ious, image_mious, image_name

PAIR = ("FP32", "INT8")
WIDTH = 1024  # of a picture, in pixels, at most
PIXELS = 12 * WIDTH * WIDTH // 2  # of all pictures of one kind together, so that a page stays below some 8 MB
LEAST_FALL = 0.1  # points of a class's IoU in an image that are worth a word
DIMMED = 0.45  # brightness of the image behind the marks

# Codes of the disagreement map: where several fall on one pixel of a smaller picture, the largest is shown.
SAME, OTHER, MENDED, BROKEN = range(4)
MARKS = {
    BROKEN: ("right in FP32, wrong in INT8", (255, 0, 90)),
    MENDED: ("wrong in FP32, right in INT8", (0, 200, 255)),
    OTHER: ("otherwise unlike: both wrong, or not scored", (255, 214, 0)),
}
VOID = ("not scored", (0, 0, 0))


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    mime: str
    data: bytes


@dataclass(frozen=True)
class Row:
    """The pictures of one image and its figures; percentages."""

    name: str
    mious: dict[str, float]  # pass -> over the classes in the label
    agreement: float
    broken: float  # of its scored pixels: right in FP32, wrong in INT8
    mended: float  # wrong in FP32, right in INT8
    falls: list[tuple[str, float, float]]  # class, IoU in FP32 and in INT8: those that fell most, at most three
    panels: list[Panel]


def worst_images(scores, count):
    """Indices of `count` images by how far their own mIoU falls from FP32 to INT8, furthest first.

    An image's mIoU is over the classes in its label; images without any are never among them. Of two that fall alike,
    the one with fewer pixels predicted alike comes first.
    """
    before, after = (image_mious(scores.confusions[name]) for name in PAIR)
    order = np.lexsort((scores.agreements[PAIR], after - before))  # nan last
    return [int(index) for index in order if not np.isnan(before[index])][:count]


def render_rows(indices, images, passes, scores, device):
    """A Row for each index into `images` (a CityscapesSplit).

    The predictions of these images are made anew by the passes named FP32 and INT8 in `passes` (name -> callable, not
    compiled); the figures are those of `scores`.
    """
    factor = reduction(images.height, images.width, len(indices))
    rows = []
    for index in indices:
        image, labels = images[index]
        predictions = {name: _predict(passes[name], image, labels.shape, device) for name in PAIR}
        panels = draw(image.numpy().transpose(1, 2, 0), labels.numpy(), predictions, factor)
        rows.append(_row(image_name(images.images[index]), index, scores, labels.numpy(), predictions, panels))
    return rows


def reduction(height, width, count):
    """The whole number by which pictures of `count` images of this size are made smaller."""
    return max(1, math.ceil(width / WIDTH), math.ceil(math.sqrt(height * width * count / PIXELS)))


@torch.inference_mode()
def _predict(model, image, size, device):
    return predict(model(normalize(image[None].to(device))), size)[0].cpu().numpy()


def _row(name, index, scores, labels, predictions, panels):
    own = {key: scores.confusions[key][index : index + 1] for key in PAIR}
    before, after = (100 * image_ious(own[key])[0] for key in PAIR)
    order = [i for i in np.argsort(after - before)[:3] if before[i] - after[i] >= LEAST_FALL]
    codes = disagreement(labels, *predictions.values())
    scored = max(1, (labels != IGNORED).sum())
    return Row(
        name=name,
        mious={key: 100 * float(image_mious(own[key])[0]) for key in PAIR},
        agreement=100 * float(scores.agreements[PAIR][index] / scores.pixels),
        broken=100 * float((codes == BROKEN).sum() / scored),
        mended=100 * float((codes == MENDED).sum() / scored),
        falls=[(CLASSES[i], float(before[i]), float(after[i])) for i in order],
        panels=panels,
    )


def disagreement(labels, before, after):
    """Codes (H, W) uint8, SAME to BROKEN, of train ids (H, W): labels, FP32's and INT8's predictions."""
    codes = np.full(labels.shape, OTHER, np.uint8)
    codes[before == after] = SAME
    codes[(before != after) & (before == labels)] = BROKEN
    codes[(before != after) & (after == labels)] = MENDED
    return codes


def draw(image, labels, predictions, factor):
    """The five panels of an image (H, W, 3) uint8, its labels and {pass: predictions}, train ids (H, W) uint8."""
    from skimage.transform import downscale_local_mean

    small = downscale_local_mean(image, (factor, factor, 1)).round().astype(np.uint8)
    classes = {"label": labels} | predictions
    return [
        Panel("image", "image/jpeg", _encode(Image.fromarray(small), "JPEG", quality=85)),
        *(Panel(title, "image/png", _class_map(ids[::factor, ::factor])) for title, ids in classes.items()),
        Panel("where they disagree", "image/png", _marks(small, disagreement(labels, *predictions.values()), factor)),
    ]


def _class_map(ids):
    """PNG of train ids (H, W) in Cityscapes' colours, what is not scored in black."""
    picture = Image.fromarray(ids)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(COLORS)] = COLORS
    picture.putpalette(palette.tobytes())
    return _encode(picture, "PNG")


def _marks(image, codes, factor):
    """PNG of the image, grey and dimmed, with the disagreement in strong colours, a pixel wider all around."""
    from skimage.color import gray2rgb, rgb2gray
    from skimage.measure import block_reduce
    from skimage.morphology import dilation
    from skimage.util import img_as_ubyte

    marked = img_as_ubyte(gray2rgb(rgb2gray(image) * DIMMED))
    codes = block_reduce(codes, factor, np.max)
    codes = np.where(codes == SAME, dilation(codes, np.ones((3, 3))), codes)  # or single pixels would not be seen
    for code, (_, color) in MARKS.items():
        marked[codes == code] = color
    return _encode(Image.fromarray(marked), "PNG")


def _encode(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
