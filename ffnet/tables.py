"""CSV files for those who go on computing, and the list of models.

Percentages have four decimals; an empty cell stands where a class does not occur. UTF-8, one line of headings.
"""

import csv
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np

from datasets.cityscapes import CLASSES, IMAGE_SUFFIX
from ffnet import metrics
from ffnet.output import write_whole
from ffnet.report import columns
from ffnet.variants import INPUT_SIZE, VARIANTS


def image_ious(matrices):
    """IoU (images, 19) float64 of each image's own confusion matrix (images, 19, 19); nan where its label lacks the
    class."""
    ious = np.array([metrics.iou(matrix) for matrix in matrices])
    return np.where(matrices.sum(2) > 0, ious, np.nan)


def image_mious(matrices):
    """mIoU (images,) float64 of each image alone, over the classes that its label holds; nan where it holds none.

    Unlike the data set's mIoU it leaves out classes that were only predicted: a single stray pixel would count as a
    whole class.
    """
    ious = image_ious(matrices)
    counts = (~np.isnan(ious)).sum(1)
    return np.divide(np.nansum(ious, 1), counts, out=np.full(len(ious), np.nan), where=counts > 0)


def image_name(path):
    """`<city>_<sequence>_<frame>` of an image's path."""
    return Path(path).name.removesuffix(IMAGE_SUFFIX)


def write_per_class(path, result):
    """per_class.csv: `class`; `labelled pixels`; for every pass `<pass> IoU`; `<pass> - <first pass>` in points."""
    passes = result["passes"]
    first, *others = passes
    rows = [("class", "labelled pixels", *(f"{n} IoU" for n in passes), *(f"{n} - {first}" for n in others))]
    for index, name in enumerate(CLASSES):
        ious = [entry["iou"][name] for entry in passes.values()]
        changes = [None if None in (iou, ious[0]) else iou - ious[0] for iou in ious[1:]]
        pixels = sum(passes[first]["confusion_matrix"][index])
        rows.append((name, pixels, *map(_decimal, ious), *map(_decimal, changes)))
    return _write(path, rows)


def write_per_image(path, paths, scores):
    """per_image.csv: `image`; for every pass `<pass> mIoU` (over the classes in the image's label), `<pass> pixel
    accuracy` and `<pass> IoU <class>` for the 19 classes; for every two passes `<pass>|<pass> agreement`, in percent.

    `paths`: of the images, in the order in which `scores` holds them.
    """
    table = {"image": [image_name(path) for path in paths]}
    for name, matrices in scores.confusions.items():
        table[f"{name} mIoU"] = _percents(image_mious(matrices))
        table[f"{name} pixel accuracy"] = _percents(map(metrics.pixel_accuracy, matrices))
        for class_name, ious in zip(CLASSES, image_ious(matrices).T, strict=True):
            table[f"{name} IoU {class_name}"] = _percents(ious)
    for pair, counts in scores.agreements.items():
        table[f"{'|'.join(pair)} agreement"] = _percents(counts / scores.pixels)
    return _write(path, [table.keys(), *zip(*table.values(), strict=True)])


def write_sensitivity(path, sensitivity):
    """sensitivity.csv: the fields of sensitivity.Row and `gain_off`, in dB over all quantizers on, in order of rank."""
    rows = [asdict(row) | {"gain_off": sensitivity.gain(row)} for row in sensitivity.rows]
    cells = [[_decimal(value) if isinstance(value, float | None) else value for value in row.values()] for row in rows]
    return _write(path, [rows[0].keys(), *cells])


def _percents(shares):
    return [_decimal(None if np.isnan(share) else 100 * share) for share in shares]


def _decimal(value):
    return "" if value is None else f"{value:.4f}"


def _write(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return write_whole(path, text.getvalue())


def list_models():
    """The published variants as text: parameters in millions, sizes in pixels, published mIoU in percent."""
    rows = [("model", "parameters", "input", "output", "FP32 mIoU", "INT8 mIoU")]
    for variant in VARIANTS.values():
        if not variant.is_demo:
            published = (variant.published.fp32, variant.published.int8)
            figures = ("-" if figure is None else f"{figure:.1f}" for figure in published)
            millions = f"{_parameters(variant.name) / 1e6:.2f} M"
            rows.append((variant.name, millions, _size(1), _size(_reduction(variant)), *figures))
    return columns(rows)


def _size(divisor):
    return "x".join(str(length // divisor) for length in INPUT_SIZE)


def _reduction(variant):
    """How many times smaller than the input the logits are: as the finest feature map."""
    first_stage = 1 if variant.stem == "C" else variant.strides[0]  # that of stem C lies behind its finest map
    return 4 * first_stage * (2 if variant.pre_down else 1)


def _parameters(name):
    import torch

    from ffnet.model import build_model

    with torch.device("meta"):  # without memory for the weights
        return sum(parameter.numel() for parameter in build_model(name).parameters())
