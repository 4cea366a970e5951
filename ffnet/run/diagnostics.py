"""Find the images and layers with the largest drops, and where ONNX Runtime diverges from the simulation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aimet_torch.quantsim import QuantizationSimModel
from torch import fx

from datasets.cityscapes import CityscapesSplit
from ffnet.evaluation.backends import INT8_ONNX_RUNTIME, INT8_SIMULATED, Backend
from ffnet.evaluation.loading import normalize
from ffnet.evaluation.scores import Scores
from ffnet.onnx.divergence import compare_layers, first_divergence
from ffnet.onnx.inspection import inspect_onnx
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.sensitivity import analyze_sensitivity
from ffnet.quantization.sites import quantizer_sites
from ffnet.results.images import ImageComparison, compare_images, worst_images
from ffnet.results.result import Diagnostics
from ffnet.run.inputs import Inputs
from ffnet.run.session import Run
from ffnet.system.errors import UserError

MIOU_TOLERANCE = 0.2  # percentage points by which simulation and ONNX Runtime may differ without an explanation
LEAST_AGREEMENT = 99.0  # percent, their least prediction agreement without an explanation


@dataclass(frozen=True)
class Networks:
    """The quantized network in its three forms."""

    float_network: fx.GraphModule  # equalized, not quantized
    sim: QuantizationSimModel
    lowered: fx.GraphModule


def attempt(work: Callable[[], Diagnostics], run: Run) -> tuple[Diagnostics, BaseException | None]:
    """Return the diagnostics or the error that ended `work`, so that the scores are reported in either case."""
    try:
        with run.stage("diagnose"):
            return work(), None
    except KeyboardInterrupt as interrupt:
        return Diagnostics(), interrupt
    except Exception as error:
        return Diagnostics(), UserError(f"The scores are reported, but the diagnostics failed: {error}")


def diagnose(
    networks: Networks,
    backends: Mapping[str, Backend],
    inputs: Inputs,
    scores: Scores | None,
    run: Run,
) -> Diagnostics:
    """Find the images and layers with the largest drops, if the options ask for them; add notes on ONNX Runtime.

    Without `scores`, in a process that is not the main one, it does nothing.
    """
    if scores is None:
        return Diagnostics()
    output, images, device = run.config.output, inputs.calibration_images, run.ranks.device
    worst: list[ImageComparison] = []
    sensitivity = None
    if output.output_dir:
        worst = compare_images(worst_images(scores, output.worst), inputs.images, backends, scores, device)
    if output.sensitivity and images is not None:
        indices = range(min(output.sensitivity_images, len(images)))
        batches = [normalize(images[index][0][None].to(device)) for index in indices]
        sensitivity = analyze_sensitivity(
            networks.sim, networks.float_network, networks.lowered, batches, not run.runtime.quiet
        )
    backend = backends.get(INT8_ONNX_RUNTIME)
    if isinstance(backend, OnnxBackend):
        run.notes += onnx_runtime_notes(networks, backend.path, inputs.images, scores)
    return Diagnostics(tuple(worst), sensitivity)


def onnx_runtime_notes(networks: Networks, path: Path, images: CityscapesSplit, scores: Scores) -> list[str]:
    """Return notes on ONNX Runtime's integer kernels and, if it differs from the simulation, on where it diverges."""
    notes = [f"{INT8_ONNX_RUNTIME}: {line}" for line in inspect_onnx(path).kernel_lines()]
    mious = scores.miou(INT8_SIMULATED), scores.miou(INT8_ONNX_RUNTIME)
    agreement = scores.agreement(INT8_SIMULATED, INT8_ONNX_RUNTIME)
    if not differ(mious, agreement):
        return notes
    image = normalize(images[0][0][None])
    divergence = first_divergence(compare_layers(networks.lowered, quantizer_sites(networks.sim), path, image))
    where = divergence.describe("ONNX Runtime") if divergence else "No layer diverges."
    return [
        *notes,
        f"{INT8_ONNX_RUNTIME} is far from {INT8_SIMULATED}: {mious[1]:.2f} and {mious[0]:.2f} mIoU, {agreement:.2f} % "
        f"of the pixels predicted alike. {where} (Compared on the first image.)",
    ]


def differ(mious: tuple[float, float], agreement: float) -> bool:
    """Return whether two backends that should agree differ by more than MIOU_TOLERANCE or agree on too few pixels."""
    both_nan = mious[0] != mious[0] and mious[1] != mious[1]
    return not (both_nan or abs(mious[0] - mious[1]) <= MIOU_TOLERANCE) or agreement < LEAST_AGREEMENT
