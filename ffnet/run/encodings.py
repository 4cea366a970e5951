"""Give a simulation its encodings: load or calibrate them, recover accuracy, or restore what an earlier run kept."""

from collections.abc import Mapping

from aimet_torch.quantsim import QuantizationSimModel
from torch import fx
from torch.utils.data import Dataset

from ffnet.checkpoints.loading import Checkpoint
from ffnet.config import Config
from ffnet.evaluation.loading import Sample
from ffnet.quantization.encodings import LoadedEncodings, load_encodings
from ffnet.quantization.quantsim import calibrate_on_images
from ffnet.quantization.rounded_weights import rounded_layers
from ffnet.quantization.shared_calibration import calibrate_on_ranks
from ffnet.quantization.tf_enhanced import can_share_batches
from ffnet.results.recovery import Recovery
from ffnet.results.result import Calibration
from ffnet.run.inputs import Inputs
from ffnet.run.ranks import TensorExchange
from ffnet.run.recovery import recover
from ffnet.run.session import Run
from ffnet.system.text import count, list_names


def find_encodings(
    sim: QuantizationSimModel, float_network: fx.GraphModule, inputs: Inputs, run: Run
) -> tuple[Calibration, Recovery | None]:
    """Give `sim` its encodings and, after accuracy recovery, its rounded weights, the same on every rank.

    Args:
        sim: not calibrated yet.
        float_network: the equalized network of which `sim` is a simulation.
        inputs: encodings and images.
        run: may go on with what an earlier run has kept; keeps what it finds.

    Returns:
        Where the encodings come from, and what accuracy recovery did; in other processes than the main one None if it
        ran now.
    """
    if run.progress.kept.network:
        with run.stage("restore encodings"):
            return restore_encodings(sim, inputs, run)
    with run.stage("calibrate"):
        calibration = set_encodings(sim, inputs, run)
    recovery = recover(sim, float_network, inputs, run) if run.config.quantization.recovers else None
    if run.ranks.is_main:
        run.progress.keep_network(sim, calibration, recovery, bool(rounded_layers(sim, float_network)))
    return calibration, recovery


def restore_encodings(sim: QuantizationSimModel, inputs: Inputs, run: Run) -> tuple[Calibration, Recovery | None]:
    """Give `sim` the encodings and rounded weights that an earlier run has kept."""
    if inputs.encodings:  # which may separate quantizers that AIMET shares
        load_encodings(sim, inputs.encodings, run.config.quantization.partial_encodings)
    found = run.ranks.share(run.progress.restore_network(sim) if run.ranks.is_main else None)
    run.ranks.share_state(sim)
    _, recovery = found
    run.notes += [recovery.describe()] if recovery else []
    return found


def set_encodings(sim: QuantizationSimModel, inputs: Inputs, run: Run) -> Calibration:
    """Load or calibrate the encodings of `sim`, the same on every rank, and say where they come from."""
    quantization = run.config.quantization
    loaded = load_encodings(sim, inputs.encodings, quantization.partial_encodings) if inputs.encodings else None
    images = inputs.calibration_images if loaded is None or loaded.missing else None
    batch_size = run.runtime.batch_size
    if images is not None:
        batch_size = calibrate_everywhere(sim, images, run)
    run.ranks.share_state(sim)
    number = 0 if images is None else len(images)
    description = describe_encodings(run.config, number, loaded)
    if batch_size < run.runtime.batch_size:
        description += f" The GPU ran out of memory, so batches of {count(batch_size, 'image')} were used."
    return Calibration(number, description)


def calibrate_everywhere(sim: QuantizationSimModel, images: Dataset[Sample], run: Run) -> int:
    """Calibrate a simulation on all ranks together or, if its quantizers can't be shared, on the main process alone.

    Returns:
        The batch size used; that of the options in processes that did nothing.
    """
    ranks = run.ranks
    if ranks.world_size > 1 and can_share_batches(sim):
        exchange = TensorExchange(ranks.rank, ranks.world_size)
        return calibrate_on_ranks(sim, images, run.runtime, exchange, ranks.world_size)
    return calibrate_on_images(sim, images, run.runtime) if ranks.is_main else run.runtime.batch_size


def describe_encodings(config: Config, images: int, loaded: LoadedEncodings | None) -> str:
    """Return sentences that say where the encodings come from; `images`: number of calibration images."""
    data = config.data
    if data.calibration_split == data.split:
        published = "" if config.quantization.recovers else ", as the published results were"
        calibrated = (
            f"Calibrated on {count(images, 'image')} of the split that is scored{published}; with --calibration-split "
            "train no calibration image is scored."
        )
    else:
        calibrated = (
            f"Calibrated on {count(images, 'image')} of the {data.calibration_split} split; none of them is scored."
        )
    if loaded is None:
        return calibrated
    sentences = [f"Encodings, bit widths and symmetry are those of {config.quantization.encodings}."]
    if loaded.prefix:
        sentences.append(f"The prefix {loaded.prefix!r}, which a wrapper adds, was removed from its names.")
    lists = {
        "Quantizers that the file does not cover": loaded.missing,
        "Entries that belong to no quantizer and were ignored": loaded.unexpected,
        "Quantizers that AIMET 2 shares and the file gives separate encodings": loaded.separated,
        "Layers whose weights AdaRound rounded, read from the exported float network beside the file": loaded.rounded,
    }
    sentences += [f"{title} ({len(names)}): {list_names(names)}." for title, names in lists.items() if names]
    return " ".join([*sentences, calibrated] if loaded.missing else sentences)


def quantization_notes(
    config: Config, checkpoint: Checkpoint, raised: Mapping[str, int], calibration: Calibration
) -> list[str]:
    """Return the report's notes on how the network was quantized; `raised`: see raise_weight_scales."""
    notes = list(checkpoint.notes)
    if checkpoint.equalized:
        notes.append("The checkpoint is already equalized, so cross-layer equalization was not applied again.")
    elif not config.quantization.cle:
        notes.append("Cross-layer equalization was not applied.")
    if raised:
        notes.append(f"Weight scales were raised so that biases fit into int32: {', '.join(raised)}.")
    return [*notes, calibration.description]
