"""Notes on what limits the comparison of several models."""

from collections.abc import Sequence

from ffnet.evaluation.backends import FP32, INT8_NPU, INT8_SIMULATED
from ffnet.results.ai_hub import SOURCE
from ffnet.results.comparison import ComparedModel, ModelComparison
from ffnet.system.text import count, list_names
from ffnet.variants import VARIANTS, Published


def all_notes(comparison: ModelComparison) -> list[str]:
    """Return the notes of the run and those on what limits the comparison."""
    limits = (*_incomplete_notes(comparison), *_published_notes(comparison), *_latency_notes(comparison))
    return [*comparison.notes, *limits]


def _short_names(models: Sequence[ComparedModel]) -> str:
    return list_names([model.short_name for model in models])


def _incomplete_notes(comparison: ModelComparison) -> list[str]:
    """Return notes on models without an mIoU, and on those with fewer images than the others."""
    notes = []
    lacking = [model for model in comparison.models if None in (model.int8_miou, model.miou(FP32))]
    if lacking:
        notes.append(f"The mIoU of {FP32} or of {INT8_SIMULATED} is unknown for: {_short_names(lacking)}.")
    partial = [model for model in comparison.models if model.images != comparison.images]
    if partial:
        notes.append(
            f"Not scored on all {count(comparison.images, 'image')}, and therefore not comparable with the others and "
            f"on no Pareto front: {_short_names(partial)}."
        )
    samples = {tuple(model.npu.images) for model in comparison.models if model.npu}
    if len(samples) > 1:
        notes.append(f"The models ran different images on the NPU, so their mIoUs of {INT8_NPU} are not comparable.")
    return notes


def _published_notes(comparison: ModelComparison) -> list[str]:
    """Return a note if some model has a published mIoU that is not comparable with the run's."""
    differing = [model for model in comparison.models if _has_other_published(model)]
    if not differing:
        return []
    return [
        f"A published mIoU exists but is not comparable with this run for {count(len(differing), 'model')}: "
        f"{_short_names(differing)}. The report of each model says why."
    ]


def _has_other_published(model: ComparedModel) -> bool:
    variant = VARIANTS.get(model.name)
    published = variant.published if variant else Published()
    values = {FP32: published.fp32, INT8_SIMULATED: published.int8}
    return any(value is not None and name not in model.published for name, value in values.items())


def _latency_notes(comparison: ModelComparison) -> list[str]:
    """Return notes on the origin of the latency, and on models that AI Hub measured with images of another size."""
    measured = [model for model in comparison.models if model.latency]
    if not measured or not measured[0].latency:
        return []
    notes = [
        f"Latency: W8A8 by TFLite/DLC/ONNX on {measured[0].latency.device}, from {SOURCE}. The fastest of these "
        "runtimes counts for the Pareto front."
    ]
    consequence = "so it does not belong to their mIoU here, and they are not on the front by published latency"
    sizes = [model for model in measured if model.latency and model.latency.input_size != comparison.image_size]
    if sizes:
        size = "{}x{}".format(*comparison.image_size)
        notes.append(
            f"AI Hub measured the latency of these models with images of another size than {size}, {consequence}: "
            f"{_short_names(sizes)}."
        )
    bits = [model for model in measured if not model.w8a8]
    if bits:
        notes.append(
            f"AI Hub measured the latency of these models with 8-bit weights and activations, unlike this run, "
            f"{consequence}: {_short_names(bits)}."
        )
    return notes
