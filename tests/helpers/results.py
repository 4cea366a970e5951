"""Small results for the tests of the report."""

import dataclasses

import numpy as np
import torch

from datasets.cityscapes import CityscapesSplit
from ffnet.config import Config, Runtime
from ffnet.evaluation import metrics
from ffnet.evaluation.loop import evaluate
from ffnet.evaluation.metrics import Estimate
from ffnet.evaluation.scores import FP32, NPU, ONNX_RUNTIME, SIMULATED, BackendNames, Scores
from ffnet.labels import CITYSCAPES
from ffnet.options import option_values
from ffnet.quantization.layers import ActivationHistogram, LayerRow, Layers, Sqnr, WeightRanges
from ffnet.quantization.recovery.outcome import RaisedQuantizer, Recovery, RecoveryStep
from ffnet.quantization.sensitivity import Sensitivity, SensitivityRow
from ffnet.results import result as results
from ffnet.results.comparison import ComparedModel, ModelComparison, compare_model
from ffnet.results.images import compare_images, worst_images
from ffnet.results.published import DeviceResult
from ffnet.results.result import Calibration, CheckpointInfo, ChipResult, Details, Diagnostics, NpuResult, Result
from tests.helpers.names import INT8_NPU, INT8_SIMULATED

PAIR = (FP32, SIMULATED)
NAMES = BackendNames()
CPU = "cpu"
SIZE = (2, 4)  # height, width of the images
MIXED = "mixed precision"
ZOO = (  # the five models that AI Hub published
    "segmentation_ffnet40S_dBBB_mobile",
    "segmentation_ffnet54S_dBBB_mobile",
    "segmentation_ffnet78S_dBBB_mobile",
    "segmentation_ffnet78S_BCC_mobile",
    "segmentation_ffnet122NS_CCC_mobile",
)


def small_scores(**changes):
    """Two images and two classes: in INT8 one pixel of the first class is predicted as the second."""
    fp32, int8 = np.zeros((2, 19, 19), np.int64), np.zeros((2, 19, 19), np.int64)
    fp32[:, 0, 0], fp32[:, 1, 1] = 4, 2
    int8[:, 0, 0], int8[:, 1, 1] = 4, 2
    int8[0, 0, 0], int8[0, 0, 1] = 3, 1
    scores = Scores(
        dict(zip(PAIR, (fp32, int8), strict=True)),
        {PAIR: np.array([7, 8])},
        np.array([8, 8]),
        dict(zip(PAIR, (0.5, 1.0), strict=True)),
    )
    return dataclasses.replace(scores, **changes)


def small_result(scores=None, diagnostics=None, failure=None, size=SIZE, **changes):
    """A Result of `scores` with `changes` to its fields."""
    scores = scores or small_scores()
    count, backends = scores.images, BackendNames(changes.get("precision", NAMES.precision))
    names = tuple(f"ulm_{i:06d}_000019" for i in range(count))
    result = Result(
        schema=results.SCHEMA,
        model="segmentation_ffnet40S_dBBB_mobile",
        dataset="Cityscapes val",
        images=count,
        device="CPU",
        notes=["a note"],
        published={FP32: 79.2, INT8_SIMULATED: 78.9},
        checkpoint=CheckpointInfo("/weights/a.pth", "0" * 64, "state_dict"),
        calibration=Calibration(count, 8, "calibrated on the images that are scored"),
        recovery=None,
        precision=NAMES.precision,
        label_set=CITYSCAPES.name,
        classes=results.class_counts(scores, CITYSCAPES),
        backends=results.backend_results(scores, backends, CITYSCAPES.names),
        agreement=results.agreement(scores, backends),
        npu=None,
        other_npus=[],
        npu_chips=[],
        layers=None,
        baseline=None,
        compilation="FP32 and the simulation were not compiled: a reason.",
        processor_share=0.9,
        stage_seconds={"load": 1.25, "evaluate": 12.25},
        options=option_values(Config()) | {"model_name": "segmentation_ffnet40S_dBBB_mobile"},
        command="ffnet_quanteval.py --dataset-path '/a b/c'",
        versions=results.versions(),
        details=Details(scores, names, size, CITYSCAPES, diagnostics or Diagnostics(), failure),
    )
    return dataclasses.replace(result, **changes)


def small_sensitivity():
    """Three quantizers in order of rank; the last one alone changes nothing."""
    rows = [
        SensitivityRow("conv0", "weight", "weight", 1, 8, 12.5, 97.0, 20.25, 99.0),
        SensitivityRow("relu", "activation", "output", 2, 8, 30.0, 99.0, 10.5, 95.0),
        SensitivityRow("conv0", "activation", "input", 0, 8, None, 100.0, 10.0, 95.0),
    ]
    return Sensitivity(rows, 10.0, 95.0, 8)


