"""The table of the published variants, which `--list-models` prints. Needs no torch."""

from ffnet.results.published import MIOU_DEVICE, MIOU_IMAGES, SOURCE, ai_hub_result
from ffnet.system.text import describe_size, format_number, format_table
from ffnet.variants import INPUT_SIZE, VARIANTS, Variant

HEADINGS = (
    "model", "parameters", "input", "output", "FP32 mIoU", "INT8 mIoU", "S25 input", "S25 float mIoU", "S25 W8A8 mIoU",
    "S25 W8A8 ms",
)  # fmt: skip
S25_NOTE = (
    f"S25: on a {MIOU_DEVICE}, from {SOURCE}; mIoU on {MIOU_IMAGES} images (W8A8 by ONNX), latency by TFLite/DLC/ONNX."
)


def format_models() -> str:
    """Return a table: parameters, sizes in pixels, published mIoU in percent, and AI Hub's results on an S25."""
    rows = [_row(variant) for variant in VARIANTS.values() if not variant.is_demo]
    return f"{format_table([HEADINGS, *rows])}\n\n{S25_NOTE}"


def _row(variant: Variant) -> list[str]:
    published, found = variant.published, ai_hub_result(variant.name)
    mious = (found.float_miou, found.w8a8_miou["onnx"]) if found else (None, None)
    return [
        variant.name,
        f"{variant.parameters:.2f} M",
        describe_size(INPUT_SIZE),
        _output_size(variant),
        *(format_number(miou, 1) for miou in (published.fp32, published.int8)),
        describe_size(found.input_size) if found else "-",
        *(format_number(miou, 1) for miou in mious),
        found.describe_latency() if found else "-",
    ]


def _output_size(variant: Variant) -> str:
    """Return height and width of the logits, which have the size of the finest feature map."""
    first_stage = 1 if variant.stem == "C" else variant.strides[0]  # stem C takes its finest map before the first stage
    stride = 4 * first_stage * (2 if variant.pre_down else 1)
    return "x".join(str(length // stride) for length in INPUT_SIZE)