def small_recovery(**changes):
    """Five steps on four images, of which the last one meets the target; three of them cost the same."""
    steps = [
        RecoveryStep("plain", 78.0, (70.0, 84.0), -2.0, (-3.0, -1.0), 0.5, 0.5, 10.0, True, False),
        RecoveryStep("sequential MSE", 78.5, (71.0, 84.5), -1.5, (-2.5, -0.5), 0.5, 0.5, 20.0, True, False),
        RecoveryStep(
            "sequential MSE and AdaRound", 78.25, (70.5, 84.25), -1.75, (-2.75, -0.75), 0.5, 0.5, 90.0, False, False
        ),
        RecoveryStep(
            f"{MIXED}, 2 of 10 raised", 79.25, (72.0, 85.0), -0.75, (-1.5, 0.0), 0.8125, 0.625, 7.25, False, True
        ),
        RecoveryStep(f"{MIXED}, 1 of 10 raised", 79.125, None, -0.875, None, 0.625, 0.5625, 6.0, True, True),
    ]
    recovery = Recovery(
        target=1.0,
        fp32_miou=80.0,
        steps=steps,
        chosen=steps[-1].name,
        raised=[RaisedQuantizer("conv0", "weight", 8), RaisedQuantizer("relu", "output", 16)],
        selection_images=[f"ulm_{i:06d}_000019" for i in range(4)],
        scored_too=False,
        interrupted=False,
    )
    return dataclasses.replace(recovery, **changes)


def unlabelled_recovery():
    """The same without a labelled pixel on the selection images."""
    recovery = small_recovery()
    unknown = dict.fromkeys(("miou", "miou_interval", "change", "change_interval"))
    steps = [dataclasses.replace(step, **unknown) for step in recovery.steps]
    return dataclasses.replace(recovery, target=None, fp32_miou=None, steps=steps, raised=[])


def small_npu(**changes):
    """The NPU's result on the two images of small_scores, with the predictions of the simulation there."""
    matrices = small_scores().confusion_matrices
    npu = NpuResult(
        chip="sm8750",
        same_chips=[],
        name="Snapdragon 8 Elite",
        soc_model=69,
        architecture="v79",
        hardware=False,
        version="2.7.0",
        processes=2,
        cpu_nodes=[],
        requested_images=2,
        images=["ulm_000000_000019", "ulm_000001_000019"],
        classes=results.class_counts(small_scores(), CITYSCAPES),
        backends=results.backend_results(
            small_scores(
                confusion_matrices={FP32: matrices[FP32], NPU: matrices[SIMULATED]},
                seconds={FP32: 0.5, NPU: 8.0},
            ),
            NAMES,
            CITYSCAPES.names,
        ),
        agreement={f"{FP32}|{INT8_NPU}": 93.75},
        published={},
    )
    return dataclasses.replace(npu, **changes)


def several_chips():
    """The fields of a Result for two groups of chips, of which the second changes nothing, and a chip that refuses."""
    of_fp32 = small_npu().backends[FP32]
    backends = small_npu().backends | {INT8_NPU: dataclasses.replace(of_fp32, change=0.0)}
    rows = {
        "sm8450": ("sm8450", None),
        "qcs6490": (None, "the reason"),
        "sm8650": ("sm8450", None),
        "sm8750": ("sm8750", None),
    }
    chips = [
        ChipResult(chip, error=error, refused=["conv0 (Conv2d)"] if error else [], logits=group)
        for chip, (group, error) in rows.items()
    ]
    chips[-1] = dataclasses.replace(chips[-1], latency="4.0/-/5.0", measured_change=-0.2)
    others = [small_npu(backends=backends)]
    return {"npu": small_npu(chip="sm8450", same_chips=["sm8650"]), "other_npus": others, "npu_chips": chips}


def small_layers(layer="conv0", chip=INT8_NPU):
    """Two layers in the simulation and on the NPU, which computes the first one exactly."""
    histogram = ActivationHistogram(layer, 0.0, 2.55, 0.01, [1] * 16 + [100] * 64 + [0] * 16, 0.0025)
    return Layers(
        images=["ulm_000000_000019"],
        rows=[
            LayerRow("image", "image", 8, {INT8_SIMULATED: Sqnr(40.0, 40.0), chip: Sqnr(None, None)}),
            LayerRow(layer, "module_add_1", 8, {INT8_SIMULATED: Sqnr(20.0, 30.0), chip: Sqnr(50.0, 60.0)}),
        ],
        histograms=[histogram],
        weights=[WeightRanges(layer, 35.5, [0.001, 1.0, 0.0], [0.1, 0.2, 0.0])],
    )


def noise_result(tree):
    """A Result with all diagnostics of three backends on the images of `tree`; no pole in labels and the simulation."""
    images = CityscapesSplit(tree, "val")
    backends = {FP32: noisy_backend(0), SIMULATED: noisy_backend(0.5), ONNX_RUNTIME: noisy_backend(0.6)}
    scores = evaluate(backends, images, Runtime(batch_size=2, quiet=True))
    for matrices in scores.confusion_matrices.values():
        matrices[:, 5] = 0
    scores.confusion_matrices[SIMULATED][:, :, 5] = 0
    worst = compare_images(worst_images(scores, 2), images, images.names, backends, scores, CPU)
    diagnostics = Diagnostics(tuple(worst), small_sensitivity())
    return small_result(scores, diagnostics, recovery=small_recovery(), npu=small_npu(), layers=small_layers())


def noisy_backend(noise):
    """A network that depends on the image: logits at an eighth of its size, the less like noise 0's the more noise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(19, 3, 1, 1, generator=generator)
    weight += noise * torch.randn(19, 3, 1, 1, generator=generator)
    return lambda images: torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(images, 8), weight)


def labels_and_predictions(seed=0, count=5, size=(16, 32)):
    """Labels of few classes with pixels that are not scored (all of the last image), and predictions per backend."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 11, 13, 255], (count, *size)).astype(np.uint8)
    labels[-1] = 255
    predictions = {}
    for name, noise in zip(PAIR, (0.1, 0.3), strict=True):
        guess = rng.integers(0, 19, labels.shape).astype(np.uint8)
        predictions[name] = np.where((rng.random(labels.shape) < noise) | (labels == 255), guess, labels)
    return labels, predictions


def scores_of(labels, predictions):
    """The Scores of labels (N, H, W) and predictions (N, H, W) of both backends."""
    matrices = {
        name: np.array([metrics.confusion_matrix(*pair, 19) for pair in zip(labels, predicted, strict=True)])
        for name, predicted in predictions.items()
    }
    alike = np.equal(*predictions.values()).sum((1, 2))
    return Scores(
        matrices, {PAIR: alike}, np.full(len(labels), labels[0].size), dict(zip(PAIR, (1.0, 2.0), strict=True))
    )


def random_scores(quality, images=24, drop=0.01, seed=0):
    """Scores of 19 classes on the same images for every seed; `quality` and `quality - drop` of the pixels are right.

    Models differ by their seed in which pixels they get wrong, and share how hard an image is.
    """
    difficulty = np.random.default_rng(0).normal(0, 0.03, (images, 19))
    rng = np.random.default_rng(seed)
    matrices = {}
    for name, share in zip(PAIR, (quality, quality - drop), strict=True):
        right = np.clip(share + difficulty + rng.normal(0, 0.01, (images, 19)), 0, 1)
        wrong = (1 - right[:, :, None]) * rng.dirichlet(np.full(19, 0.3), (images, 19))
        matrices[name] = np.round(1000 * (wrong + right[:, :, None] * np.eye(19))).astype(np.int64)
    times = dict(zip(PAIR, (1.0, 2.0), strict=True))
    return Scores(matrices, {PAIR: np.full(images, 17_000)}, np.full(images, 20_000), times)


def compared_models(names, qualities, size=(1024, 2048), chip=None, **changes):
    """A ComparedModel of each name, with random scores of its quality and `changes` to its Result."""
    models = []
    for seed, (name, quality) in enumerate(zip(names, qualities, strict=True)):
        scores = random_scores(quality, seed=seed)
        result = small_result(scores, size=size, **{"model": name, "published": {}} | changes)
        models.append(compare_model(result, chip, f"{name}/report.html"))
    return models


def zoo_comparison(**changes):
    """A comparison of the five models that AI Hub published."""
    return comparison_of(compared_models(ZOO, (0.87, 0.88, 0.885, 0.875, 0.86), **changes))


def plain_model(name, gmacs, miou, ms=None, replicates=None, **changes):
    """A ComparedModel with a given mIoU in INT8 and one more in FP32; its interval is that mIoU and one less or more.

    Args:
        name: of the model.
        gmacs: its cost.
        miou: of INT8 simulated in percent; None if it is undefined.
        ms: published latency by DLC for images of 1024x2048.
        replicates: `miou` without each image; None if it is the same without any of 500 images.
        changes: to the fields of the Result.
    """
    known = miou is not None
    entry = small_result().backends[INT8_SIMULATED]
    entry = dataclasses.replace(entry, miou_interval=(miou - 1, miou + 1) if known else None, change_interval=None)
    fp32 = dataclasses.replace(entry, miou=miou + 1 if known else None, change=None)
    int8 = dataclasses.replace(
        entry,
        miou=miou,
        labelled_miou=miou,
        change=-1.0 if known else None,
        change_interval=(-1.5, -0.5) if known else None,
    )
    replicates = np.full(500, miou or 0.0) if replicates is None else replicates
    estimate = Estimate(miou or 0.0, replicates, len(replicates))
    fields = {"images": 500, "backends": {FP32: fp32, INT8_SIMULATED: int8}, "published": {}} | changes
    return ComparedModel(
        result=small_result(model=name, size=(1024, 2048), **fields),
        link=None,
        parameters=10**6,
        gmacs=gmacs,
        published=ms and DeviceResult("device", (1024, 2048), 50, 80.0, {}, {"qnn_dlc": ms}),
        estimate=estimate if known else None,
    )


def comparison_of(models):
    """A ModelComparison of models."""
    return ModelComparison(models, ["a note"], option_values(Config()) | {"cle": False})
